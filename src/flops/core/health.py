"""What is wrong with a node, by rules over what is known of it: one rule set for all that shows health.

`flops node list`, `NodeEngine status`, `flops doctor` and `NodeEngine doctor` all ask here. A finding says
what was looked at, how bad it is, and what to do.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from enum import StrEnum

from flops.core.cluster import (
    HEARTBEAT_INTERVAL_S,
    IMAGE_BUILDER_ADDON,
    Addon,
    AddonState,
    Node,
    NodeLoad,
    Service,
    ServiceStatus,
)
from flops.core.model import Value

SILENT_AFTER_S = 2.5 * HEARTBEAT_INTERVAL_S
REPORT_STALE_AFTER_S = 3 * HEARTBEAT_INTERVAL_S  # a daemon writes its report as often as it sends heartbeats
CLOCK_SKEW_WARNING_S = 2.0
CLOCK_SKEW_PROBLEM_S = 300.0  # certificates and signed requests fail from there on
DISK_WARNING = (2_000, 0.10)  # MiB or share of the disk that are left, whichever is less
DISK_PROBLEM = (500, 0.03)
MEMORY_WARNING_PERCENT = 92.0
MEMORY_PROBLEM_PERCENT = 97.0
RESTARTS_WARNING = 3
CERTIFICATE_LEFT_WARNING = 1 / 4  # of its life; it is renewed when a third is left
_FOR_CERTIFICATE = "The log of whoever shows it says why it is not renewed; docs/security.md says how it is."
_FOR_GROUPS = "Run the NodeEngine as root or by systemd, for limits."
_FOR_CONFINEMENT = (
    "Use a kernel with Landlock (Linux 6.12), to keep services to their own files, processes and ports."
)
_LIMITS = {  # and what a node needs to hold services to them
    "memory": _FOR_GROUPS,
    "cpu": _FOR_GROUPS,
    "pids": _FOR_GROUPS,
    "files": _FOR_CONFINEMENT,
    "network": _FOR_CONFINEMENT,
    "signals": _FOR_CONFINEMENT,
}


class Severity(StrEnum):
    """How bad a finding is. `INFO` is worth knowing and nothing to mend."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    PROBLEM = "problem"

    @property
    def rank(self) -> int:
        """Worse is higher."""
        return list(Severity).index(self)


class Finding(Value):
    """One thing that was looked at.

    Args:
        severity: how bad it is.
        check: what was looked at, one word or two: programs decide by it.
        where: the node, file or address that it is about.
        what: what was found, one sentence.
        advice: what to do about it; "" when there is nothing to do.
    """

    severity: Severity
    check: str
    where: str
    what: str
    advice: str = ""


def fine(check: str, where: str, what: str) -> Finding:
    """A finding that nothing is wrong."""
    return Finding(severity=Severity.OK, check=check, where=where, what=what)


def known(check: str, where: str, what: str, advice: str = "") -> Finding:
    """A finding that is worth knowing."""
    return Finding(severity=Severity.INFO, check=check, where=where, what=what, advice=advice)


def warning(check: str, where: str, what: str, advice: str = "") -> Finding:
    """A finding that needs a look."""
    return Finding(severity=Severity.WARNING, check=check, where=where, what=what, advice=advice)


def problem(check: str, where: str, what: str, advice: str) -> Finding:
    """A finding that has to be mended."""
    return Finding(severity=Severity.PROBLEM, check=check, where=where, what=what, advice=advice)


class Health(Value):
    """How something is: its findings, worst first, and the severity of the worst."""

    severity: Severity = Severity.OK
    findings: tuple[Finding, ...] = ()

    @property
    def reason(self) -> str:
        """Why it is sick, in one sentence; "" when it is not."""
        return self.findings[0].what if self.severity.rank >= Severity.WARNING.rank else ""


class ExaminedNode(Node):
    """A node as the cluster knows it, with its health."""

    health: Health = Health()


def health_of(findings: Sequence[Finding]) -> Health:
    """Sum findings up."""
    ordered = tuple(sorted(findings, key=lambda finding: -finding.severity.rank))
    return Health(severity=ordered[0].severity if ordered else Severity.OK, findings=ordered)


def examine_nodes(
    nodes: Sequence[Node], services: Sequence[Service], now_s: float, version: str
) -> list[ExaminedNode]:
    """All nodes with their health.

    Args:
        nodes: all nodes of the cluster.
        services: all its services.
        now_s: the time, in seconds since the epoch.
        version: of the control plane.
    """
    examined = []
    for node in nodes:
        statuses = [s.status for s in services if s.spec.node_id == node.id]
        findings = [*_node_findings(node, statuses, now_s, version), *_address_findings(node, nodes)]
        examined.append(ExaminedNode(**dict(node), health=health_of(findings)))
    return examined


def _node_findings(
    node: Node, statuses: Sequence[ServiceStatus], now_s: float, version: str
) -> Iterator[Finding]:
    yield from _link_findings(node, now_s)
    if not node.is_connected:
        return  # the rest is what it once told
    yield from addon_findings(node.addons, node.name)
    yield from load_findings(node.load, node.name)
    yield from service_findings(statuses, node.name)
    yield from version_findings(node.facts.flops_version, version, node.name)
    if node.clock_skew_s is not None:
        yield from clock_findings(node.clock_skew_s, node.name, "the control plane's")
    yield from limit_findings(node.facts.limits, node.facts.limits_note, node.name)


def _link_findings(node: Node, now_s: float) -> Iterator[Finding]:
    silence_s = max(0.0, now_s - node.last_seen_s) if node.last_seen_s else 0.0
    since = f" {ago(silence_s)} ago" if silence_s else ""
    if not node.is_connected and node.has_said_goodbye:
        what = f"It is not connected: its NodeEngine was stopped{since}."
        yield warning("connection", node.name, what, "`NodeEngine -d` on its machine starts it again.")
    elif not node.is_connected:
        heard = f": it was last heard{since}" if since else ""
        advice = f"Run `NodeEngine status` and `NodeEngine doctor` on its machine ({node.facts.hostname})."
        yield problem("connection", node.name, f"It is not connected{heard}.", advice)
    elif silence_s > SILENT_AFTER_S:
        silence = f"Nothing was heard of it for {silence_s:.0f} s"
        what = f"{silence}, though it tells every {HEARTBEAT_INTERVAL_S:g} s."
        advice = "It counts as gone soon. Look whether its machine is overloaded, and at its network."
        yield warning("connection", node.name, what, advice)


def addon_findings(addons: Sequence[Addon], where: str) -> Iterator[Finding]:
    """Addons that do not work."""
    for addon in addons:
        advice = "It is tried again by itself; `NodeEngine logs` on its machine says more."
        if addon.name == IMAGE_BUILDER_ADDON:
            advice = "Install what is missing on its machine; the addon finds it by itself."
        check = f"addon {addon.name}"
        if addon.state is AddonState.UNHEALTHY:
            what = f"The addon {addon.name} does not work: {addon.detail}"
            yield problem(check, where, what, advice)
        elif addon.state is AddonState.STARTING:
            yield warning(check, where, f"The addon {addon.name} is starting.")
        elif addon.detail:
            yield known(check, where, addon.detail)


def load_findings(load: NodeLoad, where: str) -> Iterator[Finding]:
    """A disk or a memory that is almost full; nothing where it is not known how large the disk is."""
    yield from disk_findings(load.disk_free_mb, load.disk_total_mb, where)
    percent = load.memory_percent
    if percent >= MEMORY_WARNING_PERCENT:
        make = problem if percent >= MEMORY_PROBLEM_PERCENT else warning
        advice = "End programs that need much of it, or limit services by resource_constraints.memory."
        yield make("memory", where, f"Its memory is {percent:.0f} % full.", advice)


def disk_findings(free_mb: int, total_mb: int, where: str) -> Iterator[Finding]:
    """A disk that is almost full; sizes in MiB, nothing when `total_mb` is 0 (not known)."""
    what = f"Its disk is almost full: {free_mb:,} of {total_mb:,} MB are free."
    advice = "Free space: drop data that is no longer needed (`flops data drop`), delete old projects."
    for make, (floor_mb, share) in ((problem, DISK_PROBLEM), (warning, DISK_WARNING)):
        if free_mb < min(floor_mb, share * total_mb):
            yield make("disk", where, what, advice)
            return


def service_findings(statuses: Sequence[ServiceStatus], where: str) -> Iterator[Finding]:
    """Services that are started again and again."""
    for status in statuses:
        if not status.state.is_final and status.restarts >= RESTARTS_WARNING:
            detail = f": {status.detail}" if status.detail else "."
            times = f"{status.service_id} was started again {status.restarts} times"
            what = f"{times}, and is {status.state.value}{detail}"
            yield warning("services", where, what, "`flops project logs` shows why it ends.")


def version_findings(theirs: str, ours: str, where: str) -> Iterator[Finding]:
    """Another version than the control plane's; nothing when theirs is not known."""
    if theirs and theirs != ours:
        what = f"It runs FLOps {theirs}, the control plane {ours}."
        yield warning("version", where, what, "Install the same version everywhere.")


def clock_findings(skew_s: float, where: str, whose: str) -> Iterator[Finding]:
    """A clock that is wrong.

    Args:
        skew_s: how far it is ahead.
        where: the machine with the clock.
        whose: the clock it was compared with, such as "the control plane's".
    """
    if abs(skew_s) > CLOCK_SKEW_WARNING_S:
        make = problem if abs(skew_s) > CLOCK_SKEW_PROBLEM_S else warning
        direction = "ahead of" if skew_s > 0 else "behind"
        advice = "Have both machines set their clocks by NTP (`timedatectl set-ntp true`)."
        yield make("clock", where, f"Its clock is {abs(skew_s):.1f} s {direction} {whose}.", advice)


def certificate_findings(
    not_before_s: float, not_after_s: float, now_s: float, where: str
) -> Iterator[Finding]:
    """A certificate that has expired, or will: it renews itself in time, unless something is wrong.

    Args:
        not_before_s: when it was signed, in seconds since the epoch; likewise the others.
        not_after_s: when it ends.
        now_s: the time.
        where: the file, or the address that shows it.
    """
    left_s = not_after_s - now_s
    if left_s <= 0:
        what = f"Its certificate has expired {ago(-left_s)} ago: it is refused."
        yield problem("certificate", where, what, _FOR_CERTIFICATE)
    elif left_s < (not_after_s - not_before_s) * CERTIFICATE_LEFT_WARNING:
        what = f"Its certificate ends in {ago(left_s)}, and has not been renewed."
        yield warning("certificate", where, what, _FOR_CERTIFICATE)


def limit_findings(limits: Sequence[str], note: str, where: str) -> Iterator[Finding]:
    """Limits that the node cannot hold services to."""
    missing = [limit for limit in _LIMITS if limit not in limits]
    if missing:
        why = f" {note}" if note else ""
        what = f"It cannot limit what services use or reach: {', '.join(missing)}.{why}"
        advice = " ".join(dict.fromkeys(_LIMITS[limit] for limit in missing))
        yield known("limits", where, what, advice)


def _address_findings(node: Node, nodes: Sequence[Node]) -> Iterator[Finding]:
    """A node that others are told to reach on a loopback address, though they are elsewhere."""
    others = [n for n in nodes if n.is_connected and n.id != node.id]
    elsewhere = [n.name for n in others if not is_loopback(n.facts.address)]
    if node.is_connected and elsewhere and is_loopback(node.facts.address):
        announced = f"Its services are announced at {node.facts.address}"
        what = f"{announced}, where {', '.join(elsewhere)} cannot reach them."
        advice = "Have it dial the cluster by an address of the network: `NodeEngine config cluster`."
        yield warning("address", node.name, what, advice)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, and no other machine's."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def ago(seconds: float) -> str:
    """A duration for people: one unit."""
    for unit, length in (("days", 172_800), ("h", 7_200), ("min", 120)):
        if seconds >= length:
            return f"{seconds / (length / 2):.0f} {unit}"
    return f"{seconds:.0f} s"
