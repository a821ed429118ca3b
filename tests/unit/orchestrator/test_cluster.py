"""What the cluster orchestrator does beyond the contract of every orchestrator."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from flops.adapters.memory_cluster_store import MemoryClusterStore
from flops.core.cluster import (
    Addon,
    AddonState,
    ClusterEvent,
    DataTag,
    Node,
    NodeFacts,
    NodeLoad,
    Service,
    ServiceKind,
    ServiceSpec,
    ServiceState,
    ServiceStatus,
    ServiceUsage,
)
from flops.core.ids import NodeId, ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.cluster import ClusterOrchestrator, NodeSession
from flops.testing.waiting import StandingClock
from flops.wire.node import (
    Acknowledged,
    ActorEventReport,
    FromCluster,
    Goodbye,
    Heartbeat,
    Hello,
    RemoveService,
    ServiceChanged,
    StartService,
    StopService,
    Welcome,
)

T = TypeVar("T")


class _CountingStore(MemoryClusterStore):
    writes = 0

    def put_node(self, node: Node) -> None:
        self.writes += 1
        super().put_node(node)

    def put_service(self, service: Service) -> None:
        self.writes += 1
        super().put_service(service)

    def append_event(self, event: ClusterEvent, **changes: Any) -> ClusterEvent | None:
        self.writes += 1
        return super().append_event(event, **changes)


class _Link:
    def __init__(self) -> None:
        self.sent: list[FromCluster] = []
        self.closed: list[str] = []

    def send(self, message: FromCluster) -> None:
        self.sent.append(message)

    def close(self, reason: str) -> None:
        self.closed.append(reason)

    def last(self, kind: type[T]) -> T:
        message = self.sent[-1]
        assert isinstance(message, kind), message
        return message


class _Played:
    def __init__(self) -> None:
        self.clock = StandingClock()
        self.store = _CountingStore()
        self.orchestrator = ClusterOrchestrator(self.store, self.clock)

    def join(self, *services: ServiceStatus, node_id: str = "n1") -> tuple[NodeSession, _Link]:
        link = _Link()
        hello = Hello(node_id=node_id, name="pi", facts=NodeFacts(cpu_cores=4), services=services)
        return self.orchestrator.connect(hello, link), link

    def pass_time(self, seconds: int, *, step_s: float = 1.0) -> None:
        for _ in range(int(seconds / step_s)):
            self.clock.time_s += step_s
            self.orchestrator.tick()

    def node(self) -> Node:
        return self.orchestrator.nodes()[0]

    def state(self) -> ServiceState:
        return self.orchestrator.services()[0].status.state

    def kinds(self) -> list[str]:
        return [event.kind for event in self.orchestrator.events(after=0)]


SPEC = ServiceSpec(id=ServiceId("s1"), project_id="p", kind=ServiceKind.LEARNER, node_id=NodeId("n1"))


def status(state: ServiceState, service_id: str = "s1", **fields: Any) -> ServiceStatus:
    return ServiceStatus(service_id=ServiceId(service_id), state=state, **fields)


@pytest.fixture
def played() -> _Played:
    return _Played()


def test_heartbeats_without_news_cost_no_write(played: _Played) -> None:
    session, _ = played.join()
    played.orchestrator.start_service(SPEC)
    played.orchestrator.receive(session, ServiceChanged(status=status(ServiceState.RUNNING)))
    before = played.store.writes
    for load in range(50):
        usage = ServiceUsage(memory_mb=float(load))
        heartbeat = Heartbeat(
            load=NodeLoad(cpu_percent=float(load)), services=(status(ServiceState.RUNNING, usage=usage),)
        )
        played.orchestrator.receive(session, heartbeat)
    assert played.store.writes == before
    assert played.node().load.cpu_percent == 49
    assert played.orchestrator.services()[0].status.usage.memory_mb == 49


def test_a_heartbeat_with_news_is_kept(played: _Played) -> None:
    session, _ = played.join()
    addon = Addon(name="FLOps-learner", state=AddonState.HEALTHY)
    tag = DataTag(name="mnist", rows=100, size_bytes=1)
    played.orchestrator.receive(session, Heartbeat(addons=(addon,), data_tags=(tag,)))
    again = ClusterOrchestrator(played.store, played.clock)
    assert again.nodes()[0].addons == (addon,)
    assert again.nodes()[0].data_tags == (tag,)


def test_a_second_hello_refreshes_the_facts(played: _Played) -> None:
    session, link = played.join()
    hello = Hello(node_id="n1", name="renamed", facts=NodeFacts(cpu_cores=8))
    played.orchestrator.receive(session, hello)
    assert (played.node().name, played.node().facts.cpu_cores) == ("renamed", 8)
    assert played.kinds() == ["node"]
    assert isinstance(link.sent[-1], Welcome)


def test_a_clock_that_is_wrong_is_known_and_costs_no_write(played: _Played) -> None:
    session, _ = played.join()
    assert played.node().clock_skew_s is None  # an older node does not tell
    played.orchestrator.receive(session, Heartbeat(clock_s=played.clock.now_s() + 30))
    assert played.node().clock_skew_s == 30
    before = played.store.writes
    for _ in range(3):  # it was set right
        played.orchestrator.receive(session, Heartbeat(clock_s=played.clock.now_s()))
    assert played.node().clock_skew_s == 0
    played.orchestrator.receive(session, Heartbeat(clock_s=played.clock.now_s() - 6))  # it came late
    assert played.node().clock_skew_s == 0
    assert played.store.writes == before


def test_a_node_that_was_stopped_is_told_from_one_that_is_lost(played: _Played) -> None:
    session, _ = played.join()
    played.orchestrator.receive(session, Goodbye())
    assert (played.node().is_connected, played.node().has_said_goodbye) == (False, True)
    assert ClusterOrchestrator(played.store, played.clock).nodes()[0].has_said_goodbye
    played.join()
    assert (played.node().is_connected, played.node().has_said_goodbye) == (True, False)
    played.pass_time(10)
    assert (played.node().is_connected, played.node().has_said_goodbye) == (False, False)


def test_a_second_hello_of_another_node_is_refused(played: _Played) -> None:
    session, _ = played.join()
    with pytest.raises(FlopsError) as caught:
        played.orchestrator.receive(session, Hello(node_id="n2", name="pi", facts=NodeFacts()))
    assert caught.value.code is ErrorCode.USAGE


def test_a_service_that_is_missing_on_its_node_is_started_again(played: _Played) -> None:
    session, _ = played.join()
    played.orchestrator.start_service(SPEC)
    played.orchestrator.receive(session, ServiceChanged(status=status(ServiceState.RUNNING)))
    _, link = played.join()
    assert link.last(Welcome).services == (SPEC,)
    assert link.last(Welcome).stopping == ()
    assert played.state() is ServiceState.PENDING


def test_an_ended_service_is_listed_but_not_run_again(played: _Played) -> None:
    session, _ = played.join()
    played.orchestrator.start_service(SPEC)
    played.orchestrator.receive(session, ServiceChanged(status=status(ServiceState.COMPLETED)))
    _, link = played.join(status(ServiceState.COMPLETED))
    assert (link.last(Welcome).services, link.last(Welcome).stopping) == ((SPEC,), ("s1",))


def test_commands_to_an_absent_node_are_in_the_next_welcome(played: _Played) -> None:
    session, _ = played.join()
    other = SPEC.model_copy(update={"id": ServiceId("s2")})
    for spec in (SPEC, other):
        played.orchestrator.start_service(spec)
        played.orchestrator.receive(session, ServiceChanged(status=status(ServiceState.RUNNING, spec.id)))
    played.orchestrator.disconnect(session)
    third = SPEC.model_copy(update={"id": ServiceId("s3")})
    played.orchestrator.start_service(third)
    played.orchestrator.stop_service(SPEC.id)
    played.orchestrator.remove_service(other.id)
    _, link = played.join(status(ServiceState.RUNNING), status(ServiceState.RUNNING, "s2"))
    assert link.last(Welcome).services == (SPEC, third)
    assert link.last(Welcome).stopping == ("s1",)


def test_a_stop_waits_for_a_node_that_may_come_back_soon(played: _Played) -> None:
    session, _ = played.join()
    played.orchestrator.start_service(SPEC)
    played.orchestrator.receive(session, ServiceChanged(status=status(ServiceState.RUNNING)))
    played.orchestrator.disconnect(session)
    played.orchestrator.stop_service(SPEC.id)
    assert played.state() is ServiceState.RUNNING
    played.pass_time(10)
    assert played.state() is ServiceState.STOPPED


def test_a_node_back_with_a_service_that_was_stopped_meanwhile_ends_it(played: _Played) -> None:
    session, _ = played.join()
    played.orchestrator.start_service(SPEC)
    played.orchestrator.receive(session, ServiceChanged(status=status(ServiceState.RUNNING)))
    played.pass_time(10)
    played.orchestrator.stop_service(SPEC.id)
    _, link = played.join(status(ServiceState.RUNNING))
    assert link.last(Welcome).stopping == ("s1",)
    assert played.state() is ServiceState.STOPPED


def test_a_stop_asked_twice_is_sent_twice(played: _Played) -> None:
    _, link = played.join()
    played.orchestrator.start_service(SPEC)
    played.orchestrator.stop_service(SPEC.id)
    played.orchestrator.stop_service(SPEC.id)
    assert [type(message) for message in link.sent[1:]] == [StartService, StopService, StopService]


def test_a_service_the_cluster_does_not_know_is_removed_from_the_node(played: _Played) -> None:
    session, link = played.join(status(ServiceState.RUNNING, "stray"))
    assert link.last(Welcome).services == ()
    assert len(link.sent) == 1
    played.orchestrator.receive(session, Heartbeat(services=(status(ServiceState.RUNNING, "stray"),)))
    assert link.last(RemoveService).service_id == "stray"


def test_a_node_cannot_speak_for_the_services_of_another(played: _Played) -> None:
    played.join()
    played.orchestrator.start_service(SPEC)
    intruder, link = played.join(node_id="n2")
    played.orchestrator.receive(intruder, ServiceChanged(status=status(ServiceState.FAILED)))
    event = ActorEventReport(service_id="s1", line=1, event={"kind": "failed"})
    played.orchestrator.receive(intruder, event)
    assert played.state() is ServiceState.PENDING
    assert played.kinds() == ["node", "node"]
    assert link.last(RemoveService).service_id == "s1"


def test_a_line_beyond_a_gap_is_not_taken(played: _Played) -> None:
    session, link = played.join()
    played.orchestrator.start_service(SPEC)
    for line, acknowledged in ((1, 1), (3, 1), (2, 2), (3, 3), (0, 3)):
        report = ActorEventReport(service_id="s1", line=line, event={"kind": "progress"})
        played.orchestrator.receive(session, report)
        assert link.last(Acknowledged).line == acknowledged


def test_a_node_is_lost_after_its_silence_and_within_ten_seconds(played: _Played) -> None:
    session, link = played.join()
    played.pass_time(7)
    played.orchestrator.receive(session, Heartbeat())
    played.pass_time(8, step_s=0.5)
    assert played.node().is_connected
    played.pass_time(1, step_s=0.5)
    assert not played.node().is_connected
    assert len(link.closed) == 1


def test_messages_of_a_connection_that_was_given_up_are_ignored(played: _Played) -> None:
    session, _ = played.join()
    played.orchestrator.start_service(SPEC)
    played.orchestrator.receive(session, Goodbye())
    played.orchestrator.receive(session, ServiceChanged(status=status(ServiceState.RUNNING)))
    played.orchestrator.disconnect(session)
    assert not played.node().is_connected
    assert played.state() is ServiceState.PENDING


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0], ids=["forward", "backward"])
def test_a_machine_that_slept_or_whose_clock_was_set_loses_no_node(played: _Played, jump_s: float) -> None:
    played.join()
    played.pass_time(2)
    played.clock.time_s += jump_s
    played.orchestrator.tick()
    played.pass_time(5)
    assert played.node().is_connected
    played.pass_time(3)
    assert not played.node().is_connected


def test_after_a_restart_nodes_have_time_to_come_back(played: _Played) -> None:
    session, _ = played.join()
    played.orchestrator.start_service(SPEC)
    played.orchestrator.receive(session, ServiceChanged(status=status(ServiceState.RUNNING)))
    before = played.orchestrator.events(after=0)
    played.clock.time_s += 3600
    played.orchestrator = ClusterOrchestrator(played.store, played.clock)
    played.pass_time(7)
    played.join(status(ServiceState.RUNNING))
    assert played.orchestrator.events(after=0) == before
    played.pass_time(10)
    assert played.kinds() == ["node", "service", "service", "node"]
    assert played.state() is ServiceState.LOST
