"""What is made of an engine's answers, with the engine played by the test."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from flops.adapters.containers.detection import engine_findings, engine_socket
from flops.adapters.containers.engine import ContainerEngine, EngineFacts, EngineRefusedError
from flops.core.health import Severity
from flops.errors import ErrorCode, FlopsError
from flops.network_rules import can_restrict

PODMAN = {"Version": "4.3.1", "Components": [{"Name": "Podman Engine"}]}
DOCKER = {"Version": "27.0", "Components": [{"Name": "Engine"}]}
LIMITS = {"MemoryLimit": True, "CpuCfsQuota": True, "PidsLimit": True}


class PlayedEngine(socketserver.ThreadingUnixStreamServer):
    """Answers by path: a status and a body, which is JSON unless it is bytes."""

    daemon_threads = True

    def __init__(self, socket: Path) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        super().__init__(str(socket), _Handler)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, PlayedEngine)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = self.server.answers[self.path.partition("?")[0]]
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET  # noqa: N815 (likewise)

    def address_string(self) -> str:
        return "socket"

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "e.sock"


@pytest.fixture
def played(socket: Path) -> Iterator[PlayedEngine]:
    with PlayedEngine(socket) as engine:
        thread = threading.Thread(target=engine.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield engine
        engine.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("version", "info", "rootless", "limits"),
    [
        (PODMAN, {"CgroupVersion": "1", "Rootless": True}, True, ()),  # it says that it limits, and does not
        (PODMAN, {"CgroupVersion": "2", "Rootless": True}, True, ("memory", "cpu", "pids")),
        (
            DOCKER,
            {"CgroupVersion": "2", "SecurityOptions": ["name=rootless"]},
            True,
            ("memory", "cpu", "pids"),
        ),
        (DOCKER, {"SecurityOptions": ["name=seccomp"]}, False, ("memory", "cpu", "pids")),
        (DOCKER, {"CgroupVersion": "2", "MemoryLimit": False, "PidsLimit": None}, False, ("cpu",)),
    ],
)
def test_limits_are_what_the_engine_really_holds(
    played: PlayedEngine, socket: Path, version: Any, info: Any, rootless: bool, limits: tuple[str, ...]
) -> None:
    played.answers = {"/version": (200, version), "/info": (200, {**LIMITS, **info})}
    facts = ContainerEngine(socket).facts()
    assert facts.name == ("podman" if version is PODMAN else "docker")
    assert (facts.is_rootless, facts.limits) == (rootless, limits)
    severities = {finding.severity for finding in engine_findings(socket, is_preferred=True)}
    assert (Severity.WARNING in severities) is (len(limits) < 3)


@pytest.mark.parametrize(
    ("name", "version", "is_possible"),
    [("docker", "20.10.24+dfsg1", False), ("docker", "23.0.1", True), ("podman", "4.3.1", True)],
)
def test_an_old_docker_lets_nobody_ask_for_rules_of_the_network(
    name: str, version: str, is_possible: bool
) -> None:
    facts = EngineFacts(name=name, version=version, cgroup_version=2, is_rootless=False, limits=())
    assert facts.can_restrict_network is (is_possible and can_restrict())


def test_a_refusal_has_the_engines_own_words(played: PlayedEngine, socket: Path) -> None:
    played.answers = {"/containers/create": (500, {"message": "no space\nleft on device."})}
    with pytest.raises(EngineRefusedError) as caught:
        ContainerEngine(socket).create("x", {})
    assert (caught.value.status, caught.value.message) == (500, "no space left on device")


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"State": '])
def test_an_answer_that_is_none_counts_as_away(played: PlayedEngine, socket: Path, body: bytes) -> None:
    played.answers = {"/containers/x/json": (200, body)}
    with pytest.raises(FlopsError) as caught:
        ContainerEngine(socket).inspect("x")
    assert caught.value.code is ErrorCode.UNREACHABLE


def test_output_of_half_a_frame_and_without_a_time_is_left_out(played: PlayedEngine, socket: Path) -> None:
    def frame(data: bytes) -> bytes:
        return b"\1\0\0\0" + len(data).to_bytes(4, "big") + data

    log = (
        frame(b"2026-11-24T14:00:00.123456789Z one\n")
        + frame(b"none\n")
        + frame(b"2026-11-24T14:00:01Z two\n")
    )
    played.answers = {"/containers/x/logs": (200, log + frame(b"2026-11-24T14:00:01Z three\n")[:20])}
    pieces = list(ContainerEngine(socket).logs("x", 0))
    assert [data for _, data in pieces] == [b"one\n", b"two\n"]
    assert pieces[1][0] - pieces[0][0] == 1


def test_an_engine_that_is_away_is_a_problem_only_where_it_is_wanted(socket: Path) -> None:
    (problem,) = engine_findings(socket, is_preferred=True)
    assert problem.severity is Severity.PROBLEM
    assert "apt-get install podman" in problem.advice
    (known,) = engine_findings(socket, is_preferred=False)
    assert known.severity is Severity.INFO


def test_the_socket_is_the_given_one_then_dockers(played: PlayedEngine, socket: Path, tmp_path: Path) -> None:
    host = {"DOCKER_HOST": f"unix://{socket}"}
    assert engine_socket(tmp_path / "given", host) == tmp_path / "given"
    assert engine_socket(None, host) == socket
    assert engine_socket(None, {"DOCKER_HOST": "tcp://elsewhere:2375"}) == engine_socket(None, {})
