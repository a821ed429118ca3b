"""How commands show nodes and findings about health."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flops.cli.output import print_facts, print_line, print_table, timestamp

if TYPE_CHECKING:
    from flops.core.health import ExaminedNode, Finding, Health

SYMBOLS = {"ok": "🟢", "info": "🟢", "warning": "🟡", "problem": "🔴"}


def health_line(health: Health) -> str:
    """A symbol, and the worst that is wrong."""
    return f"{SYMBOLS[health.severity.value]} {health.reason}".rstrip()


def show_findings(findings: Sequence[Finding]) -> None:
    """Print findings as a table."""
    rows = [(SYMBOLS[f.severity.value], f.check, f.where, f.what, f.advice) for f in findings]
    print_table(["", "check", "where", "result", "what to do"], rows)


def show_one_node(node: ExaminedNode) -> None:
    """Print a node with its findings."""
    facts, load = node.facts, node.load
    gone = f"gone, last heard {timestamp(node.last_seen_s)}" if node.last_seen_s else "gone"
    print_facts(
        [
            ("node", f"{node.name} ({node.id})"),
            ("state", "connected" if node.is_connected else gone),
            ("health", health_line(node.health)),
            ("machine", f"{facts.hostname}, {facts.operating_system}, {facts.architecture}"),
            ("address", facts.address),
            ("memory", f"{facts.memory_mb:,} MB, {load.memory_percent:.0f} % used"),
            ("CPU", f"{facts.cpu_cores} cores, {load.cpu_percent:.0f} % used"),
            (
                "disk",
                f"{load.disk_free_mb:,} of {load.disk_total_mb:,} MB free" if load.disk_total_mb else "",
            ),
            ("GPUs", ", ".join(facts.gpus)),
            ("runs services as", ", ".join(facts.runtimes)),
            ("limits", ", ".join(facts.limits) or "none"),
            ("versions", f"FLOps {facts.flops_version}, Python {facts.python_version}"),
            ("clock", "" if node.clock_skew_s is None else f"{node.clock_skew_s:+.1f} s"),
        ]
    )
    for addon in node.addons:
        port = f", port {addon.port}" if addon.port else ""
        print_line(f"addon {addon.name}: {addon.state.value}{port} {addon.detail}".rstrip())
    for tag in node.data_tags:
        print_line(f"data {tag.name}: {tag.rows:,} rows, {tag.size_bytes / 1e6:.1f} MB")
    if node.health.findings:
        print_line()
        show_findings(node.health.findings)
