from __future__ import annotations

from typing import Any

import pytest

from flops.core.cluster import (
    Addon,
    AddonState,
    Node,
    NodeFacts,
    NodeLoad,
    Resources,
    Service,
    ServiceKind,
    ServiceSpec,
    ServiceState,
    ServiceStatus,
)
from flops.core.health import (
    ExaminedNode,
    Finding,
    Severity,
    ago,
    certificate_findings,
    disk_findings,
    examine_nodes,
    health_of,
    is_loopback,
    limit_findings,
)
from flops.core.ids import NodeId, ServiceId

NOW_S = 1_000_000.0
FACTS = NodeFacts(flops_version="1.0", limits=("memory", "cpu", "pids", "files", "network", "signals"))


def a_node(name: str = "pi", **changes: Any) -> Node:
    return Node(
        **{
            "id": NodeId(name),
            "name": name,
            "facts": FACTS,
            "load": NodeLoad(memory_percent=40, disk_free_mb=50_000, disk_total_mb=100_000),
            "addons": (Addon(name="FLOps-learner", state=AddonState.HEALTHY),),
            "is_connected": True,
            "last_seen_s": NOW_S - 1,
            "clock_skew_s": 0.01,
            **changes,
        }
    )


def a_service(**status: Any) -> Service:
    service_id = ServiceId("learner-p-1")
    spec = ServiceSpec(
        id=service_id,
        project_id="p",
        kind=ServiceKind.LEARNER,
        node_id=NodeId("pi"),
        resources=Resources(),
    )
    return Service(spec=spec, status=ServiceStatus(**{"service_id": service_id, **status}))


def examine(node: Node, *services: Service) -> ExaminedNode:
    (examined,) = examine_nodes([node], services, NOW_S, "1.0")
    return examined


def test_a_healthy_node_has_no_finding() -> None:
    examined = examine(a_node(), a_service(state=ServiceState.RUNNING))
    assert examined.health.findings == ()
    assert (examined.health.severity, examined.health.reason) == (Severity.OK, "")
    assert examined.model_dump(exclude={"health"}) == a_node().model_dump()


@pytest.mark.parametrize(
    ("changes", "severity", "check", "words"),
    [
        ({"is_connected": False, "last_seen_s": NOW_S - 30}, Severity.PROBLEM, "connection", "30 s ago"),
        ({"is_connected": False, "last_seen_s": 0.0}, Severity.PROBLEM, "connection", "not connected."),
        ({"is_connected": False, "has_said_goodbye": True}, Severity.WARNING, "connection", "was stopped"),
        ({"last_seen_s": NOW_S - 6}, Severity.WARNING, "connection", "for 6 s"),
        (
            {"addons": (Addon(name="FLOps-learner", state=AddonState.UNHEALTHY, detail="It is dead."),)},
            Severity.PROBLEM,
            "addon FLOps-learner",
            "It is dead.",
        ),
        (
            {"addons": (Addon(name="FLOps-learner", state=AddonState.STARTING),)},
            Severity.WARNING,
            "addon FLOps-learner",
            "is starting",
        ),
        (
            {"addons": (Addon(name="FLOps-learner", state=AddonState.HEALTHY, detail="Port 1 is taken."),)},
            Severity.INFO,
            "addon FLOps-learner",
            "Port 1 is taken.",
        ),
        ({"load": NodeLoad(memory_percent=93)}, Severity.WARNING, "memory", "93 %"),
        ({"load": NodeLoad(memory_percent=99)}, Severity.PROBLEM, "memory", "99 %"),
        ({"load": NodeLoad(disk_free_mb=1, disk_total_mb=64)}, Severity.PROBLEM, "disk", "1 of 64 MB"),
        ({"clock_skew_s": 2.5}, Severity.WARNING, "clock", "2.5 s ahead of the control plane's"),
        ({"clock_skew_s": -3_600.0}, Severity.PROBLEM, "clock", "3600.0 s behind"),
        ({"facts": FACTS.model_copy(update={"flops_version": "0.9"})}, Severity.WARNING, "version", "0.9"),
        (
            {"facts": FACTS.model_copy(update={"limits": (), "limits_note": "No groups."})},
            Severity.INFO,
            "limits",
            "memory, cpu, pids, files, network, signals. No groups.",
        ),
        (
            {"facts": FACTS.model_copy(update={"limits": FACTS.limits[:5], "limits_note": "signals: old."})},
            Severity.INFO,
            "limits",
            "It cannot limit what services use or reach: signals. signals: old.",
        ),
    ],
)
def test_each_fault_is_found_and_named(
    changes: dict[str, Any], severity: Severity, check: str, words: str
) -> None:
    examined = examine(a_node(**changes))
    (finding,) = examined.health.findings
    assert (finding.severity, finding.check, finding.where) == (severity, check, "pi")
    assert words in finding.what
    assert examined.health.severity is severity
    assert bool(examined.health.reason) is (severity in {Severity.WARNING, Severity.PROBLEM})


@pytest.mark.parametrize(
    ("limits", "advice"),
    [
        (("cpu", "files", "network", "signals"), ["root"]),
        (("memory", "cpu", "pids", "files"), ["Landlock"]),
        ((), ["root", "Landlock"]),
    ],
)
def test_what_a_node_needs_to_limit_services_is_said_once(limits: tuple[str, ...], advice: list[str]) -> None:
    (finding,) = limit_findings(limits, "", "pi")
    assert [word for word in ("root", "Landlock") if finding.advice.count(word) == 1] == advice


def test_a_node_that_tells_little_is_not_sick() -> None:
    silent = Node(id=NodeId("old"), name="old", is_connected=True)
    (finding,) = examine(silent).health.findings
    assert finding.check == "limits"


def test_what_a_node_once_told_is_not_judged_when_it_is_gone() -> None:
    gone = a_node(is_connected=False, load=NodeLoad(memory_percent=99), clock_skew_s=99)
    assert [f.check for f in examine(gone).health.findings] == ["connection"]


def test_services_that_are_started_again_and_again() -> None:
    (finding,) = examine(
        a_node(), a_service(state=ServiceState.RESTARTING, restarts=3, detail="Waits 4 s.")
    ).health.findings
    assert finding.what == "learner-p-1 was started again 3 times, and is restarting: Waits 4 s."
    for fine in (
        a_service(state=ServiceState.RUNNING, restarts=2),
        a_service(state=ServiceState.FAILED, restarts=5),  # it has ended: nothing goes on
    ):
        assert examine(a_node(), fine).health.findings == ()


def test_a_loopback_address_is_a_fault_only_beside_other_machines() -> None:
    here, there = a_node("here"), a_node("there", facts=FACTS.model_copy(update={"address": "10.0.0.2"}))
    both = {n.name: n for n in examine_nodes([here, there], [], NOW_S, "1.0")}
    assert [f.check for f in both["here"].health.findings] == ["address"]
    assert "there cannot reach" in both["here"].health.reason
    assert both["there"].health.findings == ()
    alone = examine_nodes([here, a_node("beside")], [], NOW_S, "1.0")
    assert [n.health.findings for n in alone] == [(), ()]


def test_the_worst_comes_first() -> None:
    findings = [
        Finding(severity=severity, check="c", where="w", what=severity.value)
        for severity in (Severity.INFO, Severity.PROBLEM, Severity.OK, Severity.WARNING)
    ]
    health = health_of(findings)
    assert [f.what for f in health.findings] == ["problem", "warning", "info", "ok"]
    assert health.reason == "problem"
    assert health_of([]).severity is Severity.OK


@pytest.mark.parametrize(
    ("free_mb", "total_mb", "severity"),
    [
        (0, 0, None),  # not known
        (400, 800, None),  # half of a small disk
        (70, 800, Severity.WARNING),
        (20, 800, Severity.PROBLEM),
        (2_500, 2_000_000, None),
        (1_500, 2_000_000, Severity.WARNING),
        (499, 2_000_000, Severity.PROBLEM),
        (0, 2_000_000, Severity.PROBLEM),
    ],
)
def test_disks_of_every_size(free_mb: int, total_mb: int, severity: Severity | None) -> None:
    assert [f.severity for f in disk_findings(free_mb, total_mb, "d")] == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("left_s", "severity", "text"),
    [
        (100.0, None, ""),
        (34.0, None, ""),
        (26.0, None, ""),  # it is renewed at 33, and tried again then
        (24.0, Severity.WARNING, "ends in 24 s"),
        (0.0, Severity.PROBLEM, "expired"),
        (-7_300.0, Severity.PROBLEM, "expired 2 h ago"),
    ],
)
def test_a_certificate_that_nobody_renews(left_s: float, severity: Severity | None, text: str) -> None:
    found = list(certificate_findings(NOW_S + left_s - 100.0, NOW_S + left_s, NOW_S, "pi"))
    assert [finding.severity for finding in found] == ([] if severity is None else [severity])
    assert all(text in finding.what and finding.advice for finding in found)


def test_durations_and_addresses() -> None:
    assert [ago(s) for s in (3, 119, 120, 7_200, 172_800)] == ["3 s", "119 s", "2 min", "2 h", "2 days"]
    assert [is_loopback(h) for h in ("127.0.0.1", "[::1]", "localhost", "10.0.0.1", "pi")] == [
        *[True] * 3,
        *[False] * 2,
    ]
