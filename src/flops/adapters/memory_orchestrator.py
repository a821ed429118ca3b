"""A cluster in memory whose nodes are played by the caller: for tests of what stands on an orchestrator."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from flops.core.cluster import ClusterEvent, Node, Service, ServiceSpec, ServiceState, ServiceStatus
from flops.core.ids import NodeId, ServiceId
from flops.core.node_removal import check_removal, status_when_node_removed
from flops.core.output import Output, piece_of
from flops.errors import ErrorCode, FlopsError
from flops.ports import Clock

_ON_NODE = {ServiceState.PREPARING, ServiceState.RUNNING, ServiceState.RESTARTING}


class MemoryOrchestrator:
    """Implements `flops.ports.Orchestrator`; `join`, `leave`, `report` and `tell` play the nodes.

    Args:
        clock: stamps nodes, services and events.
        nodes_obey: nodes that are connected end a service at once when it is asked to stop. False leaves
            that to `report`.
    """

    def __init__(self, clock: Clock, *, nodes_obey: bool = True) -> None:
        self._clock = clock
        self._nodes_obey = nodes_obey
        self._lock = threading.RLock()
        self._nodes: dict[str, Node] = {}
        self._services: dict[ServiceId, Service] = {}
        self._events: list[ClusterEvent] = []
        self._last_seq = 0
        self._lines: dict[str, int] = {}
        self._wakes: list[Callable[[], None]] = []
        self.logs: dict[str, str] = {}  # service id -> output, as its node would send it

    # The port

    def nodes(self) -> list[Node]:
        """All nodes that have joined."""
        with self._lock:
            return list(self._nodes.values())

    def services(self, project_id: str | None = None) -> list[Service]:
        """All services, or those of one project."""
        with self._lock:
            return [s for s in self._services.values() if project_id in {None, s.spec.project_id}]

    def remove_node(self, node_id: NodeId, *, is_forced: bool = False) -> None:
        """Forget a node that has left.

        Raises:
            FlopsError: ``node_not_found``, ``conflict``.
        """
        with self._lock:
            if node_id not in self._nodes:
                raise FlopsError(ErrorCode.NODE_NOT_FOUND, f"Node {node_id} is unknown.")
            node = self._nodes[node_id]
            services = [s for s in self._services.values() if s.spec.node_id == node_id]
            alive = [service for service in services if not service.status.state.is_final]
            check_removal(node, alive, is_forced=is_forced)
            for service in alive:
                self._put_status(status_when_node_removed(service, node.name))
            del self._nodes[node_id]
        self._wake()

    def start_service(self, spec: ServiceSpec) -> None:
        """Record a service as pending; the caller reports what becomes of it.

        Raises:
            FlopsError: ``node_not_found``.
        """
        with self._lock:
            if spec.node_id not in self._nodes:
                raise FlopsError(
                    ErrorCode.NODE_NOT_FOUND, f"Node {spec.node_id}, which should run {spec.id}, is unknown."
                )
            if spec.id not in self._services:
                now_s = self._clock.now_s()
                status = ServiceStatus(service_id=spec.id, state=ServiceState.PENDING)
                self._services[spec.id] = Service(
                    spec=spec, status=status, created_at_s=now_s, updated_at_s=now_s
                )

    def stop_service(self, service_id: ServiceId) -> None:
        """Ask for a service's end; it has ended at once when its node is away or obeys."""
        with self._lock:
            service = self._services.get(service_id)
            if service is None:
                return
            self._services[service_id] = service.model_copy(update={"should_run": False})
            node = self._nodes.get(service.spec.node_id)
            if self._nodes_obey or node is None or not node.is_connected:
                self._take_in(service_id, ServiceState.STOPPED, "asked to stop")
        self._wake()

    def remove_service(self, service_id: ServiceId) -> None:
        """Stop and forget a service."""
        with self._lock:
            if service_id in self._services:
                self._take_in(service_id, ServiceState.STOPPED, "removed")
                del self._services[service_id]
                self._lines.pop(service_id, None)
        self._wake()

    def service_logs(
        self, service_id: ServiceId, *, after: int | None = None, tail_bytes: int = 65_536
    ) -> Output:
        """What follows a place in what stands in `logs`, or its end.

        Raises:
            FlopsError: ``service_not_found``, ``node_lost``.
        """
        with self._lock:
            service = self._services.get(service_id)
            if service is None:
                raise FlopsError(ErrorCode.SERVICE_NOT_FOUND, f"Service {service_id} does not exist.")
            node = self._nodes.get(service.spec.node_id)
            if node is None:
                raise FlopsError(ErrorCode.NODE_LOST, f"The node that had {service_id} was removed.")
            if not node.is_connected:
                raise FlopsError(ErrorCode.NODE_LOST, f"Node {node.name}, which has {service_id}, is away.")
            output = self.logs.get(service_id, "").encode()
        return piece_of(
            lambda start, end: output[start:end], 0, len(output), after=after, limit_bytes=tail_bytes
        )

    def events(self, *, after: int) -> list[ClusterEvent]:
        """Events with a `seq` above `after`, in order."""
        with self._lock:
            return [event for event in self._events if event.seq > after]

    def forget_events(self, up_to: int) -> int:
        """Remove the events with a `seq` of `up_to` or less."""
        with self._lock:
            before = len(self._events)
            self._events = [event for event in self._events if event.seq > up_to]
            return before - len(self._events)

    def on_event(self, wake: Callable[[], None]) -> None:
        """Have `wake` called after new events."""
        self._wakes.append(wake)

    # The nodes' part

    def join(self, node: Node) -> None:
        """Let a node connect, or say what it has now."""
        with self._lock:
            known = self._nodes.get(node.id)
            now_s = self._clock.now_s()
            joined_at_s = known.joined_at_s if known else now_s
            self._nodes[node.id] = node.model_copy(
                update={"is_connected": True, "joined_at_s": joined_at_s, "last_seen_s": now_s}
            )
            if known is None or not known.is_connected:
                self._append("node", node_id=node.id, payload={"node_id": node.id, "is_connected": True})
        self._wake()

    def leave(self, node_id: NodeId) -> None:
        """Let a node vanish, with all its running services."""
        with self._lock:
            node = self._nodes[node_id]
            if node.is_connected:
                self._nodes[node_id] = node.model_copy(update={"is_connected": False})
                self._append("node", node_id=node_id, payload={"node_id": node_id, "is_connected": False})
                for service_id, service in list(self._services.items()):
                    if service.spec.node_id != node_id:
                        continue
                    if not service.should_run:
                        self._take_in(service_id, ServiceState.STOPPED, "its node is away")
                    elif service.status.state in _ON_NODE:
                        self._take_in(service_id, ServiceState.LOST, "its node is away")
        self._wake()

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
        with self._lock:
            status = ServiceStatus(
                service_id=service_id,
                state=state,
                detail=detail,
                exit_code=exit_code,
                error=error,
                restarts=restarts,
            )
            self._put_status(status)
        self._wake()

    def tell(self, service_id: ServiceId, kind: str, *, line: int | None = None, **fields: Any) -> None:
        """Append to a service's event log, as its process would; `line` repeats an earlier one."""
        with self._lock:
            service = self._services.get(service_id)
            last = self._lines.get(service_id, 0)
            number = last + 1 if line is None else line
            if service is None or number != last + 1:
                return
            self._lines[service_id] = number
            payload = {"kind": kind, "time_s": self._clock.now_s(), **fields}
            self._append("actor", service=service, line=number, payload=payload)
        self._wake()

    def _take_in(self, service_id: ServiceId, state: ServiceState, detail: str) -> None:
        known = self._services[service_id].status
        self._put_status(known.model_copy(update={"state": state, "detail": detail}))

    def _put_status(self, status: ServiceStatus) -> None:
        service = self._services.get(status.service_id)
        if service is None or service.status.state.is_final or service.status == status:
            return
        changed = service.model_copy(update={"status": status, "updated_at_s": self._clock.now_s()})
        self._services[status.service_id] = changed
        self._append("service", service=changed, payload=status.model_dump(mode="json"))

    def _append(
        self,
        kind: str,
        *,
        payload: dict[str, Any],
        service: Service | None = None,
        node_id: str = "",
        line: int = 0,
    ) -> None:
        self._last_seq += 1
        self._events.append(
            ClusterEvent(
                seq=self._last_seq,
                kind=kind,
                time_s=self._clock.now_s(),
                project_id=service.spec.project_id if service else "",
                service_id=service.spec.id if service else "",
                node_id=service.spec.node_id if service else node_id,
                line=line,
                payload=payload,
            )
        )

    def _wake(self) -> None:
        for wake in self._wakes:
            wake()
