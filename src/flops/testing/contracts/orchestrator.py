"""What every `flops.ports.Orchestrator` does."""

from __future__ import annotations

from typing import Any, Protocol

import pytest

from flops.core.cluster import ClusterEvent, Service, ServiceKind, ServiceSpec, ServiceState, ServiceStatus
from flops.core.ids import NodeId, ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.ports import Orchestrator

NODE = NodeId("node-1")
LEARNER = ServiceId("learner-p1-0")


class ClusterUnderTest(Protocol):
    """An orchestrator, and its nodes played by the test."""

    orchestrator: Orchestrator

    def join(self, node_id: NodeId, name: str) -> None:
        """Connect a node, or connect it again; it has what was reported before."""

    def leave(self, node_id: NodeId) -> None:
        """Let a node vanish, and enough time pass for that to be noticed."""

    def report(self, status: ServiceStatus) -> None:
        """Report a service's status."""

    def tell(self, service_id: ServiceId, line: int, event: dict[str, Any]) -> None:
        """Report one line of a service's event log."""

    def show_output(self, service_id: ServiceId, text: str) -> None:
        """Let the service's node answer with this output."""


def learner(service_id: str = LEARNER, *, node_id: str = NODE, project_id: str = "p1") -> ServiceSpec:
    """A service for tests."""
    return ServiceSpec(
        id=ServiceId(service_id), project_id=project_id, kind=ServiceKind.LEARNER, node_id=NodeId(node_id)
    )


def status(state: ServiceState, service_id: str = LEARNER, **fields: Any) -> ServiceStatus:
    """A status for tests."""
    return ServiceStatus(service_id=ServiceId(service_id), state=state, **fields)


class OrchestratorContract:
    """Subclass it, and provide the fixture `cluster`."""

    @pytest.fixture
    def cluster(self) -> ClusterUnderTest:
        raise NotImplementedError

    def _events(self, cluster: ClusterUnderTest, kind: str) -> list[ClusterEvent]:
        return [event for event in cluster.orchestrator.events(after=0) if event.kind == kind]

    def _states(self, cluster: ClusterUnderTest, service_id: str = LEARNER) -> list[str]:
        events = self._events(cluster, "service")
        return [event.payload["state"] for event in events if event.service_id == service_id]

    def _service(self, cluster: ClusterUnderTest, service_id: str = LEARNER) -> Service:
        return next(s for s in cluster.orchestrator.services() if s.spec.id == service_id)

    def test_a_node_that_joins_is_listed_and_told(self, cluster: ClusterUnderTest) -> None:
        assert cluster.orchestrator.nodes() == []
        cluster.join(NODE, "pi-1")
        (node,) = cluster.orchestrator.nodes()
        assert (node.id, node.name, node.is_connected) == (NODE, "pi-1", True)
        (event,) = self._events(cluster, "node")
        assert (event.node_id, event.payload) == (NODE, {"node_id": NODE, "is_connected": True})

    def test_a_node_that_vanishes_is_told_once_and_again_when_it_is_back(
        self, cluster: ClusterUnderTest
    ) -> None:
        cluster.join(NODE, "pi-1")
        cluster.leave(NODE)
        cluster.join(NODE, "pi-1")
        assert [e.payload["is_connected"] for e in self._events(cluster, "node")] == [True, False, True]
        assert cluster.orchestrator.nodes()[0].is_connected

    def test_a_removed_node_is_forgotten_until_it_joins_anew(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.leave(NODE)
        cluster.orchestrator.remove_node(NODE)
        assert cluster.orchestrator.nodes() == []
        with pytest.raises(FlopsError) as caught:
            cluster.orchestrator.remove_node(NODE)
        assert caught.value.code is ErrorCode.NODE_NOT_FOUND
        cluster.join(NODE, "pi-1")
        assert [node.is_connected for node in cluster.orchestrator.nodes()] == [True]

    @pytest.mark.parametrize("is_forced", [False, True])
    def test_a_connected_node_is_not_removed(self, cluster: ClusterUnderTest, is_forced: bool) -> None:
        cluster.join(NODE, "pi-1")
        with pytest.raises(FlopsError) as caught:
            cluster.orchestrator.remove_node(NODE, is_forced=is_forced)
        assert caught.value.code is ErrorCode.CONFLICT
        assert "NodeEngine stop" in caught.value.hint
        assert len(cluster.orchestrator.nodes()) == 1

    def test_services_of_a_node_that_is_removed_by_force_have_failed(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        for name in ("runs", "waits", "done"):
            cluster.orchestrator.start_service(learner(name))
        cluster.report(status(ServiceState.RUNNING, "runs"))
        cluster.report(status(ServiceState.COMPLETED, "done"))
        cluster.leave(NODE)
        with pytest.raises(FlopsError) as caught:
            cluster.orchestrator.remove_node(NODE)
        assert caught.value.code is ErrorCode.CONFLICT
        assert "runs, waits" in caught.value.message
        assert "--force" in caught.value.hint
        assert self._states(cluster, "runs") == ["running", "lost"]
        cluster.orchestrator.remove_node(NODE, is_forced=True)
        assert self._states(cluster, "done") == ["completed"]
        for name in ("runs", "waits"):
            ended = self._service(cluster, name).status
            assert self._states(cluster, name)[-1] == ended.state.value == "failed"
            assert ended.error is not None
            assert ended.error["code"] == ErrorCode.NODE_LOST.value
        with pytest.raises(FlopsError) as caught:
            cluster.orchestrator.service_logs(ServiceId("runs"))
        assert caught.value.code is ErrorCode.NODE_LOST
        cluster.orchestrator.stop_service(ServiceId("runs"))
        cluster.orchestrator.remove_service(ServiceId("waits"))
        cluster.join(NODE, "pi-1")
        cluster.report(status(ServiceState.RUNNING, "runs"))  # it had never been gone
        assert self._states(cluster, "runs")[-1] == "failed"

    def test_a_service_on_an_unknown_node_is_refused(self, cluster: ClusterUnderTest) -> None:
        with pytest.raises(FlopsError) as caught:
            cluster.orchestrator.start_service(learner(node_id="nowhere"))
        assert caught.value.code is ErrorCode.NODE_NOT_FOUND
        assert "nowhere" in caught.value.message
        assert cluster.orchestrator.services() == []

    def test_a_started_service_is_pending_until_its_node_reports(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        assert self._service(cluster).status.state is ServiceState.PENDING
        cluster.report(status(ServiceState.PREPARING, detail="fetches the code"))
        cluster.report(status(ServiceState.RUNNING))
        assert self._service(cluster).status.state is ServiceState.RUNNING
        assert self._states(cluster) == ["preparing", "running"]
        event = self._events(cluster, "service")[0]
        assert (event.project_id, event.service_id, event.node_id) == ("p1", LEARNER, NODE)
        assert ServiceStatus.model_validate(event.payload).detail == "fetches the code"

    def test_starting_again_changes_nothing(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        cluster.report(status(ServiceState.RUNNING))
        before = self._service(cluster)
        cluster.orchestrator.start_service(learner())
        assert self._service(cluster) == before
        assert self._states(cluster) == ["running"]

    def test_services_are_listed_by_project_oldest_first(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        for name, project in (("s2", "a"), ("s1", "b"), ("s3", "a")):
            cluster.orchestrator.start_service(learner(name, project_id=project))
        assert [s.spec.id for s in cluster.orchestrator.services()] == ["s2", "s1", "s3"]
        assert [s.spec.id for s in cluster.orchestrator.services("a")] == ["s2", "s3"]
        assert cluster.orchestrator.services("c") == []

    def test_a_repeated_report_changes_nothing(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        for _ in range(3):
            cluster.report(status(ServiceState.RUNNING))
        assert self._states(cluster) == ["running"]

    def test_a_final_state_stays(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        cluster.report(status(ServiceState.FAILED, exit_code=1, error={"code": "internal"}))
        cluster.report(status(ServiceState.RUNNING))
        cluster.report(status(ServiceState.STOPPED))
        known = self._service(cluster).status
        assert (known.state, known.exit_code, known.error) == (
            ServiceState.FAILED,
            1,
            {"code": "internal"},
        )
        assert self._states(cluster) == ["failed"]

    def test_a_report_of_an_unknown_service_is_ignored(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.report(status(ServiceState.RUNNING, "nobody"))
        cluster.tell(ServiceId("nobody"), 1, {"kind": "progress"})
        assert cluster.orchestrator.services() == []
        assert self._events(cluster, "service") + self._events(cluster, "actor") == []

    def test_a_stopped_service_ends(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        cluster.report(status(ServiceState.RUNNING))
        cluster.orchestrator.stop_service(LEARNER)
        cluster.report(status(ServiceState.STOPPED))
        cluster.orchestrator.stop_service(LEARNER)
        service = self._service(cluster)
        assert (service.should_run, service.status.state) == (False, ServiceState.STOPPED)
        assert self._states(cluster) == ["running", "stopped"]

    def test_stopping_an_ended_service_keeps_how_it_ended(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        cluster.report(status(ServiceState.COMPLETED, exit_code=0))
        cluster.orchestrator.stop_service(LEARNER)
        assert self._service(cluster).status.state is ServiceState.COMPLETED

    def test_unknown_services_can_be_stopped_and_removed(self, cluster: ClusterUnderTest) -> None:
        cluster.orchestrator.stop_service(ServiceId("nobody"))
        cluster.orchestrator.remove_service(ServiceId("nobody"))
        assert cluster.orchestrator.events(after=0) == []

    def test_services_of_a_vanished_node_are_lost_until_reported_again(
        self, cluster: ClusterUnderTest
    ) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner("runs"))
        cluster.orchestrator.start_service(learner("waits"))
        cluster.orchestrator.start_service(learner("done"))
        cluster.report(status(ServiceState.RUNNING, "runs"))
        cluster.report(status(ServiceState.COMPLETED, "done"))
        cluster.leave(NODE)
        states = {s.spec.id: s.status.state for s in cluster.orchestrator.services()}
        assert states == {
            "runs": ServiceState.LOST,
            "waits": ServiceState.PENDING,
            "done": ServiceState.COMPLETED,
        }
        cluster.join(NODE, "pi-1")
        cluster.report(status(ServiceState.RUNNING, "runs"))
        assert self._states(cluster, "runs") == ["running", "lost", "running"]

    def test_stopping_a_service_of_a_vanished_node_ends_it_at_once(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        cluster.report(status(ServiceState.RUNNING))
        cluster.leave(NODE)
        cluster.orchestrator.stop_service(LEARNER)
        assert self._states(cluster) == ["running", "lost", "stopped"]

    def test_a_service_can_be_started_on_a_node_that_is_away(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.leave(NODE)
        cluster.orchestrator.start_service(learner())
        assert self._service(cluster).status.state is ServiceState.PENDING
        cluster.join(NODE, "pi-1")
        cluster.report(status(ServiceState.RUNNING))
        assert self._states(cluster) == ["running"]

    def test_a_removed_service_is_gone(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        cluster.report(status(ServiceState.RUNNING))
        cluster.orchestrator.remove_service(LEARNER)
        assert cluster.orchestrator.services() == []
        assert self._states(cluster) == ["running", "stopped"]
        cluster.report(status(ServiceState.RUNNING))
        assert cluster.orchestrator.services() == []
        assert self._states(cluster) == ["running", "stopped"]

    def test_events_of_services_come_in_order_and_once(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        for line in (1, 2, 1, 2, 3):
            cluster.tell(LEARNER, line, {"kind": "progress", "message": f"step {line}"})
        events = self._events(cluster, "actor")
        assert [(e.line, e.payload["message"]) for e in events] == [
            (1, "step 1"),
            (2, "step 2"),
            (3, "step 3"),
        ]
        assert (events[0].project_id, events[0].service_id, events[0].node_id) == ("p1", LEARNER, NODE)

    def test_events_of_an_ended_service_are_still_taken(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        cluster.report(status(ServiceState.COMPLETED))
        cluster.tell(LEARNER, 1, {"kind": "progress"})
        assert len(self._events(cluster, "actor")) == 1

    def test_events_are_read_from_a_position(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        for line in (1, 2, 3):
            cluster.tell(LEARNER, line, {"kind": "progress"})
        everything = cluster.orchestrator.events(after=0)
        sequence = [event.seq for event in everything]
        assert sequence == sorted(set(sequence))
        for position, event in enumerate(everything):
            assert cluster.orchestrator.events(after=event.seq) == everything[position + 1 :]

    def test_listeners_are_woken_and_find_the_event(self, cluster: ClusterUnderTest) -> None:
        seen: list[int] = []
        cluster.orchestrator.on_event(lambda: seen.append(len(cluster.orchestrator.events(after=0))))
        cluster.join(NODE, "pi-1")
        assert seen[-1] == 1
        cluster.orchestrator.start_service(learner())
        cluster.report(status(ServiceState.RUNNING))
        assert seen[-1] == 2

    def test_output_is_fetched_from_the_node(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        cluster.show_output(LEARNER, "first\nsecond\n")
        assert cluster.orchestrator.service_logs(LEARNER).text == "first\nsecond\n"
        assert cluster.orchestrator.service_logs(LEARNER, tail_bytes=7).text == "second\n"

    def test_output_is_fetched_from_a_place_on(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        cluster.show_output(LEARNER, "first\nsecond\n")
        begin = cluster.orchestrator.service_logs(LEARNER, after=0, tail_bytes=6)
        assert (begin.text, begin.end, begin.total) == ("first\n", 6, 13)
        rest = cluster.orchestrator.service_logs(LEARNER, after=begin.end)
        assert (rest.text, rest.start, rest.end) == ("second\n", 6, 13)
        cluster.show_output(LEARNER, "first\nsecond\nthird\n")
        assert cluster.orchestrator.service_logs(LEARNER, after=rest.end).text == "third\n"

    def test_output_of_an_unknown_service_is_an_error(self, cluster: ClusterUnderTest) -> None:
        with pytest.raises(FlopsError) as caught:
            cluster.orchestrator.service_logs(ServiceId("nobody"))
        assert caught.value.code is ErrorCode.SERVICE_NOT_FOUND

    def test_output_on_a_vanished_node_is_an_error(self, cluster: ClusterUnderTest) -> None:
        cluster.join(NODE, "pi-1")
        cluster.orchestrator.start_service(learner())
        cluster.leave(NODE)
        with pytest.raises(FlopsError) as caught:
            cluster.orchestrator.service_logs(LEARNER)
        assert caught.value.code is ErrorCode.NODE_LOST
        assert "pi-1" in caught.value.message
