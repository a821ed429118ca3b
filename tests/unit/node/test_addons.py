"""The addons, with a runtime and a catalogue in memory."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from flops.core.build_tools import BuildTools
from flops.core.cluster import (
    Addon,
    AddonState,
    DataTag,
    Resources,
    ServiceState,
    ServiceStatus,
    ServiceUsage,
)
from flops.core.ids import ServiceId
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.node import addons
from flops.node.addons import Addons, DataServerAddon, DataServerPlan, ImageBuilder

EQUIPPED = BuildTools(platform=Platform.AMD64, python="3.11", base_python="3.11")
BARE = EQUIPPED.model_copy(update={"missing_for_base": ("mmdebstrap",)})


class PlayedServer:
    """A runtime of one process, and what the process answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_running = False
        self.exit_code = 0
        self.starts: list[Sequence[str]] = []
        self.problem: FlopsError | None = None
        self.answers: list[DataTag] = []
        self.port = 4242

    def start(
        self,
        service_id: ServiceId,
        argv: Sequence[str],
        env: Mapping[str, str],
        work_dir: Path,
        resources: Resources,
    ) -> None:
        if self.problem is not None:
            raise self.problem
        self.starts.append(argv)
        self.is_running = True
        port = int(argv[-1]) or self.port
        (self.folder / "endpoint.json").write_text(json.dumps({"port": port}))

    def die(self, exit_code: int) -> None:
        self.is_running, self.exit_code = False, exit_code

    def status(self, service_id: ServiceId) -> ServiceStatus | None:
        if not self.starts:
            return None
        state = ServiceState.RUNNING if self.is_running else ServiceState.FAILED
        return ServiceStatus(service_id=service_id, state=state, exit_code=self.exit_code)

    def stop(self, service_id: ServiceId, *, grace_s: float = 5.0) -> None:
        self.is_running = False

    def remove(self, service_id: ServiceId) -> None:
        self.stop(service_id)

    def running(self) -> list[ServiceId]:
        return []

    def usage(self, service_id: ServiceId) -> ServiceUsage:
        return ServiceUsage()

    def output(self, service_id: ServiceId, *, tail_bytes: int = 65_536) -> str:
        return "first\nthe last words"

    def limits(self) -> tuple[tuple[str, ...], str]:
        return (), "none"

    def tags(self) -> list[DataTag]:
        if self.problem is not None:
            raise self.problem
        return self.answers


@pytest.fixture
def server(tmp_path: Path) -> PlayedServer:
    return PlayedServer(tmp_path)


def make_addon(server: PlayedServer, port: int, certify: Callable[[], bool] | None = None) -> DataServerAddon:
    plan = DataServerPlan(("server",), {}, server.folder, "127.0.0.1", port, certify)
    return DataServerAddon("FLOps-learner", plan, server, lambda _folder: server)


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def free_port() -> int:
    with taken_port() as port:
        return port


def check_until(addon: DataServerAddon, is_true: Callable[[Addon], bool]) -> Addon:
    deadline_s = time.monotonic() + 10
    while True:
        addon.check()
        if is_true(addon.state()):
            return addon.state()
        assert time.monotonic() < deadline_s, addon.state()
        time.sleep(0.01)


def is_healthy(addon: Addon) -> bool:
    return addon.state is AddonState.HEALTHY


def test_the_server_is_started_and_asked(server: PlayedServer) -> None:
    port = free_port()
    addon = make_addon(server, port)
    assert addon.state().state is AddonState.STARTING
    server.answers = [DataTag(name="t", rows=1, size_bytes=1)]
    assert check_until(addon, is_healthy).detail == ""
    assert server.starts == [("server", "--port", str(port))]
    assert addon.data_tags() == tuple(server.answers)
    addon.stop()
    assert not server.is_running


def test_a_port_that_another_program_has_is_left_to_it(server: PlayedServer) -> None:
    with taken_port() as port:
        state = check_until(make_addon(server, port), is_healthy)
    assert server.starts == [("server", "--port", "0")]
    assert state.detail == f"Port {port} was taken by another program: the data server listens on port 4242."


def test_a_server_keeps_its_port_over_restarts(server: PlayedServer) -> None:
    """Devices know it, and another node's server on this machine may ask for the same one."""
    with taken_port() as asked:
        addon = make_addon(server, asked)
        server.port = free_port()
        check_until(addon, is_healthy)
    server.die(-9)
    check_until(addon, lambda addon: addon.state is AddonState.UNHEALTHY)
    check_until(addon, is_healthy)
    server.die(-9)
    check_until(make_addon(server, asked), is_healthy)
    assert [int(start[-1]) for start in server.starts] == [0, server.port, server.port]


def test_a_port_that_is_asked_for_anew_wins_over_the_kept_one(server: PlayedServer) -> None:
    first, second = free_port(), free_port()
    check_until(make_addon(server, first), is_healthy)
    server.die(-9)
    check_until(make_addon(server, second), is_healthy)
    assert [int(start[-1]) for start in server.starts] == [first, second]


def test_a_port_that_was_taken_meanwhile_likewise(server: PlayedServer) -> None:
    addon = make_addon(server, free_port())
    addon.check()
    server.die(FlopsError(ErrorCode.PORT_OCCUPIED, "").spec.exit_code)
    check_until(addon, is_healthy)
    assert [start[-1] for start in server.starts[1:]] == ["0"]


def test_a_server_that_dies_comes_back(server: PlayedServer) -> None:
    addon = make_addon(server, free_port())
    server.answers = [DataTag(name="t", rows=1, size_bytes=1)]
    check_until(addon, is_healthy)
    server.die(-9)
    state = check_until(addon, lambda addon: addon.state is AddonState.UNHEALTHY)
    assert state.detail == "The ML data server ended with exit code -9: the last words."
    assert addon.data_tags() == ()
    check_until(addon, is_healthy)
    assert len(server.starts) == 2
    assert addon.data_tags() != ()


def test_a_server_of_an_earlier_daemon_is_taken_over(server: PlayedServer) -> None:
    check_until(make_addon(server, free_port()), is_healthy)
    check_until(make_addon(server, free_port()), is_healthy)
    assert len(server.starts) == 1


def test_a_server_that_does_not_answer_is_unhealthy_and_asked_again(server: PlayedServer) -> None:
    addon = make_addon(server, free_port())
    check_until(addon, is_healthy)
    server.problem = FlopsError(ErrorCode.UNREACHABLE, "no answer")
    assert check_until(addon, lambda a: a.state is AddonState.UNHEALTHY).detail == "no answer"
    server.problem = None
    check_until(addon, is_healthy)


def test_a_server_that_cannot_be_started_is_unhealthy_and_tried_again(server: PlayedServer) -> None:
    addon = make_addon(server, free_port())
    server.problem = FlopsError(ErrorCode.DISK_FULL, "no space")
    assert check_until(addon, lambda a: a.state is AddonState.UNHEALTHY).detail == "no space"
    server.problem = None
    check_until(addon, is_healthy)


def test_a_server_starts_with_a_certificate_or_not_at_all(server: PlayedServer) -> None:
    answers = [FlopsError(ErrorCode.UNREACHABLE, "no cluster"), True]

    def certify() -> bool:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, FlopsError):
            raise answer
        return answer

    addon = make_addon(server, free_port(), certify)
    addon.check()
    assert (addon.state().state, addon.state().detail) == (AddonState.UNHEALTHY, "no cluster")
    assert server.starts == []
    check_until(addon, is_healthy)
    assert len(server.starts) == 1


def test_a_server_starts_again_when_its_certificate_is_renewed(
    server: PlayedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addons, "CERTIFY_INTERVAL_S", 0.0)
    answers: list[bool | FlopsError] = [True]

    def certify() -> bool:
        answer = answers.pop(0) if answers else False
        if isinstance(answer, FlopsError):
            raise answer
        return answer

    addon = make_addon(server, free_port(), certify)
    check_until(addon, is_healthy)
    assert len(server.starts) == 1
    answers.append(FlopsError(ErrorCode.UNREACHABLE, "no cluster"))  # the present one is good for long
    assert addon.check() > 0
    assert is_healthy(addon.state())
    answers.append(True)
    addon.check()
    assert (addon.state().state, server.is_running) == (AddonState.STARTING, False)
    check_until(addon, is_healthy)
    assert len(server.starts) == 2


def test_tools_of_the_image_builder() -> None:
    found = [BARE.model_copy(update={"missing": ("git",)}), BARE, EQUIPPED]
    addon = ImageBuilder(lambda: found.pop(0))
    assert addon.state().state is AddonState.STARTING
    addon.check()
    assert addon.state().state is AddonState.UNHEALTHY
    assert addon.state().detail == "git cannot be found on PATH."
    addon.check()
    assert addon.state().state is AddonState.HEALTHY
    assert "Images for linux/arm64 are made here, without emulation, but only on" in addon.state().detail
    addon.check()
    assert (addon.state().state, addon.state().detail) == (AddonState.HEALTHY, "")


def test_a_defect_of_an_addon_stays_with_it() -> None:
    checks = []

    def fail() -> BuildTools:
        checks.append(1)
        raise RuntimeError("defect")

    addons = Addons([ImageBuilder(fail)])
    addons.start()
    deadline_s = time.monotonic() + 10
    while not checks:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    addons.stop()
    assert addons.states()[0].state is AddonState.STARTING
