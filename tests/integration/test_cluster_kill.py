"""A cluster that is killed at any moment, and started again, loses nothing that it acknowledged."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from flops.adapters.sql_cluster_store import SqlClusterStore
from flops.core.cluster import NodeFacts, Service, ServiceKind, ServiceSpec, ServiceState, ServiceStatus
from flops.core.ids import NodeId, ServiceId
from flops.wire.node import (
    FROM_CLUSTER,
    Acknowledged,
    ActorEventReport,
    Heartbeat,
    Hello,
    ServiceChanged,
    Welcome,
)

CLUSTER = """
import sys, threading
from pathlib import Path
from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.sql_cluster_store import SqlClusterStore
from flops.adapters.system_clock import SystemClock
from flops.orchestrator.app import build_app
from flops.orchestrator.cluster import ClusterOrchestrator
from flops.adapters.http_server import HttpServer

orchestrator = ClusterOrchestrator(SqlClusterStore(Path(sys.argv[1])), SystemClock())
server = HttpServer(build_app(orchestrator, MemoryBlobs()), "127.0.0.1", 0)
server.start()
print(server.port, flush=True)
threading.Event().wait()
"""
SERVICE = ServiceId("s1")
SPEC = ServiceSpec(id=SERVICE, project_id="p1", kind=ServiceKind.AGGREGATOR, node_id=NodeId("n1"))


class KillableCluster:
    def __init__(self, database: Path) -> None:
        self._database = database
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> int:
        source = Path(__file__).resolve().parents[2] / "src"
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(self._database)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=source,
        )
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KillableCluster]:
    cluster = KillableCluster(tmp_path / "cluster.sqlite")
    yield cluster
    cluster.kill()


def _join(connection: ClientConnection, state: ServiceState) -> Welcome:
    status = ServiceStatus(service_id=SERVICE, state=state)
    hello = Hello(node_id="n1", name="pi", facts=NodeFacts(), services=(status,))
    connection.send(hello.model_dump_json())
    welcome = FROM_CLUSTER.validate_json(connection.recv(timeout=10))
    assert isinstance(welcome, Welcome)
    return welcome


def _report_until_killed(connection: ClientConnection, line: int, cluster: KillableCluster) -> int:
    """Send lines without waiting, kill the cluster in between; returns the last line acknowledged."""
    acknowledged = line
    try:
        for number in range(line + 1, line + 61):
            event = {"kind": "progress", "message": f"line {number}"}
            report = ActorEventReport(service_id=SERVICE, line=number, event=event)
            connection.send(report.model_dump_json())
            state = ServiceState.RUNNING if number % 2 else ServiceState.PREPARING
            changed = ServiceChanged(status=ServiceStatus(service_id=SERVICE, state=state))
            connection.send(changed.model_dump_json())
            if number == line + 30:
                message = FROM_CLUSTER.validate_json(connection.recv(timeout=10))
                assert isinstance(message, Acknowledged)
                acknowledged = message.line
                cluster.kill()
        while True:
            message = FROM_CLUSTER.validate_json(connection.recv(timeout=10))
            assert isinstance(message, Acknowledged)
            acknowledged = message.line
    except ConnectionClosed:
        return acknowledged


def test_nothing_acknowledged_is_lost_and_nothing_is_told_twice(
    cluster: KillableCluster, tmp_path: Path
) -> None:
    store = SqlClusterStore(tmp_path / "cluster.sqlite")
    status = ServiceStatus(service_id=SERVICE, state=ServiceState.PENDING)
    store.put_service(Service(spec=SPEC, status=status))
    acknowledged = 0
    for _ in range(4):
        port = cluster.start()
        with connect(f"ws://127.0.0.1:{port}/api/node/link", proxy=None, close_timeout=1) as connection:
            welcome = _join(connection, ServiceState.RUNNING)
            known = welcome.acknowledged.get(SERVICE, 0)
            assert welcome.services == (SPEC,)
            assert known >= acknowledged
            acknowledged = _report_until_killed(connection, known, cluster)

    events = store.events()
    lines = [event.line for event in events if event.kind == "actor"]
    assert lines == list(range(1, len(lines) + 1))
    assert len(lines) >= acknowledged > 0
    messages = [event.payload["message"] for event in events if event.kind == "actor"]
    assert messages == [f"line {line}" for line in lines]
    states = [event.payload["state"] for event in events if event.kind == "service"]
    assert all(one != other for one, other in itertools.pairwise(states))
    assert store.services()[0].status.state == states[-1]
    assert [event.payload["is_connected"] for event in events if event.kind == "node"] == [True]
    store.close()


def test_a_node_that_does_not_come_back_after_a_restart_is_noticed(
    cluster: KillableCluster, tmp_path: Path
) -> None:
    port = cluster.start()
    with connect(f"ws://127.0.0.1:{port}/api/node/link", proxy=None, close_timeout=1) as connection:
        _join(connection, ServiceState.RUNNING)
        connection.send(Heartbeat().model_dump_json())
        cluster.kill()
    started_at_s = time.monotonic()
    cluster.start()
    store = SqlClusterStore(tmp_path / "cluster.sqlite")
    while store.nodes()[0].is_connected:
        assert time.monotonic() - started_at_s < 12
        time.sleep(0.05)
    assert time.monotonic() - started_at_s > 7
    store.close()
