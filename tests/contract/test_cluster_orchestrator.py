"""The cluster orchestrator keeps the orchestrator's contract, over both stores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flops.adapters.memory_cluster_store import MemoryClusterStore
from flops.adapters.sql_cluster_store import SqlClusterStore
from flops.core.cluster import NodeFacts, ServiceStatus
from flops.core.ids import NodeId, ServiceId
from flops.core.output import piece_of
from flops.orchestrator.cluster import ClusterOrchestrator, NodeSession
from flops.ports import ClusterStore
from flops.testing.contracts.orchestrator import ClusterUnderTest, OrchestratorContract
from flops.testing.waiting import StandingClock
from flops.wire.node import (
    ActorEventReport,
    CommandResult,
    FetchLogs,
    FromCluster,
    FromNode,
    Hello,
    ServiceChanged,
)


class _PlayedNode:
    """A node's end of a connection, without a network between."""

    def __init__(self, cluster: _LinkedCluster, node_id: NodeId, name: str) -> None:
        self.cluster = cluster
        self.node_id = node_id
        self.name = name
        self.statuses: dict[str, ServiceStatus] = {}
        self.outputs: dict[str, str] = {}
        self.session: NodeSession | None = None

    def connect(self) -> None:
        hello = Hello(
            node_id=self.node_id,
            name=self.name,
            facts=NodeFacts(),
            services=tuple(self.statuses.values()),
        )
        self.session = self.cluster.orchestrator.connect(hello, self)

    def say(self, message: FromNode) -> None:
        assert self.session is not None
        self.cluster.orchestrator.receive(self.session, message)

    def send(self, message: FromCluster) -> None:
        if isinstance(message, FetchLogs):
            output = self.outputs.get(message.service_id, "").encode()
            piece = piece_of(
                lambda start, end: output[start:end],
                0,
                len(output),
                after=message.after,
                limit_bytes=message.tail_bytes,
            )
            answer = CommandResult(request_id=message.request_id, output=piece)
            self.cluster.later(lambda: self.say(answer))

    def close(self, reason: str) -> None:
        self.session = None


class _LinkedCluster:
    def __init__(self, store: ClusterStore) -> None:
        self._clock = StandingClock()
        self.orchestrator = ClusterOrchestrator(store, self._clock)
        self._nodes: dict[NodeId, _PlayedNode] = {}
        self._threads: list[threading.Thread] = []

    def later(self, action: Any) -> None:
        thread = threading.Thread(target=action)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        for thread in self._threads:
            thread.join(timeout=5)

    def join(self, node_id: NodeId, name: str) -> None:
        node = self._nodes.setdefault(node_id, _PlayedNode(self, node_id, name))
        node.connect()

    def leave(self, node_id: NodeId) -> None:
        session = self._nodes[node_id].session
        assert session is not None
        self.orchestrator.disconnect(session)
        for _ in range(10):
            self._clock.time_s += 1
            self.orchestrator.tick()

    def report(self, status: ServiceStatus) -> None:
        node = self._node_of(status.service_id)
        node.statuses[status.service_id] = status
        node.say(ServiceChanged(status=status))

    def tell(self, service_id: ServiceId, line: int, event: dict[str, Any]) -> None:
        self._node_of(service_id).say(ActorEventReport(service_id=service_id, line=line, event=event))

    def show_output(self, service_id: ServiceId, text: str) -> None:
        self._node_of(service_id).outputs[service_id] = text

    def _node_of(self, service_id: str) -> _PlayedNode:
        placed = [s.spec.node_id for s in self.orchestrator.services() if s.spec.id == service_id]
        return self._nodes[placed[0]] if placed else next(iter(self._nodes.values()))


class TestClusterOrchestratorInMemory(OrchestratorContract):
    @pytest.fixture
    def cluster(self) -> Iterator[ClusterUnderTest]:
        cluster = _LinkedCluster(MemoryClusterStore())
        yield cluster
        cluster.close()


class TestClusterOrchestratorInSqlite(OrchestratorContract):
    @pytest.fixture
    def cluster(self, tmp_path: Path) -> Iterator[ClusterUnderTest]:
        store = SqlClusterStore(tmp_path / "cluster.sqlite")
        cluster = _LinkedCluster(store)
        yield cluster
        cluster.close()
        store.close()
