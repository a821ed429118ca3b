"""What a cluster must not forget, in memory: for tests, and for clusters that live as long as a process."""

from __future__ import annotations

import threading

from flops.core.cluster import ClusterEvent, Node, Service
from flops.core.ids import ServiceId


class MemoryClusterStore:
    """Implements `flops.ports.ClusterStore`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nodes: dict[str, Node] = {}
        self._services: dict[str, Service] = {}
        self._events: list[ClusterEvent] = []
        self._last_seq = 0
        self._dedup_keys: dict[str, int] = {}  # key -> seq
        self._lines: dict[str, int] = {}

    def put_node(self, node: Node) -> None:
        """Store a node, replacing an earlier record of the same id."""
        with self._lock:
            self._nodes[node.id] = node

    def nodes(self) -> list[Node]:
        """All nodes, in the order they joined."""
        with self._lock:
            return list(self._nodes.values())

    def remove_node(self, node_id: str) -> None:
        """Forget a node."""
        with self._lock:
            self._nodes.pop(node_id, None)

    def put_service(self, service: Service) -> None:
        """Store a service, replacing an earlier record of the same id."""
        with self._lock:
            self._services[service.spec.id] = service

    def services(self) -> list[Service]:
        """All services, oldest first."""
        with self._lock:
            return list(self._services.values())

    def remove_service(self, service_id: ServiceId) -> None:
        """Forget a service."""
        with self._lock:
            self._services.pop(service_id, None)
            self._lines.pop(service_id, None)

    def append_event(
        self,
        event: ClusterEvent,
        *,
        dedup_key: str | None = None,
        service: Service | None = None,
        node: Node | None = None,
    ) -> ClusterEvent | None:
        """Append an event with what it changed; None when `dedup_key` was appended before."""
        with self._lock:
            if dedup_key is not None and dedup_key in self._dedup_keys:
                return None
            self._last_seq += 1
            if dedup_key is not None:
                self._dedup_keys[dedup_key] = self._last_seq
            stored = event.model_copy(update={"seq": self._last_seq})
            self._events.append(stored)
            if stored.kind == "actor":
                self._lines[stored.service_id] = max(stored.line, self._lines.get(stored.service_id, 0))
            if service is not None:
                self._services[service.spec.id] = service
            if node is not None:
                self._nodes[node.id] = node
            return stored

    def events(self, *, after: int = 0, limit: int = 1000) -> list[ClusterEvent]:
        """Events with a `seq` above `after`, in order."""
        with self._lock:
            return [event for event in self._events if event.seq > after][:limit]

    def last_lines(self) -> dict[str, int]:
        """Per service that was not removed, the highest `line` among its ``actor`` events."""
        with self._lock:
            return dict(self._lines)

    def forget_events(self, up_to: int, *, limit: int = 1000) -> int:
        """Remove the oldest events with a `seq` of `up_to` or less, `limit` at most; returns how many."""
        with self._lock:
            gone = {event.seq for event in self._events[:limit] if event.seq <= up_to}
            self._events = [event for event in self._events if event.seq not in gone]
            self._dedup_keys = {key: seq for key, seq in self._dedup_keys.items() if seq not in gone}
            return len(gone)
