"""The control plane's process: one per home, an endpoint file while it is ready, errors left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.control.lifetime import ENDPOINT_FILE, STARTUP_ERROR_FILE
from flops.errors import CATALOGUE, ErrorCode

PROGRAM = """
import contextlib, sys
from pathlib import Path
from flops.control.lifetime import run_until_told
from flops.errors import ErrorCode, FlopsError

def start(parts: contextlib.ExitStack):
    parts.callback((Path(sys.argv[1]) / "ended").touch)
    if sys.argv[2] == "fail":
        raise FlopsError(ErrorCode.PORT_OCCUPIED, "Port 5072 is in use.")
    return {"manager_url": "http://127.0.0.1:5072"}

sys.exit(run_until_told(Path(sys.argv[1]), start))
"""


class Control:
    """Starts control planes in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, how: str = "run") -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.folder), how], stderr=subprocess.DEVNULL
        )
        self.started.append(process)
        return process

    def wait_until_ready(self) -> dict[str, object]:
        deadline = time.monotonic() + 20
        while not (self.folder / ENDPOINT_FILE).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        endpoint: dict[str, object] = json.loads((self.folder / ENDPOINT_FILE).read_text())
        return endpoint


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    control = Control(tmp_path / "control")
    yield control
    for process in control.started:
        process.kill()
        process.wait()


def test_ready_until_it_is_told_to_stop(control: Control) -> None:
    process = control.start()
    assert control.wait_until_ready() == {"pid": process.pid, "manager_url": "http://127.0.0.1:5072"}
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert not (control.folder / ENDPOINT_FILE).exists()
    assert (control.folder / "ended").exists(), "every part is ended"


def test_a_second_one_in_the_same_home_is_refused_and_harms_nothing(control: Control) -> None:
    control.start()
    endpoint = control.wait_until_ready()
    assert control.start().wait(timeout=20) == CATALOGUE[ErrorCode.ALREADY_RUNNING].exit_code
    assert control.wait_until_ready() == endpoint
    assert not (control.folder / STARTUP_ERROR_FILE).exists()


def test_one_that_was_killed_leaves_room_for_the_next(control: Control) -> None:
    first = control.start()
    control.wait_until_ready()
    first.kill()
    first.wait()
    (control.folder / ENDPOINT_FILE).unlink()
    control.start()
    control.wait_until_ready()


def test_an_error_at_the_start_is_left_for_whoever_started_it(control: Control) -> None:
    assert control.start("fail").wait(timeout=20) == CATALOGUE[ErrorCode.PORT_OCCUPIED].exit_code
    error = json.loads((control.folder / STARTUP_ERROR_FILE).read_text())
    assert error["code"] == "port_occupied"
    assert (control.folder / "ended").exists(), "parts that had started are ended"
    assert not (control.folder / ENDPOINT_FILE).exists()
