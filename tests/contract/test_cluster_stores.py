"""Both cluster stores keep the contract; the one in SQLite also keeps it over restarts."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.memory_cluster_store import MemoryClusterStore
from flops.adapters.sql_cluster_store import SqlClusterStore
from flops.core.cluster import ServiceState
from flops.errors import ErrorCode, FlopsError
from flops.ports import ClusterStore
from flops.testing.contracts.cluster_store import ClusterStoreContract, event, node, service


class TestMemoryClusterStore(ClusterStoreContract):
    @pytest.fixture
    def store(self) -> ClusterStore:
        return MemoryClusterStore()


class TestSqlClusterStore(ClusterStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[ClusterStore]:
        store = SqlClusterStore(tmp_path / "new" / "cluster.sqlite")
        yield store
        store.close()


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "cluster.sqlite"
    store = SqlClusterStore(path)
    store.put_node(node("a"))
    store.put_service(service("s1", ServiceState.RUNNING))
    first = store.append_event(event("actor", service_id="s1", line=1), dedup_key="k")
    store.close()

    store = SqlClusterStore(path)
    assert store.nodes() == [node("a")]
    assert store.services() == [service("s1", ServiceState.RUNNING)]
    assert store.events() == [first]
    assert store.last_lines() == {"s1": 1}
    assert store.append_event(event(), dedup_key="k") is None
    second = store.append_event(event())
    assert first is not None
    assert second is not None
    assert second.seq > first.seq
    store.close()


def test_a_file_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cluster.sqlite"
    SqlClusterStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE cluster_schema SET version = 99")
    connection.commit()
    connection.close()
    with pytest.raises(FlopsError) as caught:
        SqlClusterStore(path)
    assert caught.value.code is ErrorCode.CONFLICT
    assert str(path) in caught.value.message
    assert "99" in caught.value.message


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cluster.sqlite"
    path.write_bytes(b"certainly not a database" * 100)
    with pytest.raises(FlopsError) as caught:
        SqlClusterStore(path)
    assert caught.value.code is ErrorCode.INTERNAL
    assert str(path) in caught.value.message


def test_a_file_of_version_1_keeps_its_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "cluster.sqlite"
    store = SqlClusterStore(path)
    for line in (1, 2):
        store.append_event(event("actor", service_id="s1", line=line))
    store.close()
    connection = sqlite3.connect(path)
    connection.executescript("DROP TABLE cluster_lines; UPDATE cluster_schema SET version = 1")
    connection.close()

    store = SqlClusterStore(path)
    assert store.last_lines() == {"s1": 2}
    assert store.forget_events(1_000) == 2
    store.close()
    store = SqlClusterStore(path)
    assert store.last_lines() == {"s1": 2}
    store.close()


def test_the_file_of_a_log_that_is_forgotten_stops_growing(tmp_path: Path) -> None:
    path = tmp_path / "cluster.sqlite"
    store = SqlClusterStore(path)

    def live(rounds: int) -> int:
        for _ in range(rounds):
            for _ in range(40):
                last = store.append_event(event("service"))
            assert last is not None
            assert store.forget_events(last.seq) == 40
        with contextlib.closing(sqlite3.connect(path)) as connection:
            return int(connection.execute("PRAGMA page_count").fetchone()[0])

    first = live(3)
    assert live(10) == first
    store.close()
