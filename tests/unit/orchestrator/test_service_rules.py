"""How a service's status follows reports, absences and losses."""

from __future__ import annotations

import pytest

from flops.core.cluster import Service, ServiceKind, ServiceSpec, ServiceState, ServiceStatus, ServiceUsage
from flops.core.ids import NodeId, ServiceId
from flops.orchestrator.service_rules import (
    may_run,
    status_when_given_up,
    status_when_missing,
    status_when_node_lost,
    status_when_reported,
)

S = ServiceState
FINAL = [S.COMPLETED, S.FAILED, S.STOPPED]
OPEN = [state for state in S if state not in FINAL]


def service(state: ServiceState, *, should_run: bool = True) -> Service:
    spec = ServiceSpec(id=ServiceId("s"), project_id="p", kind=ServiceKind.LEARNER, node_id=NodeId("n"))
    return Service(spec=spec, status=ServiceStatus(service_id=spec.id, state=state), should_run=should_run)


def reported(state: ServiceState, **fields: object) -> ServiceStatus:
    return ServiceStatus.model_validate({"service_id": "s", "state": state, **fields})


def state_of(status: ServiceStatus | None) -> ServiceState | None:
    return status.state if status is not None else None


@pytest.mark.parametrize("known", FINAL)
@pytest.mark.parametrize("should_run", [True, False])
def test_a_final_status_never_changes(known: ServiceState, should_run: bool) -> None:
    ended = service(known, should_run=should_run)
    assert all(status_when_reported(ended, reported(state, restarts=9)) is None for state in S)
    assert status_when_missing(ended, "pi") is None
    assert status_when_node_lost(ended, "gone") is None
    assert status_when_given_up(ended, "removed") is None
    assert not may_run(ended)


@pytest.mark.parametrize("known", OPEN)
@pytest.mark.parametrize("state", [S.PREPARING, S.RUNNING, S.RESTARTING, S.COMPLETED, S.FAILED])
def test_what_a_node_reports_is_so(known: ServiceState, state: ServiceState) -> None:
    report = reported(state, detail="news", exit_code=3, restarts=1)
    assert status_when_reported(service(known), report) == report


def test_what_is_known_already_is_no_news() -> None:
    running = service(S.RUNNING)
    assert status_when_reported(running, running.status) is None
    used = running.status.model_copy(update={"usage": ServiceUsage(memory_mb=5)})
    assert status_when_reported(running, used) is None


def test_nodes_do_not_report_loss() -> None:
    assert status_when_reported(service(S.RUNNING), reported(S.LOST)) is None


def test_an_end_that_nobody_asked_for_is_a_loss() -> None:
    assert state_of(status_when_reported(service(S.RUNNING), reported(S.STOPPED))) is S.LOST
    assert status_when_reported(service(S.LOST), reported(S.STOPPED)) is None
    asked = service(S.RUNNING, should_run=False)
    assert state_of(status_when_reported(asked, reported(S.STOPPED))) is S.STOPPED


@pytest.mark.parametrize(
    ("known", "should_run", "expected"),
    [
        (S.PENDING, True, None),
        (S.RUNNING, True, S.PENDING),
        (S.LOST, True, S.PENDING),
        (S.PENDING, False, S.STOPPED),
        (S.RUNNING, False, S.STOPPED),
        (S.LOST, False, S.STOPPED),
    ],
)
def test_a_service_missing_on_its_node(
    known: ServiceState, should_run: bool, expected: ServiceState | None
) -> None:
    assert state_of(status_when_missing(service(known, should_run=should_run), "pi")) is expected


@pytest.mark.parametrize(
    ("known", "should_run", "expected"),
    [
        (S.PENDING, True, None),
        (S.LOST, True, None),
        (S.PREPARING, True, S.LOST),
        (S.RUNNING, True, S.LOST),
        (S.RESTARTING, True, S.LOST),
        (S.PENDING, False, S.STOPPED),
        (S.RUNNING, False, S.STOPPED),
    ],
)
def test_a_service_of_a_lost_node(
    known: ServiceState, should_run: bool, expected: ServiceState | None
) -> None:
    assert state_of(status_when_node_lost(service(known, should_run=should_run), "gone")) is expected


def test_a_service_that_does_not_run_uses_nothing() -> None:
    running = service(S.RUNNING)
    status = running.status.model_copy(update={"usage": ServiceUsage(memory_mb=5)})
    lost = status_when_node_lost(running.model_copy(update={"status": status}), "gone")
    assert lost is not None
    assert lost.usage == ServiceUsage()
