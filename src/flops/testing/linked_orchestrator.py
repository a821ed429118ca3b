"""The real cluster orchestrator with nodes that tests play, without a network between."""

from __future__ import annotations

import queue
import threading
from typing import Any

from flops.core.cluster import Node, ServiceState, ServiceStatus
from flops.core.ids import NodeId, ServiceId
from flops.orchestrator.cluster import ClusterOrchestrator, NodeSession
from flops.ports import Clock, ClusterStore
from flops.wire.node import (
    ActorEventReport,
    FromCluster,
    FromNode,
    Hello,
    RemoveService,
    ServiceChanged,
    StopService,
)


class LinkedOrchestrator(ClusterOrchestrator):
    """Its nodes end a service when they are asked to; all else they do when the test says so.

    `join`, `report` and `tell` are those of `flops.adapters.memory_orchestrator.MemoryOrchestrator`.

    Args:
        store: what survives a restart.
        clock: of the cluster.
    """

    def __init__(self, store: ClusterStore, clock: Clock) -> None:
        super().__init__(store, clock)
        self._links: dict[NodeId, _PlayedLink] = {}
        self._lines: dict[str, int] = {}

    def close(self) -> None:
        """End the nodes' threads."""
        for link in self._links.values():
            link.end()

    def join(self, node: Node) -> None:
        """Let a node connect, or say what it has now."""
        earlier = self._links.pop(node.id, None)
        if earlier is not None:
            earlier.end()
        hello = Hello(
            node_id=node.id,
            name=node.name,
            facts=node.facts,
            addons=node.addons,
            data_tags=node.data_tags,
            services=tuple(s.status for s in self.services() if s.spec.node_id == node.id),
        )
        link = self._links[node.id] = _PlayedLink(self)
        link.begin(self.connect(hello, link))

    def report(
        self,
        service_id: ServiceId,
        state: ServiceState,
        *,
        detail: str = "",
        exit_code: int | None = None,
        error: dict[str, Any] | None = None,
        restarts: int = 0,
    ) -> None:
        """Report a service's state, as its node would."""
        status = ServiceStatus(
            service_id=service_id,
            state=state,
            detail=detail,
            exit_code=exit_code,
            error=error,
            restarts=restarts,
        )
        self._say(service_id, ServiceChanged(status=status))

    def tell(self, service_id: ServiceId, kind: str, *, line: int | None = None, **fields: Any) -> None:
        """Append to a service's event log, as its process would; `line` repeats an earlier one."""
        number = self._lines.get(service_id, 0) + 1 if line is None else line
        self._lines[service_id] = number
        event = {"kind": kind, "time_s": self._clock.now_s(), **fields}
        self._say(service_id, ActorEventReport(service_id=service_id, line=number, event=event))

    def forget_lines(self, service_id: str) -> None:
        """The service was removed from its node."""
        self._lines.pop(service_id, None)

    def _say(self, service_id: ServiceId, message: FromNode) -> None:
        for service in self.services():
            if service.spec.id == service_id:
                self._links[service.spec.node_id].say(message)


class _PlayedLink:
    """A node's end of a connection; commands are obeyed on a thread of its own, as over a network."""

    def __init__(self, cluster: LinkedOrchestrator) -> None:
        self._cluster = cluster
        self._session: NodeSession | None = None
        self._commands: queue.SimpleQueue[FromCluster | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._obey, name="played-node", daemon=True)

    def begin(self, session: NodeSession) -> None:
        self._session = session
        self._thread.start()

    def end(self) -> None:
        self._commands.put(None)
        self._thread.join(5)

    def say(self, message: FromNode) -> None:
        assert self._session is not None
        self._cluster.receive(self._session, message)

    def send(self, message: FromCluster) -> None:
        self._commands.put(message)

    def close(self, reason: str) -> None:
        self._commands.put(None)

    def _obey(self) -> None:
        while (command := self._commands.get()) is not None:
            if isinstance(command, StopService):
                status = ServiceStatus(service_id=ServiceId(command.service_id), state=ServiceState.STOPPED)
                self.say(ServiceChanged(status=status))
            elif isinstance(command, RemoveService):
                self._cluster.forget_lines(command.service_id)
