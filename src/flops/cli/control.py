"""``flops up``, ``down``, ``status``: the control plane of this machine, as a background process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from flops.cli.output import say
from flops.control.lifetime import ENDPOINT_FILE, STARTUP_ERROR_FILE
from flops.errors import ErrorCode, FlopsError
from flops.settings import inherited_environment

LOG_FILE = "control.log"
_READY_WITHIN_S = 60.0
_ENDED_WITHIN_S = 30.0
_POLL_S = 0.05


def read_endpoint(folder: Path) -> dict[str, Any] | None:
    """What the running control plane of a folder tells its clients; None when none runs."""
    try:
        endpoint: dict[str, Any] = json.loads((folder / ENDPOINT_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return endpoint if _is_control_plane(int(endpoint["pid"])) else None


def start_control_plane(folder: Path, options: list[str]) -> dict[str, Any]:
    """Start the control plane in the background, and wait until it is ready.

    Args:
        folder: its state.
        options: arguments of its process, such as ``--manager-port=5072``.

    Returns:
        Its endpoint.

    Raises:
        FlopsError: ``already_running``, ``port_occupied``, ``timeout``, or what kept it from starting.
    """
    running = read_endpoint(folder)
    if running is not None:
        raise FlopsError(
            ErrorCode.ALREADY_RUNNING,
            f"The control plane runs already: process {running['pid']}, {running['manager_url']}.",
            hint="`flops status` shows it, `flops down` stops it.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STARTUP_ERROR_FILE).unlink(missing_ok=True)
    with (folder / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flops.wiring", "control-plane", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=inherited_environment(),
            start_new_session=True,
        )
    return _wait_until_ready(folder, process)


def _wait_until_ready(folder: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + _READY_WITHIN_S
    while time.monotonic() < deadline:
        exit_code = process.poll()
        endpoint = read_endpoint(folder)
        if endpoint is not None and endpoint["pid"] == process.pid:
            return endpoint
        if exit_code is not None:
            raise _startup_error(folder, exit_code)
        time.sleep(_POLL_S)
    process.kill()
    raise FlopsError(
        ErrorCode.TIMEOUT, f"The control plane was not ready within {_READY_WITHIN_S:.0f} s; it was ended.",
        hint=f"Its log is {folder / LOG_FILE}.",
    )  # fmt: skip


def _startup_error(folder: Path, exit_code: int) -> FlopsError:
    try:
        return FlopsError.from_dict(json.loads((folder / STARTUP_ERROR_FILE).read_text()))
    except (OSError, json.JSONDecodeError):
        return FlopsError(
            ErrorCode.INTERNAL,
            f"The control plane ended with exit code {exit_code} before it was ready.",
            hint=f"Its log is {folder / LOG_FILE}.",
        )


def stop_control_plane(folder: Path) -> None:
    """End the control plane, by force when it does not end by itself.

    Raises:
        FlopsError: ``not_running``.
    """
    endpoint = read_endpoint(folder)
    if endpoint is None:
        raise FlopsError(
            ErrorCode.NOT_RUNNING,
            f"No control plane runs with its state in {folder}.",
            hint="`flops up` starts one; another home is named by FLOPS_HOME or --home.",
        )
    process = psutil.Process(int(endpoint["pid"]))
    family = [process, *process.children(recursive=True)]
    os.kill(process.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=_ENDED_WITHIN_S)
    for survivor in alive:
        say(f"Process {survivor.pid} does not end by itself and is killed.")
        survivor.kill()
    psutil.wait_procs(alive, timeout=5)
    (folder / ENDPOINT_FILE).unlink(missing_ok=True)


def _is_control_plane(pid: int) -> bool:
    """Whether the process is a control plane, and not another one that got its number later."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and "control-plane" in process.cmdline()
    except psutil.Error:
        return False
