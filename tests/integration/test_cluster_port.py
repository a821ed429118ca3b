"""The cluster's port over real sockets: nodes' connections and blobs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.http_server import HttpServer
from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.sql_cluster_store import SqlClusterStore
from flops.core.cluster import NodeFacts, ServiceKind, ServiceSpec, ServiceState, ServiceStatus
from flops.core.ids import NodeId, ServiceId
from flops.core.output import Output
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.app import build_app
from flops.orchestrator.cluster import ClusterOrchestrator
from flops.testing import waiting
from flops.wire.node import (
    FROM_CLUSTER,
    Acknowledged,
    ActorEventReport,
    CommandResult,
    FetchLogs,
    FromCluster,
    FromNode,
    Goodbye,
    Heartbeat,
    Hello,
    Refused,
    RemoveService,
    ServiceChanged,
    StartService,
    StopService,
    Welcome,
)

T = TypeVar("T")
NODE = NodeId("n1")
MAX_BLOB_BYTES = 3_000_000


class _Clock:
    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now_s(self) -> float:
        return time.monotonic() + self.ahead_s


class Cluster:
    """A served cluster orchestrator; `restart` starts it anew on the same files and port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.clock = _Clock()
        self.port = 0
        self._start()
        self.url = f"http://127.0.0.1:{self.port}"

    def _start(self) -> None:
        self.store = SqlClusterStore(self._folder / "cluster.sqlite")
        self.orchestrator = ClusterOrchestrator(self.store, self.clock, logs_timeout_s=0.5)
        blobs = FileBlobs(self._folder / "blobs")
        app = build_app(self.orchestrator, blobs, max_blob_bytes=MAX_BLOB_BYTES)
        self._server = HttpServer(app, "127.0.0.1", self.port)
        self._server.start()
        self.port = self._server.port

    def close(self) -> None:
        self._server.close()
        self.store.close()

    def restart(self) -> None:
        self.close()
        self._start()

    def dial(self, **options: Any) -> ClientConnection:
        return connect(
            f"ws://127.0.0.1:{self.port}/api/node/link",
            proxy=None,
            close_timeout=1,
            compression=None,
            **options,
        )

    @contextlib.contextmanager
    def node(self, node_id: str = NODE, *services: ServiceStatus) -> Iterator[Played]:
        with self.dial() as connection:
            node = Played(connection)
            node.say(Hello(node_id=node_id, name=f"name-{node_id}", facts=NodeFacts(), services=services))
            node.welcome = node.expect(Welcome)
            yield node

    def state(self, service_id: str = "s1") -> ServiceState | None:
        return next((s.status.state for s in self.orchestrator.services() if s.spec.id == service_id), None)

    def is_connected(self) -> bool:
        return self.orchestrator.nodes()[0].is_connected


class Played:
    """A node's end of a connection."""

    welcome: Welcome

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def say(self, message: FromNode) -> None:
        self.connection.send(message.model_dump_json())

    def hear(self) -> FromCluster:
        return FROM_CLUSTER.validate_json(self.connection.recv(timeout=5))

    def expect(self, kind: type[T]) -> T:
        message = self.hear()
        assert isinstance(message, kind), message
        return message


until = functools.partial(waiting.until, timeout_s=10.0)


def spec(service_id: str = "s1") -> ServiceSpec:
    return ServiceSpec(id=ServiceId(service_id), project_id="p1", kind=ServiceKind.LEARNER, node_id=NODE)


def running(service_id: str = "s1") -> ServiceStatus:
    return ServiceStatus(service_id=ServiceId(service_id), state=ServiceState.RUNNING)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


# Nodes


def test_a_service_is_started_reported_and_stopped(cluster: Cluster) -> None:
    with cluster.node() as node:
        assert (node.welcome.services, node.welcome.stopping, node.welcome.acknowledged) == ((), (), {})
        cluster.orchestrator.start_service(spec())
        assert node.expect(StartService).spec == spec()
        node.say(ServiceChanged(status=running()))
        until(lambda: cluster.state() is ServiceState.RUNNING)
        node.say(ActorEventReport(service_id="s1", line=1, event={"kind": "progress"}))
        assert node.expect(Acknowledged).line == 1
        cluster.orchestrator.stop_service(ServiceId("s1"))
        assert node.expect(StopService).service_id == "s1"
        cluster.orchestrator.remove_service(ServiceId("s1"))
        assert node.expect(RemoveService).service_id == "s1"


def test_messages_keep_their_order(cluster: Cluster) -> None:
    with cluster.node() as node:
        cluster.orchestrator.start_service(spec())
        node.expect(StartService)
        for line in range(1, 201):
            node.say(ActorEventReport(service_id="s1", line=line, event={"kind": "progress", "n": line}))
        assert [node.expect(Acknowledged).line for _ in range(200)] == list(range(1, 201))
    events = [e for e in cluster.orchestrator.events(after=0) if e.kind == "actor"]
    assert [e.payload["n"] for e in events] == list(range(1, 201))


def test_a_restart_of_the_cluster_loses_and_repeats_nothing(cluster: Cluster) -> None:
    with cluster.node() as node:
        cluster.orchestrator.start_service(spec())
        node.expect(StartService)
        node.say(ServiceChanged(status=running()))
        node.say(ActorEventReport(service_id="s1", line=1, event={"kind": "progress"}))
        node.expect(Acknowledged)
        before = cluster.orchestrator.events(after=0)
        cluster.restart()
        with pytest.raises(ConnectionClosed):
            node.hear()
    assert cluster.is_connected()
    with cluster.node(NODE, running()) as node:
        assert node.welcome.services == (spec(),)
        assert node.welcome.acknowledged == {"s1": 1}
        node.say(ActorEventReport(service_id="s1", line=1, event={"kind": "progress"}))
        assert node.expect(Acknowledged).line == 1
        assert cluster.orchestrator.events(after=0) == before
        node.say(ActorEventReport(service_id="s1", line=2, event={"kind": "progress"}))
        assert node.expect(Acknowledged).line == 2
        assert len(cluster.orchestrator.events(after=before[-1].seq)) == 1


def test_a_node_that_says_goodbye_is_gone_at_once(cluster: Cluster) -> None:
    with cluster.node() as node:
        node.say(Goodbye())
        until(lambda: not cluster.is_connected())
        with pytest.raises(ConnectionClosed):
            node.hear()


def test_a_broken_connection_counts_only_after_a_while(cluster: Cluster) -> None:
    with cluster.node() as node:
        cluster.orchestrator.start_service(spec())
        node.expect(StartService)
        node.say(ServiceChanged(status=running()))
        until(lambda: cluster.state() is ServiceState.RUNNING)
    cluster.clock.ahead_s += 1
    assert cluster.is_connected()
    with cluster.node(NODE, running()):
        kinds = [event.kind for event in cluster.orchestrator.events(after=0)]
        assert kinds == ["node", "service"]
    for _ in range(12):
        cluster.clock.ahead_s += 1
        cluster.orchestrator.tick()
    assert not cluster.is_connected()
    assert cluster.state() is ServiceState.LOST


def test_a_silent_connection_is_cut(cluster: Cluster) -> None:
    with cluster.node() as node:
        for _ in range(12):
            cluster.clock.ahead_s += 1
            cluster.orchestrator.tick()
        assert not cluster.is_connected()
        with pytest.raises(ConnectionClosed) as caught:
            node.hear()
        assert caught.value.rcvd is not None
        assert "silent" in caught.value.rcvd.reason


def test_the_newer_connection_of_a_node_wins(cluster: Cluster) -> None:
    with cluster.node() as old, cluster.node() as new:
        refused = old.expect(Refused)
        assert refused.error["code"] == "conflict"
        with pytest.raises(ConnectionClosed):
            old.hear()
        cluster.orchestrator.start_service(spec())
        assert new.expect(StartService).spec == spec()
    assert [e.kind for e in cluster.orchestrator.events(after=0)] == ["node"]


def test_output_is_fetched(cluster: Cluster) -> None:
    with cluster.node() as node, ThreadPoolExecutor(1) as pool:
        cluster.orchestrator.start_service(spec())
        node.expect(StartService)
        answer = pool.submit(cluster.orchestrator.service_logs, ServiceId("s1"), after=7, tail_bytes=10)
        asked = node.expect(FetchLogs)
        assert (asked.service_id, asked.after, asked.tail_bytes) == ("s1", 7, 10)
        sent = Output(text="Epoch 1\n", start=7, end=15, total=20)
        node.say(CommandResult(request_id="of somebody else", output=Output(text="no")))
        node.say(CommandResult(request_id=asked.request_id, output=sent))
        assert answer.result(timeout=5) == sent


def test_output_that_does_not_come_is_an_error(cluster: Cluster) -> None:
    with cluster.node() as node:
        cluster.orchestrator.start_service(spec())
        node.expect(StartService)
        with pytest.raises(FlopsError) as caught:
            cluster.orchestrator.service_logs(ServiceId("s1"))
        assert caught.value.code is ErrorCode.TIMEOUT
        assert "name-n1" in caught.value.message


def test_output_of_a_node_that_vanishes_meanwhile_is_an_error(cluster: Cluster) -> None:
    with ThreadPoolExecutor(1) as pool:
        with cluster.node() as node:
            cluster.orchestrator.start_service(spec())
            node.expect(StartService)
            answer = pool.submit(cluster.orchestrator.service_logs, ServiceId("s1"))
            node.expect(FetchLogs)
        with pytest.raises(FlopsError) as caught:
            answer.result(timeout=5)
    assert caught.value.code is ErrorCode.NODE_LOST


def test_an_error_of_the_node_is_passed_on(cluster: Cluster) -> None:
    with cluster.node() as node, ThreadPoolExecutor(1) as pool:
        cluster.orchestrator.start_service(spec())
        node.expect(StartService)
        answer = pool.submit(cluster.orchestrator.service_logs, ServiceId("s1"))
        error = FlopsError(ErrorCode.SERVICE_NOT_FOUND, "It has written nothing yet.")
        node.say(CommandResult(request_id=node.expect(FetchLogs).request_id, error=error.to_dict()))
        with pytest.raises(FlopsError, match="nothing yet") as caught:
            answer.result(timeout=5)
    assert caught.value.code is ErrorCode.SERVICE_NOT_FOUND


BAD_MESSAGES = {
    "no json": "certainly not",
    "cut": '{"type": "hello", "node_id"',
    "no object": "[1, 2]",
    "unknown type": '{"type": "take_over"}',
    "missing fields": '{"type": "service_changed"}',
    "wrong field": '{"type": "service_changed", "status": {"service_id": "s1", "state": "flying"}}',
    "deep": "[" * 100_000,
    "binary": b"\x00\x01",
}


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("message", BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_an_invalid_message_ends_only_its_connection(
    cluster: Cluster, message: str | bytes, is_first: bool
) -> None:
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(cluster.node("other"))
        node = Played(stack.enter_context(cluster.dial()))
        if not is_first:
            node = stack.enter_context(cluster.node())
        node.connection.send(message)
        assert node.expect(Refused).error["code"] == "usage"
        with pytest.raises(ConnectionClosed):
            node.hear()
        other.say(Heartbeat())
        cluster.orchestrator.start_service(spec().model_copy(update={"node_id": NodeId("other")}))
        other.expect(StartService)


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"protocol": 99}, "conflict"), ({"node_id": ""}, "usage"), ({"name": " "}, "usage")],
)
def test_a_node_that_cannot_be_accepted_is_told_why(
    cluster: Cluster, changes: dict[str, Any], code: str
) -> None:
    with cluster.dial() as connection:
        node = Played(connection)
        node.say(Hello(node_id="n1", name="pi", facts=NodeFacts()).model_copy(update=changes))
        assert node.expect(Refused).error["code"] == code
    assert cluster.orchestrator.nodes() == []


def test_a_first_message_that_is_no_hello_is_refused(cluster: Cluster) -> None:
    with cluster.dial() as connection:
        node = Played(connection)
        node.say(Heartbeat())
        assert "heartbeat" in node.expect(Refused).error["message"]


def test_web_pages_cannot_join(cluster: Cluster) -> None:
    with pytest.raises(InvalidStatus) as caught, cluster.dial(origin="https://example.org"):
        pass
    assert caught.value.response.status_code == 403


def test_a_node_that_takes_no_messages_is_cut_off(cluster: Cluster) -> None:
    """Commands for a node that reads nothing must neither block their callers nor pile up."""
    big = {"text": "x" * 1_000_000}
    with cluster.node():
        for number in range(1100):
            config = big if number < 40 else {}
            cluster.orchestrator.start_service(spec(f"s{number}").model_copy(update={"config": config}))
        until(lambda: cluster.orchestrator._sessions == {}, timeout_s=20)
    assert len(cluster.orchestrator.services()) == 1100


# Blobs


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_root_says_that_the_cluster_is_there(cluster: Cluster) -> None:
    assert httpx.get(cluster.url).json() == {"message": "ok"}


@pytest.mark.parametrize("data", [b"", b"lock", b"m" * 2_500_000], ids=["empty", "small", "large"])
def test_a_blob_is_put_found_and_got(cluster: Cluster, data: bytes) -> None:
    url = f"{cluster.url}/api/blobs/{digest_of(data)}"
    assert httpx.head(url).status_code == 404
    for _ in range(2):
        put = httpx.put(url, content=data)
        assert (put.status_code, put.json()) == (200, {"digest": digest_of(data)})
    head = httpx.head(url)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(data)))
    assert httpx.get(url).content == data


def _error_of(response: httpx.Response) -> tuple[int, str]:
    body = response.json()
    assert set(body) == {"code", "message", "hint", "details"}
    return response.status_code, body["code"]


def test_a_blob_with_another_digest_is_refused(cluster: Cluster) -> None:
    url = f"{cluster.url}/api/blobs/{digest_of(b'promised')}"
    assert _error_of(httpx.put(url, content=b"other")) == (400, "upload_incomplete")
    assert _error_of(httpx.get(url)) == (404, "not_found")


def test_a_blob_that_is_too_large_is_refused(cluster: Cluster) -> None:
    data = b"m" * (MAX_BLOB_BYTES + 1)
    url = f"{cluster.url}/api/blobs/{digest_of(data)}"
    assert _error_of(httpx.put(url, content=data)) == (507, "quota_exceeded")
    pieces = (data[start : start + 500_000] for start in range(0, len(data), 500_000))
    assert _error_of(httpx.put(url, content=pieces)) == (507, "quota_exceeded")
    assert httpx.head(url).status_code == 404


@pytest.mark.parametrize("name", ["x", "A" * 64, "..%2F..%2Fetc%2Fpasswd", "0" * 63])
def test_what_is_no_digest_is_refused(cluster: Cluster, name: str) -> None:
    status, code = _error_of(httpx.get(f"{cluster.url}/api/blobs/{name}"))
    assert (status, code) in {(400, "usage"), (404, "not_found")}


def test_a_damaged_blob_is_told(cluster: Cluster, tmp_path: Path) -> None:
    url = f"{cluster.url}/api/blobs/{digest_of(b'data')}"
    httpx.put(url, content=b"data")
    path = next((tmp_path / "blobs").rglob(digest_of(b"data")))
    path.write_bytes(b"dada")
    response = httpx.get(url)
    assert _error_of(response) == (500, "internal")
    assert str(path) in response.json()["message"]


def test_an_upload_that_breaks_off_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    incoming = tmp_path / "blobs" / "incoming"
    digest = digest_of(b"x" * 1_000_000)
    with socket.create_connection(("127.0.0.1", cluster.port)) as connection:
        head = f"PUT /api/blobs/{digest} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 500_000)
        until(lambda: any(incoming.iterdir()))
    until(lambda: not any(incoming.iterdir()))
    assert httpx.head(f"{cluster.url}/api/blobs/{digest}").status_code == 404


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("POST", "/", 405)])
def test_unknown_addresses_have_the_one_error_shape(
    cluster: Cluster, method: str, path: str, status: int
) -> None:
    assert _error_of(httpx.request(method, cluster.url + path))[0] == status


def test_bodies_are_json(cluster: Cluster) -> None:
    response = httpx.get(f"{cluster.url}/api/blobs/{'0' * 64}")
    assert json.loads(response.text)["message"] == f"There is no blob {'0' * 64}."


def test_an_occupied_port_is_told(cluster: Cluster) -> None:
    with pytest.raises(FlopsError) as caught:
        HttpServer(build_app(cluster.orchestrator, MemoryBlobs()), "127.0.0.1", cluster.port).start()
    assert caught.value.code is ErrorCode.PORT_OCCUPIED
    assert str(cluster.port) in caught.value.message


def test_an_address_of_another_machine_is_told(cluster: Cluster) -> None:
    with pytest.raises(FlopsError) as caught:
        HttpServer(build_app(cluster.orchestrator, MemoryBlobs()), "192.0.2.1", 0).start()
    assert caught.value.code is ErrorCode.CONFIG_INVALID
    assert "192.0.2.1" in caught.value.message
