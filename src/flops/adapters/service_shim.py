"""The small process that every service runs under, so that the service outlives the node's daemon.

Started as ``python -I -S service_shim.py FOLDER``; it reads ``FOLDER/launch.json``, and goes to the
background. It gathers the service's output in files of bounded size, ends all of the service's processes
together, also those that left their session, and leaves ``FOLDER/exit.json``. It uses the standard library
only, because it runs without site-packages: it must start in milliseconds and stay small.

``launch.json``: ``argv``, ``env``, ``cwd``, ``output`` (path), ``output_bytes`` (size of one output file, two
are kept), ``heading`` (line to begin the output with, or ""), ``groups`` (control groups to join),
``oom_files`` (files that count kills for want of memory),
``confinement`` (null, or the fields of `flops.adapters.confinement.Confinement`).
SIGTERM ends the service: politely, then after the seconds in ``stop.json`` for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))  # where our own modules are

from flops.adapters.confinement import Confinement, confine, give_way
from flops.adapters.output_files import OutputWriter

LAUNCH_FILE = "launch.json"
SHIM_FILE = "shim.json"
STOP_FILE = "stop.json"
EXIT_FILE = "exit.json"
LOCK_FILE = "lock"

EXIT_FILE_BYTES = 4096  # reserved at the start, so that the end can be told on a full disk
DEFAULT_GRACE_S = 5.0
ORPHAN_GRACE_S = 2.0  # for processes that the service left behind when it ended
KILL_TIMEOUT_S = 10.0
CANNOT_CONFINE = 126  # exit code
_CHUNK_BYTES = 65_536
_WINDOW_S = 0.1
_WINDOW_BYTES = 2 * 1024**2  # of output; whoever writes more waits, as for a slow terminal
_WAKE_S = 0.2
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def process_state(pid: int) -> tuple[str, int, int] | None:
    """A process's state letter, parent and start time in clock ticks since boot; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[19])


def all_processes() -> list[int]:
    """Every process of the machine."""
    with os.scandir("/proc") as entries:
        return [int(entry.name) for entry in entries if entry.name.isdigit()]


def living_descendants(root: int) -> set[int]:
    """All processes below `root` that are not zombies."""
    parents: dict[int, int] = {}
    zombies = set()
    for pid in all_processes():
        state = process_state(pid)
        if state is not None:
            parents[pid] = state[1]
            if state[0] in "ZX":
                zombies.add(pid)
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    open_pids = [root]
    while open_pids:
        new = [pid for pid in children.get(open_pids.pop(), []) if pid not in found]
        found.update(new)
        open_pids.extend(new)
    return found - zombies


def send_signal(pids: set[int], number: signal.Signals) -> None:
    """Send a signal to processes; those that are gone meanwhile are no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def write_durably(path: Path, text: str) -> None:
    """Replace a file's content so that it is whole after a crash at any moment."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Shim:
    """Runs one service from its start to the end of its last process."""

    def __init__(self, folder: Path, launch: dict[str, Any]) -> None:
        self._folder = folder
        self._launch = launch
        self._output = OutputWriter(Path(launch["output"]), int(launch["output_bytes"]))
        if launch["heading"]:
            self._output.write_line(launch["heading"])
        self._exit_code: int | None = None
        self._problem = ""
        self._is_asked_to_stop = False
        self._main_pid = 0
        self._window_ends_s = 0.0
        self._window_bytes = 0
        self._reserve_exit_file()

    def run(self) -> None:
        """Start the service, stay with it, and leave `EXIT_FILE`."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        pipe = self._start()
        with selectors.DefaultSelector() as selector:
            selector.register(wake_read, selectors.EVENT_READ)
            if pipe is not None:
                os.set_blocking(pipe, False)
                selector.register(pipe, selectors.EVENT_READ)
            self._attend(selector, wake_read, pipe)
        self._write_exit_file()

    def _ask_to_stop(self, *_: object) -> None:
        if self._exit_code is None:  # else it has ended by itself, and that is how it ended
            self._is_asked_to_stop = True

    def _start(self) -> int | None:
        launch = self._launch
        try:
            process = subprocess.Popen(
                launch["argv"],
                env=launch["env"],
                cwd=launch["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=self._prepare_child,
            )
        except (OSError, subprocess.SubprocessError) as exc:
            self._problem = f"{launch['argv'][0]} cannot be started: {exc}"
            self._exit_code = 127
            self._output.write(f"{self._problem}\n".encode())
            return None
        self._main_pid = process.pid
        process.returncode = 0  # children are reaped here, all of them, and not by this object
        return None if process.stdout is None else os.dup(process.stdout.fileno())

    def _prepare_child(self) -> None:
        for group in self._launch["groups"]:
            (Path(group) / "cgroup.procs").write_text("0")
        set_process_option(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if self._launch["confinement"] is not None:
            self._confine(self._launch["confinement"])

    def _confine(self, confinement: dict[str, Any]) -> None:
        give_way()
        try:
            confine(Confinement(**confinement))
        except (OSError, ValueError) as exc:
            os.write(2, f"The service cannot be confined: {exc}\n".encode())
            os._exit(CANNOT_CONFINE)

    def _attend(self, selector: selectors.BaseSelector, wake: int, pipe: int | None) -> None:
        politely_at_s: float | None = None
        while self._reap():
            for key, _ in selector.select(_WAKE_S):
                if key.fd == wake:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake, 1024)
                elif not self._drain(key.fd, once=True):
                    selector.unregister(key.fd)
            if not self._is_asked_to_stop and self._exit_code is None:
                continue
            if politely_at_s is None:
                politely_at_s = time.monotonic()
                send_signal(living_descendants(os.getpid()), signal.SIGTERM)
            elif time.monotonic() - politely_at_s > self._grace_s():
                self._kill_all()
        if pipe is not None:
            self._drain(pipe, once=False)

    def _drain(self, pipe: int, *, once: bool) -> bool:
        while True:
            try:
                data = os.read(pipe, _CHUNK_BYTES)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._output.write(data)
            if once:
                self._hold_back(len(data))
                return True

    def _hold_back(self, size: int) -> None:
        """Wait when output comes too fast: a flood must wear out neither the disk nor this machine's CPU."""
        now_s = time.monotonic()
        if now_s > self._window_ends_s:
            self._window_ends_s, self._window_bytes = now_s + _WINDOW_S, 0
        self._window_bytes += size
        if self._window_bytes > _WINDOW_BYTES:
            time.sleep(self._window_ends_s - now_s)

    def _reap(self) -> bool:
        """Collect ended children; false when none is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._main_pid:
                self._exit_code = os.waitstatus_to_exitcode(status)

    def _grace_s(self) -> float:
        if not self._is_asked_to_stop:
            return ORPHAN_GRACE_S
        try:
            return float(json.loads((self._folder / STOP_FILE).read_text())["grace_s"])
        except (OSError, ValueError, KeyError, TypeError):
            return DEFAULT_GRACE_S

    def _kill_all(self) -> None:
        """Kill every process. They are frozen first: what forks faster than it is killed runs out of that."""
        deadline_s = time.monotonic() + KILL_TIMEOUT_S
        frozen: set[int] = set()
        while time.monotonic() < deadline_s:
            running = living_descendants(os.getpid()) - frozen
            if not running:
                break
            send_signal(running, signal.SIGSTOP)
            frozen |= running
        while self._reap() and time.monotonic() < deadline_s:
            send_signal(living_descendants(os.getpid()), signal.SIGKILL)
            time.sleep(0.01)

    def _reserve_exit_file(self) -> None:
        reserve = self._folder / f"{EXIT_FILE}.reserved"
        with contextlib.suppress(OSError), reserve.open("wb") as file:
            file.write(b" " * EXIT_FILE_BYTES)
            file.flush()
            os.fsync(file.fileno())

    def _write_exit_file(self) -> None:
        record = {
            "exit_code": self._exit_code,
            "is_stopped": self._is_asked_to_stop,
            "oom_kills": sum(count_oom_kills(Path(name)) for name in self._launch["oom_files"]),
            "problem": self._problem[:1000],
        }
        text = json.dumps(record).ljust(EXIT_FILE_BYTES).encode()
        reserve = self._folder / f"{EXIT_FILE}.reserved"
        with reserve.open("r+b" if reserve.exists() else "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        reserve.replace(self._folder / EXIT_FILE)
        for group in self._launch["groups"]:
            with contextlib.suppress(OSError):
                Path(group).rmdir()


def count_oom_kills(path: Path) -> int:
    """The ``oom_kill`` count of a control group's file (``memory.events`` or ``memory.oom_control``)."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(line[1]) for line in lines if len(line) == 2 and line[0] == "oom_kill")


def set_process_option(option: int, value: int) -> None:
    """Call prctl(2); failure is ignored, it can only cost comfort."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def go_to_background() -> int:
    """Become a process of its own; the caller's process waits. Returns what to write to when ready."""
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    if os.fork() > 0:
        os.close(ready_write)
        os._exit(0 if os.read(ready_read, 1) else 1)
    os.close(ready_read)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    return ready_write


def main() -> None:
    """Run the shim of the folder named on the command line."""
    folder = Path(sys.argv[1])
    ready = go_to_background()
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.write(ready, b"1")  # it runs already
        return
    set_process_option(_PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    for name in (EXIT_FILE, STOP_FILE):
        (folder / name).unlink(missing_ok=True)
    shim = Shim(folder, json.loads((folder / LAUNCH_FILE).read_text()))
    state = process_state(os.getpid())
    identity = {
        "pid": os.getpid(),
        "started_ticks": 0 if state is None else state[2],
        "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
    }
    write_durably(folder / SHIM_FILE, json.dumps(identity))
    os.write(ready, b"1")
    os.close(ready)
    shim.run()


if __name__ == "__main__":
    main()
