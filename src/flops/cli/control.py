"""The control plane of this machine as a process: finding, starting and ending it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from flops.adapters.mlflow_server import end_left_over
from flops.adapters.system_clock import SystemClock
from flops.cli.output import say
from flops.control.kept_ports import KeptPorts
from flops.control.lifetime import ENDPOINT_FILE, LOCK_FILE, STARTUP_ERROR_FILE, TRACKING_FOLDER
from flops.errors import CATALOGUE, ErrorCode, FlopsError
from flops.settings import ControlSettings, inherited_environment

LOG_FILE = "control.log"
READY_WITHIN_S = 60.0
ENDED_WITHIN_S = 30.0
_POLL_S = 0.05
_LOG_LINES = 15


@dataclass(frozen=True)
class Ended:
    """What `stop_control_plane` has ended.

    Args:
        endpoint: what the control plane had told its clients; empty when it had told nothing yet.
        pid: its process.
        ran_s: seconds it had run.
        killed: processes that had to be killed.
    """

    endpoint: Mapping[str, Any]
    pid: int
    ran_s: float
    killed: tuple[int, ...]


def read_endpoint(folder: Path) -> dict[str, Any] | None:
    """What the running control plane of a folder tells its clients; None when none runs."""
    try:
        endpoint: dict[str, Any] = json.loads((folder / ENDPOINT_FILE).read_text())
        return endpoint if _is_control_plane(int(endpoint["pid"])) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def start_control_plane(settings: ControlSettings, options: Sequence[str]) -> Mapping[str, Any]:
    """Start the control plane in the background, and wait until it is ready.

    Args:
        settings: as the process will have them.
        options: arguments of its process, such as ``--manager-port=5072``.

    Returns:
        Its endpoint.

    Raises:
        FlopsError: ``already_running``, ``port_occupied``, ``timeout``, or what kept it from starting.
    """
    folder = _prepare(settings)
    with (folder / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            _command(options),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=inherited_environment(),
            start_new_session=True,
        )
    try:
        return _wait_until_ready(settings, process)
    except KeyboardInterrupt:
        say("Interrupted: the control plane is ended again.")
        _end(psutil.Process(process.pid))
        raise


def run_in_foreground(
    settings: ControlSettings, options: Sequence[str], on_ready: Callable[[Mapping[str, Any]], None]
) -> None:
    """Run the control plane attached to this terminal until it ends; Ctrl+C and SIGTERM end it.

    Args:
        settings: as for `start_control_plane`.
        options: likewise.
        on_ready: is called with the endpoint.

    Raises:
        FlopsError: what kept it from starting; ``internal`` when it ends otherwise than told.
    """
    _prepare(settings)
    process = subprocess.Popen(_command(options), stdin=subprocess.DEVNULL, env=inherited_environment())
    told = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        told.set()
        process.terminate()

    signal.signal(signal.SIGTERM, end)
    try:
        on_ready(_wait_until_ready(settings, process))
        exit_code = process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to the child as well
        exit_code = process.wait()
    except FlopsError:
        if not told.is_set():
            raise
        exit_code = process.wait()
    if exit_code != 0:
        raise FlopsError(ErrorCode.INTERNAL, f"The control plane ended with exit code {exit_code}.")


def stop_control_plane(folder: Path) -> Ended:
    """End the control plane with its MLflow server, by force when it does not end by itself.

    An MLflow server that a killed control plane left over is ended as well.

    Raises:
        FlopsError: ``not_running``; ``forbidden`` when it belongs to another user.
    """
    endpoint = read_endpoint(folder)
    pid = int(endpoint["pid"]) if endpoint is not None else _pid_holding(folder / LOCK_FILE)
    if pid is None:
        orphan = _end_orphan(folder / TRACKING_FOLDER)
        if orphan is not None:
            (folder / ENDPOINT_FILE).unlink(missing_ok=True)
            return orphan
        raise FlopsError(
            ErrorCode.NOT_RUNNING,
            f"No control plane runs with its state in {folder}.",
            hint="`flops up` starts one; another home is named by --home or FLOPS_HOME.",
        )
    try:
        process = psutil.Process(pid)
        ran_s = SystemClock().now_s() - process.create_time()
        killed = _end(process)
    except psutil.AccessDenied as exc:
        raise FlopsError(
            ErrorCode.FORBIDDEN,
            f"The control plane, process {pid}, belongs to another user.",
            hint="Stop it as the user who started it.",
        ) from exc
    except psutil.NoSuchProcess:
        ran_s, killed = 0.0, ()
    (folder / ENDPOINT_FILE).unlink(missing_ok=True)
    return Ended(endpoint or {}, pid, ran_s, killed)


def _end_orphan(folder: Path) -> Ended | None:
    """End the MLflow server that a killed control plane left over; None when there is none."""
    now_s = SystemClock().now_s()
    try:
        orphan = end_left_over(folder)
    except (OSError, psutil.AccessDenied):  # another user's: not ours to end
        return None
    if orphan is None:
        return None
    say("The control plane had been killed; its MLflow server was left over.")
    return Ended({}, orphan.pid, now_s - orphan.create_time(), ())


def _command(options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "flops.wiring", "control-plane", *options]


def _prepare(settings: ControlSettings) -> Path:
    folder = settings.control_dir
    running = read_endpoint(folder)
    if running is not None:
        raise _already_running(f"process {running['pid']}, {running.get('manager_url', '')}")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / STARTUP_ERROR_FILE).unlink(missing_ok=True)
        (folder / LOG_FILE).touch(mode=0o600)
    except OSError as exc:
        raise FlopsError(
            ErrorCode.FILE_UNREADABLE,
            f"State cannot be kept in {folder}: {exc.strerror}.",
            hint="Name a folder that you may write to with --home or FLOPS_HOME.",
        ) from exc
    return folder


def _already_running(where: str) -> FlopsError:
    return FlopsError(
        ErrorCode.ALREADY_RUNNING,
        f"The control plane runs already: {where}.",
        hint="`flops status` shows it, `flops down` stops it, --home starts another one elsewhere.",
    )


def _wait_until_ready(settings: ControlSettings, process: subprocess.Popen[bytes]) -> Mapping[str, Any]:
    folder = settings.control_dir
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        exit_code = process.poll()
        if exit_code is not None:
            raise _startup_error(settings, exit_code)
        endpoint = read_endpoint(folder)
        if endpoint is not None and endpoint["pid"] == process.pid:
            return endpoint
        time.sleep(_POLL_S)
    _end(psutil.Process(process.pid))
    raise FlopsError(
        ErrorCode.TIMEOUT,
        f"The control plane was not ready within {READY_WITHIN_S:.0f} s; it was ended.",
        hint=f"Its log is {folder / LOG_FILE}.",
    )


def _startup_error(settings: ControlSettings, exit_code: int) -> FlopsError:
    folder = settings.control_dir
    if exit_code == CATALOGUE[ErrorCode.ALREADY_RUNNING].exit_code:
        return _already_running(f"another one is starting or stopping with its state in {folder}")
    try:
        error = FlopsError.from_dict(json.loads((folder / STARTUP_ERROR_FILE).read_text()))
    except (OSError, ValueError):
        return FlopsError(
            ErrorCode.INTERNAL,
            f"The control plane ended with exit code {exit_code} before it was ready.",
            hint=f"Its log is {folder / LOG_FILE}.",
            details={"log": _end_of(folder / LOG_FILE)},
        )
    if error.code is ErrorCode.PORT_OCCUPIED:
        error.hint = _port_hint(settings, error.message)
    return error


def _port_hint(settings: ControlSettings, message: str) -> str:
    """Which option of `flops up` moves the port that an error names."""
    kept = KeptPorts(settings.control_dir)
    ports = {
        "--manager-port": kept.wanted("manager", settings.manager_port),
        "--cluster-port": kept.wanted("cluster", settings.cluster_port),
        "--tracking-port": kept.wanted("tracking", settings.tracking_port),
    }
    numbers = {int(number) for number in re.findall(r"\d+", message)}
    options = [option for option, port in ports.items() if port and port in numbers] or list(ports)
    return f"Stop the program that holds the port, or choose another one with {' or '.join(options)}."


def _end_of(path: Path) -> str:
    with suppress(OSError):
        return "\n".join(path.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    return ""


def _end(process: psutil.Process) -> tuple[int, ...]:
    """End a process with its children: politely, then for good; returns what had to be killed."""
    with suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs([process], timeout=ENDED_WITHIN_S)
        _, left = psutil.wait_procs(family, timeout=0 if alive else 3)
        for survivor in left:
            with suppress(psutil.NoSuchProcess):
                survivor.kill()
        psutil.wait_procs(left, timeout=5)
        return tuple(survivor.pid for survivor in left)
    return ()


def _is_control_plane(pid: int) -> bool:
    """Whether the process is a control plane, and not another one that got its number later."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and "control-plane" in process.cmdline()
    except psutil.Error:
        return False


def _pid_holding(lock: Path) -> int | None:
    """The control plane that holds a lock file, also before it has told where it listens; Linux knows."""
    with suppress(OSError, ValueError):
        inode = lock.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # 1: FLOCK ADVISORY WRITE <pid> <major:minor:inode> 0 EOF
            if len(fields) > 5 and fields[5].endswith(f":{inode}") and _is_control_plane(int(fields[4])):
                return int(fields[4])
    return None
