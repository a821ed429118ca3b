"""The node's connection over a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from websockets.sync.server import ServerConnection, serve

from flops.adapters.node_link import WebSocketLink, client_tls, dial_cluster
from flops.errors import ErrorCode, FlopsError
from flops.wire.node import FROM_NODE, Goodbye, StopService

Behaviour = Callable[[ServerConnection], None]


@pytest.fixture
def cluster() -> Iterator[Callable[[Behaviour], str]]:
    stops = []

    def start(behaviour: Behaviour) -> str:
        server = serve(behaviour, "127.0.0.1", 0, close_timeout=1)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        stops.append((server, thread))
        return f"127.0.0.1:{server.socket.getsockname()[1]}"

    yield start
    for server, thread in stops:
        server.shutdown()
        thread.join(5)


def end_of(link: WebSocketLink) -> FlopsError:
    with pytest.raises(FlopsError) as caught:
        link.receive(5)
    return caught.value


def test_messages_cross(cluster: Callable[[Behaviour], str]) -> None:
    heard = []

    def behave(connection: ServerConnection) -> None:
        heard.append(FROM_NODE.validate_json(connection.recv()))
        connection.send(StopService(service_id="s").model_dump_json())
        connection.send("no json")
        connection.send('{"type": "of a later version"}')
        connection.recv()

    link = dial_cluster(cluster(behave))
    assert link.receive(0) is None
    link.send(Goodbye())
    assert link.receive(5) == StopService(service_id="s")
    assert link.receive(5) is None
    assert link.receive(5) is None
    assert link.receive(0.01) is None
    link.close()
    link.close()
    assert heard == [Goodbye()]


def test_the_end_of_the_connection_is_told_with_its_reason(cluster: Callable[[Behaviour], str]) -> None:
    link = dial_cluster(cluster(lambda connection: connection.close(1008, "another node has this id")))
    error = end_of(link)
    assert error.code is ErrorCode.UNREACHABLE
    assert "another node has this id" in error.message
    with pytest.raises(FlopsError):
        link.send(Goodbye())
    link.close()


def test_a_cluster_that_is_not_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(FlopsError, match=f"127.0.0.1:{port}: Connection refused") as caught:
        dial_cluster(f"127.0.0.1:{port}")
    assert caught.value.code is ErrorCode.UNREACHABLE


def test_a_cluster_that_does_not_answer_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(FlopsError, match="time-out"):
        dial_cluster(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b"SSH-2.0-x\r\n", b""]
)
def test_another_server_is_no_cluster(answer: bytes) -> None:
    def behave(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1024)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=behave, args=(server,))
        thread.start()
        with pytest.raises(FlopsError) as caught:
            dial_cluster(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join(5)
    assert caught.value.code is ErrorCode.UNREACHABLE


def test_a_name_that_is_not_known_is_unreachable() -> None:
    with pytest.raises(FlopsError) as caught:
        dial_cluster("no.such.host.invalid:1")
    assert caught.value.code is ErrorCode.UNREACHABLE


def test_a_certificate_that_is_not_there_is_told() -> None:
    with pytest.raises(FlopsError) as caught:
        client_tls("/nonexistent.pem", "")
    assert caught.value.code is ErrorCode.FILE_UNREADABLE
