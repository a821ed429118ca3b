"""Whatever nodes send, in whatever order, however often, through whatever restarts: the log stays true.

The machine keeps copies of messages and of ended connections, and delivers them again later. Its store
fails now and then, as one on a full disk does, and its orchestrator may be killed right there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flops.adapters.memory_cluster_store import MemoryClusterStore
from flops.core.cluster import (
    ClusterEvent,
    Node,
    NodeFacts,
    Service,
    ServiceKind,
    ServiceSpec,
    ServiceState,
    ServiceStatus,
)
from flops.core.ids import NodeId, ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.cluster import ClusterOrchestrator, NodeSession
from flops.testing.waiting import StandingClock
from flops.wire.node import (
    Acknowledged,
    ActorEventReport,
    FromCluster,
    FromNode,
    Goodbye,
    Heartbeat,
    Hello,
    ServiceChanged,
    Welcome,
)

NODES = ["n1", "n2"]
SERVICES = {"a1": "n1", "a2": "n1", "b1": "n2"}
STATUSES = st.builds(
    ServiceStatus,
    service_id=st.sampled_from([*SERVICES, "unknown"]),
    state=st.sampled_from(ServiceState),
    restarts=st.integers(0, 2),
    detail=st.sampled_from(["", "fetches", "builds"]),
)
STATUS_LISTS = st.lists(STATUSES, max_size=3).map(tuple)
MESSAGES = st.one_of(
    st.builds(ServiceChanged, status=STATUSES),
    st.builds(Heartbeat, services=STATUS_LISTS),
    st.builds(
        ActorEventReport,
        service_id=st.sampled_from([*SERVICES, "unknown"]),
        line=st.integers(0, 6),
        event=st.just({"kind": "progress"}),
    ),
    st.builds(Goodbye),
)


class _Link:
    def __init__(self) -> None:
        self.sent: list[FromCluster] = []

    def send(self, message: FromCluster) -> None:
        self.sent.append(message)

    def close(self, reason: str) -> None:
        pass


class _FailingStore(MemoryClusterStore):
    """Fails at the write that is `fails_in` writes away."""

    fails_in = -1

    def _write(self) -> None:
        self.fails_in -= 1
        if self.fails_in == 0:
            raise FlopsError(ErrorCode.DISK_FULL, "The disk is full.")

    def put_node(self, node: Node) -> None:
        self._write()
        super().put_node(node)

    def put_service(self, service: Service) -> None:
        self._write()
        super().put_service(service)

    def remove_service(self, service_id: ServiceId) -> None:
        self._write()
        super().remove_service(service_id)

    def append_event(self, event: ClusterEvent, **changes: Any) -> ClusterEvent | None:
        self._write()
        return super().append_event(event, **changes)


class ClusterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = StandingClock()
        self.store = _FailingStore()
        self.orchestrator = ClusterOrchestrator(self.store, self.clock)
        self.sessions: list[tuple[NodeSession, _Link]] = []  # of the running orchestrator, also ended ones
        self.delivered: list[FromNode] = []
        self.wanted: set[str] = set()  # started, not stopped, not removed
        self.removed: set[str] = set()
        self.final: dict[str, ServiceState] = {}

    @rule(node_id=st.sampled_from(NODES), services=STATUS_LISTS)
    def connect(self, node_id: str, services: tuple[ServiceStatus, ...]) -> None:
        link = _Link()
        hello = Hello(node_id=node_id, name=node_id, facts=NodeFacts(), services=services)
        try:
            self.sessions.append((self.orchestrator.connect(hello, link), link))
        except FlopsError:
            assert link.sent == []
            return
        (welcome,) = link.sent
        assert isinstance(welcome, Welcome)
        self._check_welcome(node_id, welcome)

    def _check_welcome(self, node_id: str, welcome: Welcome) -> None:
        listed = {spec.id for spec in welcome.services}
        known = {s.spec.id: s for s in self.orchestrator.services() if s.spec.node_id == node_id}
        assert listed == set(known)
        assert set(welcome.stopping) <= listed
        for service_id, service in known.items():
            should_run = service_id in self.wanted and not service.status.state.is_final
            assert should_run == (service_id not in welcome.stopping)
        lines = self.store.last_lines()
        assert welcome.acknowledged == {i: lines[i] for i in listed if i in lines}

    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        if self.sessions:
            session, _ = data.draw(st.sampled_from(self.sessions))
            self.orchestrator.disconnect(session)

    @rule(data=st.data(), message=MESSAGES)
    def say(self, data: st.DataObject, message: FromNode) -> None:
        if self.sessions:
            self.delivered.append(message)
            self._deliver(*data.draw(st.sampled_from(self.sessions)), message)

    @rule(data=st.data())
    def say_again(self, data: st.DataObject) -> None:
        if self.sessions and self.delivered:
            message = data.draw(st.sampled_from(self.delivered))
            self._deliver(*data.draw(st.sampled_from(self.sessions)), message)

    def _deliver(self, session: NodeSession, link: _Link, message: FromNode) -> None:
        before = len(link.sent)
        try:
            self.orchestrator.receive(session, message)
        except FlopsError:
            self.orchestrator.disconnect(session)  # as the server does
        for answer in link.sent[before:]:
            if isinstance(answer, Acknowledged):
                assert answer.line == self.store.last_lines().get(answer.service_id, 0)

    @rule(service_id=st.sampled_from(list(SERVICES)))
    def start_service(self, service_id: str) -> None:
        node_id = NodeId(SERVICES[service_id])
        is_known = any(s.spec.id == service_id for s in self.orchestrator.services())
        if service_id in self.removed or all(n.id != node_id for n in self.orchestrator.nodes()):
            return  # ids are never used twice
        spec = ServiceSpec(
            id=ServiceId(service_id), project_id="p", kind=ServiceKind.LEARNER, node_id=node_id
        )
        if not self._command(lambda: self.orchestrator.start_service(spec)):
            return
        if not is_known:
            self.wanted.add(service_id)

    @rule(service_id=st.sampled_from(list(SERVICES)))
    def stop_service(self, service_id: str) -> None:
        if self._command(lambda: self.orchestrator.stop_service(ServiceId(service_id))):
            self.wanted.discard(service_id)

    def _command(self, command: Callable[[], None]) -> bool:
        """Whether the command was carried out; the manager would give a failed one again."""
        try:
            command()
        except FlopsError:
            return False
        return True

    @rule(service_id=st.sampled_from(list(SERVICES)))
    def remove_service(self, service_id: str) -> None:
        is_known = any(s.spec.id == service_id for s in self.orchestrator.services())
        if is_known and self._command(lambda: self.orchestrator.remove_service(ServiceId(service_id))):
            self.wanted.discard(service_id)
            self.removed.add(service_id)

    @rule(steps=st.integers(1, 12))
    def let_time_pass(self, steps: int) -> None:
        for _ in range(steps):
            self.clock.time_s += 1
            self._command(self.orchestrator.tick)
        if steps >= 10 and self.store.fails_in < 0:  # nobody spoke, and nothing failed lately
            self._command(self.orchestrator.tick)
            assert not any(node.is_connected for node in self.orchestrator.nodes())

    @rule(writes=st.integers(1, 3))
    def let_the_disk_fill(self, writes: int) -> None:
        self.store.fails_in = writes

    @rule()
    def restart(self) -> None:
        before = self.orchestrator.services(), self.orchestrator.events(after=0)
        self.orchestrator = ClusterOrchestrator(self.store, self.clock)
        self.sessions.clear()
        after = self.orchestrator.services(), self.orchestrator.events(after=0)
        assert [_lasting(s.status) for s in after[0]] == [_lasting(s.status) for s in before[0]]
        assert after[1] == before[1]

    @invariant()
    def events_are_in_order_and_unique(self) -> None:
        events = self.orchestrator.events(after=0)
        sequence = [event.seq for event in events]
        assert sequence == sorted(set(sequence))
        told = [(event.service_id, event.line) for event in events if event.kind == "actor"]
        assert len(told) == len(set(told))
        for service_id in SERVICES:
            lines = [line for told_by, line in told if told_by == service_id]
            assert lines == list(range(1, len(lines) + 1))

    @invariant()
    def events_tell_what_is(self) -> None:
        last: dict[str, ServiceStatus] = {}
        is_connected: dict[str, bool] = {}
        for event in self.orchestrator.events(after=0):
            if event.kind == "service":
                status = ServiceStatus.model_validate(event.payload)
                known = last.get(event.service_id)
                assert known is None or not known.state.is_final, "a final state changed"
                assert known is None or _lasting(known) != _lasting(status), "an event told nothing new"
                last[event.service_id] = status
            elif event.kind == "node":
                assert is_connected.get(event.node_id, False) != event.payload["is_connected"]
                is_connected[event.node_id] = event.payload["is_connected"]
        for service in self.orchestrator.services():
            told = last.get(service.spec.id)
            if told is None:
                assert service.status.state is ServiceState.PENDING
            else:
                assert _lasting(told) == _lasting(service.status)
        assert {n.id: n.is_connected for n in self.orchestrator.nodes()} == is_connected

    @invariant()
    def stopped_services_of_absent_nodes_have_ended(self) -> None:
        absent = {node.id for node in self.orchestrator.nodes() if not node.is_connected}
        for service in self.orchestrator.services():
            if service.spec.node_id in absent and not service.should_run:
                assert service.status.state.is_final


def _lasting(status: ServiceStatus) -> ServiceStatus:
    return ServiceStatus(**{**status.model_dump(), "usage": {}})


TestClusterMachine = ClusterMachine.TestCase
TestClusterMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
