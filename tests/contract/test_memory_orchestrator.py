"""The memory orchestrator keeps the orchestrator's contract."""

from __future__ import annotations

from typing import Any

import pytest

from flops.adapters.memory_orchestrator import MemoryOrchestrator
from flops.core.cluster import Node, ServiceStatus
from flops.core.ids import NodeId, ServiceId
from flops.testing.contracts.orchestrator import ClusterUnderTest, OrchestratorContract
from flops.testing.waiting import StandingClock


class _MemoryCluster:
    def __init__(self, *, nodes_obey: bool) -> None:
        self.orchestrator = MemoryOrchestrator(StandingClock(), nodes_obey=nodes_obey)

    def join(self, node_id: NodeId, name: str) -> None:
        self.orchestrator.join(Node(id=node_id, name=name))

    def leave(self, node_id: NodeId) -> None:
        self.orchestrator.leave(node_id)

    def report(self, status: ServiceStatus) -> None:
        self.orchestrator.report(
            status.service_id,
            status.state,
            detail=status.detail,
            exit_code=status.exit_code,
            error=status.error,
            restarts=status.restarts,
        )

    def tell(self, service_id: ServiceId, line: int, event: dict[str, Any]) -> None:
        fields = dict(event)
        self.orchestrator.tell(service_id, fields.pop("kind"), line=line, **fields)

    def show_output(self, service_id: ServiceId, text: str) -> None:
        self.orchestrator.logs[service_id] = text


class TestObedientMemoryOrchestrator(OrchestratorContract):
    @pytest.fixture
    def cluster(self) -> ClusterUnderTest:
        return _MemoryCluster(nodes_obey=True)


class TestMemoryOrchestrator(OrchestratorContract):
    @pytest.fixture
    def cluster(self) -> ClusterUnderTest:
        return _MemoryCluster(nodes_obey=False)
