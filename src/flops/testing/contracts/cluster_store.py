"""What every `flops.ports.ClusterStore` does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from flops.core.cluster import (
    ClusterEvent,
    Node,
    Service,
    ServiceKind,
    ServiceSpec,
    ServiceState,
    ServiceStatus,
)
from flops.core.ids import NodeId, ServiceId
from flops.ports import ClusterStore


def node(node_id: str, *, name: str = "", is_connected: bool = True) -> Node:
    """A node for tests."""
    return Node(id=NodeId(node_id), name=name or node_id, is_connected=is_connected)


def service(service_id: str, state: ServiceState = ServiceState.PENDING) -> Service:
    """A service for tests."""
    spec = ServiceSpec(
        id=ServiceId(service_id),
        project_id="p1",
        kind=ServiceKind.LEARNER,
        node_id=NodeId("n1"),
        config={"nested": {"list": [1, 2.5, None, "ü"]}},
    )
    return Service(spec=spec, status=ServiceStatus(service_id=spec.id, state=state))


def event(kind: str = "node", *, service_id: str = "", line: int = 0) -> ClusterEvent:
    """An event for tests."""
    return ClusterEvent(
        seq=0, kind=kind, time_s=12.5, service_id=service_id, line=line, payload={"message": "grüße", "n": 1}
    )


class ClusterStoreContract:
    """Subclass it, and provide the fixture `store`."""

    @pytest.fixture
    def store(self) -> ClusterStore:
        raise NotImplementedError

    def test_a_new_store_is_empty(self, store: ClusterStore) -> None:
        assert (store.nodes(), store.services(), store.events(), store.last_lines()) == ([], [], [], {})

    def test_nodes_keep_the_order_in_which_they_joined(self, store: ClusterStore) -> None:
        store.put_node(node("b"))
        store.put_node(node("a"))
        store.put_node(node("b", name="renamed", is_connected=False))
        assert store.nodes() == [node("b", name="renamed", is_connected=False), node("a")]

    def test_nodes_can_be_removed(self, store: ClusterStore) -> None:
        store.put_node(node("a"))
        store.put_node(node("b"))
        store.remove_node("a")
        store.remove_node("a")
        assert store.nodes() == [node("b")]

    def test_services_keep_their_order(self, store: ClusterStore) -> None:
        store.put_service(service("s2"))
        store.put_service(service("s1"))
        store.put_service(service("s2", ServiceState.RUNNING))
        assert store.services() == [service("s2", ServiceState.RUNNING), service("s1")]

    def test_services_can_be_removed(self, store: ClusterStore) -> None:
        store.put_service(service("s1"))
        store.put_service(service("s2"))
        store.remove_service(ServiceId("s1"))
        store.remove_service(ServiceId("s1"))
        assert store.services() == [service("s2")]

    def test_events_get_growing_numbers(self, store: ClusterStore) -> None:
        first = store.append_event(event())
        second = store.append_event(event("service"))
        assert first is not None
        assert second is not None
        assert 0 < first.seq < second.seq
        assert first == event().model_copy(update={"seq": first.seq})
        assert store.events() == [first, second]

    def test_events_are_read_in_pages(self, store: ClusterStore) -> None:
        for _ in range(5):
            store.append_event(event())
        page = store.events(limit=2)
        rest = store.events(after=page[-1].seq)
        assert (len(page), len(rest)) == (2, 3)
        assert store.events(after=rest[-1].seq) == []
        assert page + rest == store.events()

    def test_an_event_with_a_known_key_changes_nothing(self, store: ClusterStore) -> None:
        assert store.append_event(event(), dedup_key="k") is not None
        repeated = store.append_event(event(), dedup_key="k", service=service("s1"), node=node("a"))
        assert repeated is None
        assert store.append_event(event(), dedup_key="other") is not None
        assert store.append_event(event()) is not None
        assert store.append_event(event()) is not None
        assert (len(store.events()), store.services(), store.nodes()) == (4, [], [])

    def test_an_event_is_stored_with_what_it_changed(self, store: ClusterStore) -> None:
        store.put_service(service("s1"))
        store.append_event(event(), service=service("s1", ServiceState.RUNNING), node=node("a"))
        assert store.services() == [service("s1", ServiceState.RUNNING)]
        assert store.nodes() == [node("a")]

    def test_the_last_line_of_each_event_log_is_known(self, store: ClusterStore) -> None:
        for service_id, line in (("s1", 1), ("s2", 1), ("s1", 2)):
            store.append_event(event("actor", service_id=service_id, line=line))
        store.append_event(event("service", service_id="s3"))
        assert store.last_lines() == {"s1": 2, "s2": 1}

    def test_forgotten_events_leave_lines_and_numbers(self, store: ClusterStore) -> None:
        told = [
            store.append_event(event("actor", service_id="s1", line=line), dedup_key=f"s1:{line}")
            for line in (1, 2, 3)
        ]
        assert told[1] is not None
        assert store.forget_events(told[1].seq, limit=1) == 1
        assert store.forget_events(told[1].seq) == 1
        assert store.forget_events(told[1].seq) == 0
        assert store.events() == [told[2]]
        assert store.last_lines() == {"s1": 3}
        assert store.append_event(event(), dedup_key="s1:3") is None
        newest = store.append_event(event())
        assert told[2] is not None
        assert newest is not None
        assert store.forget_events(newest.seq) == 2
        later = store.append_event(event())
        assert later is not None
        assert later.seq > newest.seq

    def test_a_removed_service_has_no_last_line(self, store: ClusterStore) -> None:
        store.append_event(event("actor", service_id="s1", line=1), service=service("s1"))
        store.remove_service(ServiceId("s1"))
        assert store.last_lines() == {}

    def test_several_threads_append_without_loss(self, store: ClusterStore) -> None:
        start = threading.Barrier(4)

        def append(thread: int) -> None:
            start.wait(timeout=10)
            for number in range(10):
                store.append_event(event(), dedup_key=f"{thread}-{number % 8}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(append, range(4)))
        sequence = [e.seq for e in store.events()]
        assert len(sequence) == 32
        assert sequence == sorted(set(sequence))
