"""Cluster stores against a model of dicts: any sequence of operations and restarts, same answers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flops.adapters.memory_cluster_store import MemoryClusterStore
from flops.adapters.sql_cluster_store import SqlClusterStore
from flops.core.cluster import ClusterEvent, Node, Service, ServiceState
from flops.core.ids import ServiceId
from flops.ports import ClusterStore
from flops.testing.contracts.cluster_store import event, node, service

IDS = st.sampled_from(["a", "b", "c"])
NODES = st.builds(node, IDS, name=st.text(max_size=3), is_connected=st.booleans())
SERVICES = st.builds(service, IDS, st.sampled_from(ServiceState))
EVENTS = st.one_of(
    st.builds(event, st.just("actor"), service_id=IDS, line=st.integers(1, 5)),
    st.builds(event, st.sampled_from(["node", "service"])),
)


class StoreMachine(RuleBasedStateMachine):
    store: ClusterStore

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[str, Node] = {}
        self.services: dict[str, Service] = {}
        self.events: list[ClusterEvent] = []
        self.keys: dict[str, int] = {}
        self.lines: dict[str, int] = {}
        self.last_seq = 0

    @rule(node=NODES)
    def put_node(self, node: Node) -> None:
        self.store.put_node(node)
        self.nodes[node.id] = node

    @rule(node_id=IDS)
    def remove_node(self, node_id: str) -> None:
        self.store.remove_node(node_id)
        self.nodes.pop(node_id, None)

    @rule(service=SERVICES)
    def put_service(self, service: Service) -> None:
        self.store.put_service(service)
        self.services[service.spec.id] = service

    @rule(service_id=IDS)
    def remove_service(self, service_id: str) -> None:
        self.store.remove_service(ServiceId(service_id))
        self.services.pop(service_id, None)
        self.lines.pop(service_id, None)

    @rule(up_to=st.integers(0, 20), limit=st.integers(1, 5))
    def forget_events(self, up_to: int, limit: int) -> None:
        gone = {e.seq for e in self.events[:limit] if e.seq <= up_to}
        assert self.store.forget_events(up_to, limit=limit) == len(gone)
        self.events = [e for e in self.events if e.seq not in gone]
        self.keys = {key: seq for key, seq in self.keys.items() if seq not in gone}

    @rule(
        event=EVENTS,
        key=st.none() | st.sampled_from(["k1", "k2", "k3"]),
        service=st.none() | SERVICES,
        node=st.none() | NODES,
    )
    def append_event(
        self, event: ClusterEvent, key: str | None, service: Service | None, node: Node | None
    ) -> None:
        stored = self.store.append_event(event, dedup_key=key, service=service, node=node)
        if key in self.keys:
            assert stored is None
            return
        assert stored is not None
        assert stored == event.model_copy(update={"seq": stored.seq})
        assert stored.seq > self.last_seq
        self.last_seq = stored.seq
        self.events.append(stored)
        if key is not None:
            self.keys[key] = stored.seq
        if event.kind == "actor":
            self.lines[event.service_id] = max(event.line, self.lines.get(event.service_id, 0))
        if service is not None:
            self.services[service.spec.id] = service
        if node is not None:
            self.nodes[node.id] = node

    @rule(position=st.integers(0, 20), limit=st.integers(1, 5))
    def read_events(self, position: int, limit: int) -> None:
        expected = [e for e in self.events if e.seq > position][:limit]
        assert self.store.events(after=position, limit=limit) == expected

    @invariant()
    def is_as_the_model(self) -> None:
        assert self.store.nodes() == list(self.nodes.values())
        assert self.store.services() == list(self.services.values())
        assert self.store.last_lines() == self.lines


class MemoryMachine(StoreMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryClusterStore()


class SqlMachine(StoreMachine):
    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "cluster.sqlite"
        self._sql = self.store = SqlClusterStore(self._path)

    @rule()
    def restart(self) -> None:
        self._sql.close()
        self._sql = self.store = SqlClusterStore(self._path)

    def teardown(self) -> None:
        self._sql.close()
        self._folder.cleanup()


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestSqlMachine = SqlMachine.TestCase
TestSqlMachine.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
