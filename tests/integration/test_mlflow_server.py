"""The MLflow server comes back when it is killed, ends with its parent, and replaces a left-over one."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from flops.adapters.mlflow_server import LOG_FILE, PID_FILE, MlflowServer, end_left_over
from flops.adapters.mlflow_tracker import MlflowTracker
from flops.core.ids import ProjectId
from flops.errors import ErrorCode, FlopsError
from flops.testing import waiting
from flops.testing.contracts.tracker import accuracies, round_of
from flops.testing.tracking import read_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CONTROL_PLANE = """
import os, signal, sys
from pathlib import Path
from flops.adapters.mlflow_server import MlflowServer
server = MlflowServer(Path(sys.argv[1]), int(sys.argv[2]), dict(os.environ))
server.start()
server.wait_ready()
print(server.pid, server.port, flush=True)
signal.pause()
"""


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., MlflowServer]]:
    servers: list[MlflowServer] = []

    def make(port: int = 0, *, answer_patience_s: float = 120.0, **environ: str) -> MlflowServer:
        environ = {**os.environ, **environ}
        servers.append(MlflowServer(tmp_path, port, environ, answer_patience_s=answer_patience_s))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


MakeServer = Callable[..., MlflowServer]


wait_until = functools.partial(waiting.until, timeout_s=40.0)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_killed_server_comes_back_while_a_round_is_recorded(make_server: MakeServer) -> None:
    server = make_server()
    server.wait_ready()
    tracker = MlflowTracker(server.url)
    _, run_id = tracker.open_run(ProjectId("p"), {}, {})
    tracker.log_round(run_id, round_of(1))
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)

    def is_recorded(number: int) -> bool:
        try:
            tracker.log_round(run_id, round_of(number))
        except FlopsError as exc:
            if exc.code not in {ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT}:
                raise
            return False
        return True

    for number in (2, 3):  # as the aggregator does: the same call again, until it succeeds
        wait_until(lambda number=number: is_recorded(number), timeout_s=90)
    tracker.close_run(run_id, is_success=True)
    tracker.close()
    assert server.pid != first
    assert server.restarts == 1
    assert server.is_ready()
    assert read_run(server.url, run_id).accuracy == accuracies(1, 2, 3)


def test_a_server_that_hangs_is_replaced(make_server: MakeServer) -> None:
    server = make_server(answer_patience_s=4.0)
    server.wait_ready()
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    wait_until(lambda: server.pid not in {None, first}, timeout_s=60)
    server.wait_ready()
    assert is_gone(first)


def test_stopping_frees_the_port_and_leaves_no_process_or_thread(make_server: MakeServer) -> None:
    threads = threading.active_count()
    server = make_server()
    pid, port = server.pid, server.port
    assert pid is not None
    assert not server.is_ready()
    server.stop()
    server.stop()
    assert is_gone(pid)
    assert (server.pid, server.is_ready(), threading.active_count()) == (None, False, threads)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_only_names_of_loopback_are_served(make_server: MakeServer) -> None:
    server = make_server(MLFLOW_SERVER_ALLOWED_HOSTS="evil.example")
    server.wait_ready()
    assert server.url == f"http://127.0.0.1:{server.port}"

    def status(host: str) -> tuple[int, int]:
        headers = {"host": f"{host}:{server.port}", "origin": f"http://{host}:{server.port}"}
        page = httpx.get(server.url, headers=headers)
        call = httpx.post(
            f"{server.url}/ajax-api/2.0/mlflow/experiments/search", json={"max_results": 1}, headers=headers
        )
        return page.status_code, call.status_code

    for host in ("localhost", "127.0.0.1"):
        assert status(host) == (200, 200), host
    assert status("evil.example") == (403, 403)
    assert httpx.get(f"{server.url}/ajax-api/3.0/mlflow/assistant/config").status_code == 404
    process = psutil.Process(server.pid)
    assert process.memory_info().rss < 450_000_000
    assert process.children() == []


def test_an_occupied_port_is_told_at_once(make_server: MakeServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(FlopsError) as caught:
            make_server(port)
    assert caught.value.code is ErrorCode.PORT_OCCUPIED
    assert str(port) in caught.value.message


def test_a_started_server_is_not_started_again(make_server: MakeServer) -> None:
    with pytest.raises(FlopsError) as caught:
        make_server().start()
    assert caught.value.code is ErrorCode.ALREADY_RUNNING


def test_a_home_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FlopsError) as caught:
        MlflowServer(tmp_path / "file", 0, {}).start()
    assert caught.value.code is ErrorCode.FILE_UNREADABLE


def test_a_broken_database_is_told_with_the_log(make_server: MakeServer, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    server = make_server()
    wait_until(lambda: server.restarts > 0)
    with pytest.raises(FlopsError) as caught:
        server.wait_ready(timeout_s=0.1)
    assert caught.value.code is ErrorCode.TRACKING_FAILED
    assert "file is not a database" in caught.value.details["log"]
    assert str(tmp_path / LOG_FILE) in caught.value.hint


def test_it_ends_when_its_parent_is_killed_and_the_next_takes_over(
    make_server: MakeServer, tmp_path: Path
) -> None:
    argv = [sys.executable, "-c", CONTROL_PLANE, str(tmp_path), "0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, port = map(int, parent.stdout.readline().split())
        parent.kill()
    server = make_server(port)
    assert is_gone(pid)
    assert server.pid != pid
    server.wait_ready()


def test_a_process_that_took_over_the_id_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        written = {"pid": other.pid, "started_at_s": time.time() - 3600}
        (tmp_path / PID_FILE).write_text(json.dumps(written))
        assert not end_left_over(tmp_path)
        assert other.poll() is None
        assert not (tmp_path / PID_FILE).exists()
        written["started_at_s"] = psutil.Process(other.pid).create_time()
        (tmp_path / PID_FILE).write_text(json.dumps(written))
        assert end_left_over(tmp_path)
        other.wait(5)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "started_at_s": 1}', '{"pid": 1}'])
def test_a_damaged_pid_file_is_no_left_over(tmp_path: Path, text: str) -> None:
    (tmp_path / PID_FILE).write_text(text)
    assert not end_left_over(tmp_path)


def test_mlflow_still_reads_its_settings_from_these_names(make_server: MakeServer) -> None:
    """They are not public: when MLflow renames them, this test fails first."""
    names = (
        "from mlflow.server import constants as c;"
        "from mlflow.environment_variables import _MLFLOW_SGI_NAME as s;"
        "print(c.BACKEND_STORE_URI_ENV_VAR, c.REGISTRY_STORE_URI_ENV_VAR, c.ARTIFACT_ROOT_ENV_VAR,"
        "c.ARTIFACTS_DESTINATION_ENV_VAR, c.SERVE_ARTIFACTS_ENV_VAR, s.name)"
    )
    known = subprocess.run([sys.executable, "-W", "ignore", "-c", names], capture_output=True, check=True)
    environ = psutil.Process(make_server().pid).environ()
    assert set(known.stdout.decode().split()) <= environ.keys()


def test_a_removal_goes_on_when_the_server_was_killed_in_it(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server()
    server.wait_ready()
    tracker = MlflowTracker(server.url)
    experiment_id, run_id = tracker.open_run(ProjectId("p"), {}, {})
    folder = tmp_path / "artifacts" / experiment_id
    for number in range(60):  # as many small files take a while
        (folder / run_id / "artifacts" / str(number)).mkdir(parents=True)
        for name in range(100):
            (folder / run_id / "artifacts" / str(number) / str(name)).touch()
    tracker.delete(ProjectId("p"))
    wait_until(lambda: len(list((folder / run_id / "artifacts").glob("*"))) < 60, "the removal's begin")
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    server.wait_ready()
    is_left = folder.exists()
    url = f"{server.url}/api/2.0/mlflow/experiments/get"
    wait_until(
        lambda: httpx.get(url, params={"experiment_id": experiment_id}).status_code == 404, "the removal"
    )
    assert is_left
    assert not folder.exists()
    tracker.close()
