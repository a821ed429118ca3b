"""``NodeEngine status``: what this node is doing."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flops.cli.findings import SYMBOLS, health_line
from flops.cli.output import print_facts, print_line
from flops.core.cluster import IMAGE_BUILDER_ADDON, AddonState
from flops.errors import FlopsError

if TYPE_CHECKING:
    from flops.core.health import Health
    from flops.node.configuration import NodeConfiguration
    from flops.node.paths import NodePaths
    from flops.node.report import NodeReport

_BUILT = {"ok": "🟢", "info": "⚪", "problem": "🔴"}
_SYMBOLS = {"healthy": "🟢", "starting": "🟡", "unhealthy": "🔴"}


def status_data(
    paths: NodePaths, conf: NodeConfiguration, report: NodeReport | None, pid: int | None
) -> dict[str, Any]:
    """The node's state for programs."""
    return {
        "is_running": pid is not None,
        "home": str(paths.home),
        "configuration": str(paths.conf),
        "log": str(paths.log),
        "configured_cluster": conf.cluster,
        "configured_addons": conf.addons,
        "configured_disclosure": conf.disclosure.value,
        "health": _health(paths, conf, report, pid).model_dump(mode="json"),
        "certificate": _certificate(paths),
        "node": None if report is None else report.model_dump(mode="json"),
    }


def show_status(
    paths: NodePaths, conf: NodeConfiguration, report: NodeReport | None, pid: int | None
) -> None:
    """Print the node's state for people."""
    if report is None:
        state = (
            "not running" if pid is None else f"running (process {pid}), but it tells nothing about itself"
        )
        print_line(f"NodeEngine: {'🔴' if pid is None else '🟡'} {state}")
        facts = [("cluster", f"{conf.cluster} (configured)"), ("home", paths.home), ("log", paths.log)]
        print_facts(facts)
        _show_configured_addons(conf)
        return
    health = _health(paths, conf, report, pid)
    symbol = SYMBOLS[health.severity.value]
    print_line(f"NodeEngine: {symbol} running since {_time(report.started_at_s)} (process {report.pid})")
    print_facts(
        [
            ("health", health_line(health) if health.reason else ""),
            ("node", f"{report.name} ({report.node_id})"),
            ("version", report.version),
            ("cluster", _cluster(report)),
            ("certificate", _certificate_line(paths)),
            ("limits", ", ".join(report.limits) or "none"),
            ("not limited", report.limits_note),
            ("disclosure", f"{report.disclosure} ({report.disclosure.meaning})"),
            ("cached", _cached(report)),
            ("home", paths.home),
            ("log", paths.log),
        ]
    )
    _show_addons(conf, report)
    _show_services(report)
    _show_tags(report)


def _health(paths: NodePaths, conf: NodeConfiguration, report: NodeReport | None, pid: int | None) -> Health:
    from flops.cli.node_doctor import node_findings
    from flops.core.health import health_of

    return health_of(list(node_findings(paths, conf, report, pid)))


def _certificate(paths: NodePaths) -> dict[str, Any] | None:
    """Who signed the node's certificate, and until when it is good; None without one."""
    if not paths.identity.exists():
        return None
    from flops.adapters.node_identity import read_identity

    try:
        identity = read_identity(paths.identity)
    except FlopsError as error:
        return {"problem": error.message}
    if identity is None:
        return None
    return {"signer": identity.signer, "not_after_s": identity.not_after_s}


def _certificate_line(paths: NodePaths) -> str:
    found = _certificate(paths)
    if found is None:
        return ""
    return found.get("problem") or f"of {found['signer']}, until {_time(found['not_after_s'])}; renews itself"


def _cluster(report: NodeReport) -> str:
    since = _time(report.link_since_s)
    if report.is_connected:
        return f"{report.cluster_address} 🟢 connected since {since}"
    return f"{report.cluster_address} 🔴 not connected since {since}: {report.link_detail}"


def _cached(report: NodeReport) -> str:
    caches = [f"{line.entries} {line.name} {_megabytes(line.size_bytes)}" for line in report.caches]
    return f"{', '.join(caches)}; at most {_megabytes(report.cache_limit_bytes)}" if caches else ""


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1024**2:,.0f} MiB"


def _show_configured_addons(conf: NodeConfiguration) -> None:
    print_line("Addons:" if conf.addons else "Addons: none")
    for name, is_on in conf.addons.items():
        print_line(f"     - {name}: {'on' if is_on else 'off'}")


def _show_addons(conf: NodeConfiguration, report: NodeReport) -> None:
    off = [name for name, is_on in conf.addons.items() if not is_on and name not in report.active_addons]
    print_line("Addons:" if report.addons or off else "Addons: none")
    for addon in report.addons:
        can_build = addon.name == IMAGE_BUILDER_ADDON and addon.state is AddonState.HEALTHY
        detail = f" ({addon.detail})" if addon.detail and not can_build else ""
        print_line(f"     - {addon.name}: {_SYMBOLS[addon.state.value]} {addon.state.value}{detail}")
        if can_build:
            _show_what_can_be_built()
    for name in off:
        print_line(f"     - {name}: off")


def _show_what_can_be_built() -> None:
    from flops.core.build_tools import build_findings
    from flops.wiring.node_files import node_build_tools

    for finding in build_findings(node_build_tools()):
        print_line(f"          {_BUILT[finding.severity.value]} {finding.what}")


def _show_services(report: NodeReport) -> None:
    print_line("Services:" if report.services else "Services: none")
    for line in report.services:
        status = line.status
        use = ""
        if status.usage.processes:
            count = status.usage.processes
            use = (
                f", {status.usage.memory_mb:.0f} MB, {status.usage.cpu_percent:.0f} % CPU,"
                f" {count} {'process' if count == 1 else 'processes'}"
            )
        detail = f" ({status.detail})" if status.detail else ""
        print_line(f"     - {status.service_id}: {status.state.value}{use}{detail}")


def _show_tags(report: NodeReport) -> None:
    print_line("Data tags:" if report.data_tags else "Data tags: none")
    for tag in report.data_tags:
        print_line(f"     - {tag.name}: {tag.rows} rows, {tag.size_bytes / 1e6:.1f} MB")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat(sep=" ", timespec="seconds")
