"""Nodes, services and event-log positions of a cluster: held in memory, written through to the store."""

from __future__ import annotations

from collections import deque
from typing import Any

from flops.core.cluster import ClusterEvent, Node, NodeLoad, Service, ServiceSpec, ServiceState, ServiceStatus
from flops.core.ids import NodeId, ServiceId
from flops.ports import Clock, ClusterStore

_SKEWS_KEPT = 3


class ClusterRecords:
    """Reads come from memory; each change is in the store before it is in memory.

    What changes with every heartbeat (load, last seen, clock skew, usage) is in memory only. Not thread-safe:
    its owner holds a lock.

    Args:
        store: what survives a restart.
        clock: stamps records and events.
    """

    def __init__(self, store: ClusterStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.nodes: dict[NodeId, Node] = {node.id: node for node in store.nodes()}
        self.services: dict[ServiceId, Service] = {s.spec.id: s for s in store.services()}
        self.lines: dict[str, int] = store.last_lines()
        self._skews: dict[NodeId, deque[float]] = {}
        self.appended = 0  # events since this object was made

    def services_of(self, node_id: NodeId) -> list[Service]:
        """Services placed on a node, oldest first."""
        return [service for service in self.services.values() if service.spec.node_id == node_id]

    def put_node(self, node: Node) -> None:
        """Store a node when it differs in what is kept, with an event when it came or went."""
        known = self.nodes.get(node.id)
        if known is None or known.is_connected != node.is_connected:
            payload = {"node_id": node.id, "is_connected": node.is_connected}
            self._append(
                ClusterEvent(seq=0, kind="node", time_s=0, node_id=node.id, payload=payload), node=node
            )
        elif _kept(known) != _kept(node):
            self._store.put_node(node)
        self.nodes[node.id] = node

    def remove_node(self, node_id: NodeId) -> None:
        """Forget a node; its services stay."""
        self._store.remove_node(node_id)
        self.nodes.pop(node_id, None)
        self._skews.pop(node_id, None)

    def add_service(self, spec: ServiceSpec) -> None:
        """Store a new service as pending."""
        now_s = self._clock.now_s()
        service = Service(
            spec=spec,
            status=ServiceStatus(service_id=spec.id, state=ServiceState.PENDING),
            created_at_s=now_s,
            updated_at_s=now_s,
        )
        self._store.put_service(service)
        self.services[spec.id] = service

    def ask_to_stop(self, service: Service) -> None:
        """Store that a service should not run."""
        if service.should_run:
            changed = service.model_copy(update={"should_run": False, "updated_at_s": self._clock.now_s()})
            self._store.put_service(changed)
            self.services[service.spec.id] = changed

    def put_status(self, service: Service, status: ServiceStatus | None) -> None:
        """Store a service's new status with its event; None changes nothing."""
        if status is None:
            return
        changed = service.model_copy(update={"status": status, "updated_at_s": self._clock.now_s()})
        self._append(_event_of(service, "service", status.model_dump(mode="json")), service=changed)
        self.services[service.spec.id] = changed

    def refresh_usage(self, status: ServiceStatus) -> None:
        """Remember what a service uses now, if its state is the known one."""
        service = self.services[status.service_id]
        if service.status.state is status.state and service.status.usage != status.usage:
            refreshed = service.status.model_copy(update={"usage": status.usage})
            self.services[status.service_id] = service.model_copy(update={"status": refreshed})

    def refresh_load(self, node_id: NodeId, load: NodeLoad, clock_s: float) -> None:
        """Remember a node's load, what its clock shows (0: not told), and that it was heard now."""
        now_s = self._clock.now_s()
        update = {"load": load, "last_seen_s": now_s, "clock_skew_s": self.skew_of(node_id, clock_s, now_s)}
        self.nodes[node_id] = self.nodes[node_id].model_copy(update=update)

    def skew_of(self, node_id: NodeId, clock_s: float, now_s: float) -> float | None:
        """How far a node's clock is ahead; None when it does not tell.

        A message that took long makes the clock look late, never early: the largest of a few counts.
        """
        if not clock_s:
            return None
        skews = self._skews.setdefault(node_id, deque(maxlen=_SKEWS_KEPT))
        skews.append(clock_s - now_s)
        return max(skews)

    def remove_service(self, service_id: ServiceId) -> None:
        """Forget a service."""
        self._store.remove_service(service_id)
        self.services.pop(service_id, None)
        self.lines.pop(service_id, None)

    def append_line(self, service: Service, line: int, event: dict[str, Any]) -> int:
        """Store a line of a service's event log if it is the next one; returns the last line stored."""
        last = self.lines.get(service.spec.id, 0)
        if line == last + 1:
            told = _event_of(service, "actor", event).model_copy(update={"line": line})
            self._append(told, dedup_key=f"{service.spec.id}:{line}")
            self.lines[service.spec.id] = last = line
        return last

    def _append(
        self,
        event: ClusterEvent,
        *,
        dedup_key: str | None = None,
        service: Service | None = None,
        node: Node | None = None,
    ) -> None:
        stamped = event.model_copy(update={"time_s": self._clock.now_s()})
        self._store.append_event(stamped, dedup_key=dedup_key, service=service, node=node)
        self.appended += 1


def _event_of(service: Service, kind: str, payload: dict[str, Any]) -> ClusterEvent:
    spec = service.spec
    return ClusterEvent(
        seq=0,
        kind=kind,
        time_s=0,
        project_id=spec.project_id,
        service_id=spec.id,
        node_id=spec.node_id,
        payload=payload,
    )


def _kept(node: Node) -> Node:
    return node.model_copy(update={"load": NodeLoad(), "last_seen_s": 0.0, "clock_skew_s": None})
