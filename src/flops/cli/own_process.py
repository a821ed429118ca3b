"""A process of ours that runs on this machine from a folder of its own: finding, starting and ending it."""

from __future__ import annotations

import json
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

from flops.adapters.system_clock import SystemClock
from flops.cli.output import say
from flops.control.lifetime import ENDPOINT_FILE, LOCK_FILE, STARTUP_ERROR_FILE
from flops.errors import CATALOGUE, ErrorCode, FlopsError
from flops.settings import inherited_environment

READY_WITHIN_S = 60.0
ENDED_WITHIN_S = 30.0
_POLL_S = 0.05
_LOG_LINES = 15


@dataclass(frozen=True)
class Ended:
    """What `OwnProcess.stop` has ended.

    Args:
        endpoint: what the process had told its clients; empty when it had told nothing yet.
        pid: the process.
        ran_s: seconds it had run.
        killed: processes that had to be killed.
    """

    endpoint: Mapping[str, Any]
    pid: int
    ran_s: float
    killed: tuple[int, ...]


@dataclass(frozen=True)
class OwnProcess:
    """One that `flops.wiring` starts by a name, and that tells in its folder where it listens.

    Args:
        name: to `flops.wiring`.
        what: it is, in sentences.
        folder: its own.
        log: file in the folder, for its log.
        shown_as: key of its endpoint that says where it is.
        command: what comes before ``up`` and ``down`` to start and end it.
    """

    name: str
    what: str
    folder: Path
    log: str
    shown_as: str
    command: str

    def endpoint(self) -> dict[str, Any] | None:
        """What the running process tells its clients; None when none runs."""
        try:
            endpoint: dict[str, Any] = json.loads((self.folder / ENDPOINT_FILE).read_text())
            return endpoint if self._is_it(int(endpoint["pid"])) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def start(self, options: Sequence[str]) -> Mapping[str, Any]:
        """Start it in the background, and wait until it is ready.

        Args:
            options: arguments of the process, such as ``--manager-port=5072``.

        Returns:
            Its endpoint.

        Raises:
            FlopsError: ``already_running``, ``timeout``, or what kept it from starting.
        """
        self.prepare()
        with (self.folder / self.log).open("ab") as log:
            process = subprocess.Popen(
                self._command_line(options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=inherited_environment(),
                start_new_session=True,
            )
        try:
            return self._wait_until_ready(process)
        except KeyboardInterrupt:
            say(f"Interrupted: the {self.what} is ended again.")
            _end(psutil.Process(process.pid))
            raise

    def run_in_foreground(
        self, options: Sequence[str], on_ready: Callable[[Mapping[str, Any]], None]
    ) -> None:
        """Run it attached to this terminal until it ends; Ctrl+C and SIGTERM end it.

        Args:
            options: as for `start`.
            on_ready: is called with the endpoint.

        Raises:
            FlopsError: what kept it from starting; ``internal`` when it ends otherwise than told.
        """
        self.prepare()
        process = subprocess.Popen(
            self._command_line(options), stdin=subprocess.DEVNULL, env=inherited_environment()
        )
        told = threading.Event()

        def end(_number: int, _frame: FrameType | None) -> None:
            told.set()
            process.terminate()

        signal.signal(signal.SIGTERM, end)
        try:
            on_ready(self._wait_until_ready(process))
            exit_code = process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the child as well
            exit_code = process.wait()
        except FlopsError:
            if not told.is_set():
                raise
            exit_code = process.wait()
        if exit_code != 0:
            raise FlopsError(ErrorCode.INTERNAL, f"The {self.what} ended with exit code {exit_code}.")

    def stop(self) -> Ended | None:
        """End it with its children, by force when it does not end by itself; None when none runs.

        Raises:
            FlopsError: ``forbidden`` when it belongs to another user.
        """
        endpoint = self.endpoint()
        pid = int(endpoint["pid"]) if endpoint is not None else self._pid_holding_lock()
        if pid is None:
            return None
        try:
            process = psutil.Process(pid)
            ran_s = SystemClock().now_s() - process.create_time()
            killed = _end(process)
        except psutil.AccessDenied as exc:
            raise FlopsError(
                ErrorCode.FORBIDDEN,
                f"The {self.what}, process {pid}, belongs to another user.",
                hint="Stop it as the user who started it.",
            ) from exc
        except psutil.NoSuchProcess:
            ran_s, killed = 0.0, ()
        (self.folder / ENDPOINT_FILE).unlink(missing_ok=True)
        return Ended(endpoint or {}, pid, ran_s, killed)

    def not_running(self) -> FlopsError:
        """The error of one that does not run."""
        return FlopsError(
            ErrorCode.NOT_RUNNING,
            f"No {self.what} runs with its state in {self.folder}.",
            hint=f"`{self.command} up` starts one; another home is named by --home or FLOPS_HOME.",
        )

    def prepare(self) -> None:
        """Make its folder, if none runs there.

        Raises:
            FlopsError: ``already_running``, ``file_unreadable``.
        """
        running = self.endpoint()
        if running is not None:
            raise self._already_running(f"process {running['pid']}, {running.get(self.shown_as, '')}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.folder / STARTUP_ERROR_FILE).unlink(missing_ok=True)
            (self.folder / self.log).touch(mode=0o600)
        except OSError as exc:
            raise FlopsError(
                ErrorCode.FILE_UNREADABLE,
                f"State cannot be kept in {self.folder}: {exc.strerror}.",
                hint="Name a folder that you may write to with --home or FLOPS_HOME.",
            ) from exc

    def _command_line(self, options: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "flops.wiring", self.name, *options]

    def _already_running(self, where: str) -> FlopsError:
        status = "`flops status` shows it, " if self.command == "flops" else ""
        return FlopsError(
            ErrorCode.ALREADY_RUNNING,
            f"The {self.what} runs already: {where}.",
            hint=f"{status}`{self.command} down` stops it, --home starts another one elsewhere.",
        )

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> Mapping[str, Any]:
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            exit_code = process.poll()
            if exit_code is not None:
                raise self._startup_error(exit_code)
            endpoint = self.endpoint()
            if endpoint is not None and endpoint["pid"] == process.pid:
                return endpoint
            time.sleep(_POLL_S)
        _end(psutil.Process(process.pid))
        raise FlopsError(
            ErrorCode.TIMEOUT,
            f"The {self.what} was not ready within {READY_WITHIN_S:.0f} s; it was ended.",
            hint=f"Its log is {self.folder / self.log}.",
        )

    def _startup_error(self, exit_code: int) -> FlopsError:
        if exit_code == CATALOGUE[ErrorCode.ALREADY_RUNNING].exit_code:
            return self._already_running(
                f"another one is starting or stopping with its state in {self.folder}"
            )
        try:
            return FlopsError.from_dict(json.loads((self.folder / STARTUP_ERROR_FILE).read_text()))
        except (OSError, ValueError):
            return FlopsError(
                ErrorCode.INTERNAL,
                f"The {self.what} ended with exit code {exit_code} before it was ready.",
                hint=f"Its log is {self.folder / self.log}.",
                details={"log": _end_of(self.folder / self.log)},
            )

    def _is_it(self, pid: int) -> bool:
        """Whether the process is ours, and not another one that got its number later."""
        try:
            process = psutil.Process(pid)
            return process.status() != psutil.STATUS_ZOMBIE and self.name in process.cmdline()
        except psutil.Error:
            return False

    def _pid_holding_lock(self) -> int | None:
        """The process that holds the lock file, also before it has told where it listens; Linux knows."""
        with suppress(OSError, ValueError):
            inode = (self.folder / LOCK_FILE).stat().st_ino
            for line in Path("/proc/locks").read_text().splitlines():
                fields = line.split()  # 1: FLOCK ADVISORY WRITE <pid> <major:minor:inode> 0 EOF
                if len(fields) > 5 and fields[5].endswith(f":{inode}") and self._is_it(int(fields[4])):
                    return int(fields[4])
        return None


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
