"""Services as processes of this machine, each under a shim that outlives the node's daemon."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from flops.adapters import confinement
from flops.adapters import service_shim as shim
from flops.adapters.gpus import VISIBLE_VARIABLE, device_files
from flops.adapters.output_files import remove_output
from flops.adapters.process_usage import UsageMeter
from flops.adapters.runtime_records import folder_of, read_output_of, read_record
from flops.core.cluster import Resources, ServiceState, ServiceStatus, ServiceUsage
from flops.core.ids import ServiceId
from flops.core.output import Output
from flops.core.reach import Reach
from flops.core.service_end import (
    MACHINE_RESTARTED,
    WANTED_MEMORY,
    ended_status,
    restart_heading,
    stopped_status,
)
from flops.durable_file import file_error, write_durably
from flops.errors import ErrorCode, FlopsError

OUTPUT_BYTES = 8 * 1024**2  # of one file; the one before it is kept too
ID_VARIABLE = "FLOPS_SERVICE_ID"  # marks every process of a service
TEMPORARY_FOLDER = "tmp"  # in the work folder of a confined service
FOLDER_VARIABLE = "FLOPS_RUNTIME_FOLDER"  # likewise; tells services of several nodes on one machine apart
_START_TIMEOUT_S = 15.0
_KILL_TIMEOUT_S = 20.0
_POLL_S = 0.02


class Limiter(Protocol):
    """Enforces limits on groups of processes (control groups)."""

    def create(self, name: str, resources: Resources) -> list[Path]:
        """Make the groups that processes join to be limited; empty when nothing has to be limited."""
        ...

    def oom_file(self, group: Path) -> Path | None:
        """The file of a group that counts kills for want of memory, if it is such a group."""
        ...

    def remove(self, groups: Sequence[Path]) -> None:
        """Kill what is left in the groups, and remove them."""
        ...

    def limits(self) -> tuple[tuple[str, ...], str]:
        """Which limits are enforced, and why not all of them."""
        ...


class ProcessRuntime:
    """Implements `flops.ports.Runtime`.

    Args:
        root: folder of this runtime: what runs, and how it ended.
        output_dir: folder of the services' output files, ``<service id>.log``.
        limiter: enforces resources.
        hidden: files and folders that confined services do not reach, apart from what their `Reach` names.
        output_bytes: largest size of an output file.
    """

    def __init__(
        self,
        root: Path,
        output_dir: Path,
        limiter: Limiter,
        *,
        hidden: Sequence[Path] = (),
        output_bytes: int = OUTPUT_BYTES,
    ) -> None:
        self._root = root
        self._hidden = tuple(str(path) for path in (root, output_dir, *hidden))
        self._output_dir = output_dir
        self._limiter = limiter
        self._output_bytes = output_bytes
        self._meter = UsageMeter()
        self._locks = tuple(threading.RLock() for _ in range(16))
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def start(
        self,
        service_id: ServiceId,
        argv: Sequence[str],
        env: Mapping[str, str],
        work_dir: Path,
        resources: Resources,
        reach: Reach | None = None,
    ) -> None:
        """Start a service's process; an already running one is left alone.

        Raises:
            FlopsError: ``disk_full``, ``file_unreadable`` or ``service_failed`` when it cannot be started.
        """
        with self._lock_of(service_id):
            folder = self._folder(service_id)
            if self._living_shim(folder) is None:
                self._start(service_id, folder, argv, env, work_dir, resources, reach)

    def _lock_of(self, service_id: ServiceId) -> threading.RLock:
        """Held while a service is started, so that nobody takes it for one that was killed, and sweeps."""
        return self._locks[hash(service_id) % len(self._locks)]

    def _start(
        self,
        service_id: ServiceId,
        folder: Path,
        argv: Sequence[str],
        env: Mapping[str, str],
        work_dir: Path,
        resources: Resources,
        reach: Reach | None,
    ) -> None:
        attempt = int((read_record(folder / shim.LAUNCH_FILE) or {}).get("attempt", 0)) + 1
        before = self.status(service_id)
        self._sweep(service_id)
        try:
            self._output_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise file_error(exc, self._output_dir) from exc
        groups = self._limiter.create(self._group_name(service_id), resources)
        variables = {**env, ID_VARIABLE: service_id, FOLDER_VARIABLE: str(folder)}
        confined = None
        if reach is not None:
            variables["TMPDIR"] = str(_fresh_folder(work_dir / TEMPORARY_FOLDER))
            variables |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            variables[VISIBLE_VARIABLE] = ",".join(map(str, reach.gpus))
            confined = asdict(self._confinement(work_dir, reach))
            if reach.confines_itself:
                variables[confinement.VARIABLE], confined = json.dumps(confined), None
        launch = {
            "argv": list(argv),
            "env": variables,
            "cwd": str(work_dir),
            "output": str(self._output_dir / f"{service_id}.log"),
            "output_bytes": self._output_bytes,
            "attempt": attempt,
            "heading": "" if before is None else restart_heading(attempt, before),
            "groups": [str(group) for group in groups],
            "oom_files": [str(file) for group in groups if (file := self._limiter.oom_file(group))],
            "confinement": confined,
        }
        write_durably(folder / shim.LAUNCH_FILE, json.dumps(launch))
        self._start_shim(service_id, folder)

    def _confinement(self, work_dir: Path, reach: Reach) -> confinement.Confinement:
        for folder in reach.writable:
            with contextlib.suppress(OSError):  # it is missed where it is used
                Path(folder).mkdir(parents=True, exist_ok=True)
        return confinement.Confinement(
            hidden=self._hidden,
            readable=reach.readable,
            writable=(str(work_dir), *reach.writable),
            devices=tuple(device_files(reach.gpus)),
            dials=reach.dials,
            listens=reach.listens,
        )

    def _start_shim(self, service_id: ServiceId, folder: Path) -> None:
        argv = [sys.executable, "-I", "-S", "-B", shim.__file__, str(folder)]
        starter = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder
        )
        try:
            _, stderr = starter.communicate(timeout=_START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            starter.kill()
            _, stderr = starter.communicate()
        if starter.returncode != 0:
            why = stderr.decode(errors="replace").strip()[-300:] or "it ended before it was ready"
            raise FlopsError(ErrorCode.SERVICE_FAILED, f"{service_id} cannot be started: {why}.")

    def status(self, service_id: ServiceId) -> ServiceStatus | None:
        """The service's state, also after a restart of the caller; None when it was never started."""
        folder = self._folder(service_id)
        if self._is_unwatched(folder):
            with self._lock_of(service_id):
                if self._is_unwatched(folder):
                    self._sweep(service_id)
        if self._living_shim(folder) is not None:
            return ServiceStatus(service_id=service_id, state=ServiceState.RUNNING)
        record = read_record(folder / shim.EXIT_FILE)
        if record is not None:
            return _ended(service_id, record)
        identity = read_record(folder / shim.SHIM_FILE)
        if identity is None:
            return None
        if identity.get("boot_id") != self._boot_id:
            return stopped_status(service_id, None, MACHINE_RESTARTED)
        return ended_status(service_id, -9, problem="was killed, together with the process that watches it")

    def _is_unwatched(self, folder: Path) -> bool:
        """Whether a service has a shim that is gone without a word: killed, or being started anew."""
        return (
            self._living_shim(folder) is None
            and not (folder / shim.EXIT_FILE).exists()
            and (folder / shim.SHIM_FILE).exists()
        )

    def stop(self, service_id: ServiceId, *, grace_s: float = 5.0) -> None:
        """End the service with all its children: first politely, after `grace_s` for good."""
        folder = self._folder(service_id)
        with self._lock_of(service_id):  # one that is being started is there afterwards
            pid = self._living_shim(folder)
        if pid is not None:
            # Without this file, the shim waits for its usual time.
            with contextlib.suppress(FlopsError):
                write_durably(folder / shim.STOP_FILE, json.dumps({"grace_s": grace_s}))
            shim.send_signal({pid}, signal.SIGTERM)
            if not _wait(lambda: self._living_shim(folder) is None, grace_s + _KILL_TIMEOUT_S):
                shim.send_signal({pid}, signal.SIGKILL)
                _wait(lambda: self._living_shim(folder) is None, _KILL_TIMEOUT_S)
        with self._lock_of(service_id):
            self._sweep(service_id)

    def remove(self, service_id: ServiceId) -> None:
        """Stop the service and forget it, with its output."""
        self.stop(service_id, grace_s=0.0)
        folder = self._folder(service_id)
        remove_output(self._output_path(service_id))
        shutil.rmtree(folder, ignore_errors=True)
        self._meter.forget(service_id)

    def running(self) -> list[ServiceId]:
        """Every service of this runtime that runs now."""
        if not self._root.is_dir():
            return []
        return [ServiceId(p.name) for p in sorted(self._root.iterdir()) if self._living_shim(p) is not None]

    def usage(self, service_id: ServiceId) -> ServiceUsage:
        """What the service uses now; zeros when it is not running."""
        pid = self._living_shim(self._folder(service_id))
        return self._meter.measure(service_id, shim.living_descendants(pid) if pid is not None else ())

    def output(self, service_id: ServiceId, *, tail_bytes: int = 65_536) -> str:
        """The end of the service's output; "" when there is none."""
        return self.read_output(service_id, None, tail_bytes).text

    def read_output(self, service_id: ServiceId, after: int | None, limit_bytes: int) -> Output:
        """What follows a place in the service's output, over restarts; its end when `after` is None."""
        return read_output_of(self._output_path(service_id), after, limit_bytes)

    def limits(self) -> tuple[tuple[str, ...], str]:
        """Which limits can be enforced here (memory, cpu, pids, files, network, signals); why not all."""
        groups, why_not_groups = self._limiter.limits()
        kernel, why_not_kernel = confinement.limits()
        return (*groups, *kernel), "; ".join(filter(None, (why_not_groups, why_not_kernel)))

    def _folder(self, service_id: ServiceId) -> Path:
        return folder_of(self._root, service_id)

    def _group_name(self, service_id: ServiceId) -> str:
        return f"{hashlib.sha256(str(self._root).encode()).hexdigest()[:8]}-{service_id}"

    def _output_path(self, service_id: ServiceId) -> Path:
        launch = read_record(self._folder(service_id) / shim.LAUNCH_FILE) or {}
        return Path(str(launch.get("output", self._output_dir / f"{service_id}.log")))

    def _living_shim(self, folder: Path) -> int | None:
        identity = read_record(folder / shim.SHIM_FILE)
        if identity is None or identity.get("boot_id") != self._boot_id:
            return None
        pid = int(identity["pid"])
        state = shim.process_state(pid)
        is_it = state is not None and state[0] not in "ZX" and state[2] == identity["started_ticks"]
        return pid if is_it else None

    def _sweep(self, service_id: ServiceId) -> None:
        """Kill what a killed shim left behind: found by its control groups and by its environment."""
        folder = self._folder(service_id)
        launch = read_record(folder / shim.LAUNCH_FILE)
        if launch is None:
            return
        mark = f"{FOLDER_VARIABLE}={folder}".encode()
        deadline_s = time.monotonic() + _KILL_TIMEOUT_S
        while (marked := _processes_marked(mark)) and time.monotonic() < deadline_s:
            shim.send_signal(marked, signal.SIGSTOP)  # what forks faster than it is killed stands still first
            if marked >= _processes_marked(mark):
                shim.send_signal(marked, signal.SIGKILL)
            time.sleep(_POLL_S)
        self._limiter.remove([Path(group) for group in launch.get("groups", ())])


def _fresh_folder(path: Path) -> Path:
    """Make a folder, without anything that an earlier start left in it."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise file_error(exc, path) from exc
    return path


def _ended(service_id: ServiceId, record: Mapping[str, Any]) -> ServiceStatus:
    if record.get("is_stopped"):
        return stopped_status(service_id, record.get("exit_code"))
    return ended_status(
        service_id,
        record.get("exit_code"),
        out_of_memory=WANTED_MEMORY if record.get("oom_kills") else "",
        problem=str(record.get("problem") or ""),
    )


def _processes_marked(mark: bytes) -> set[int]:
    found = set()
    for pid in shim.all_processes():
        with contextlib.suppress(OSError):
            if pid != os.getpid() and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.add(pid)
    return {pid for pid in found if (state := shim.process_state(pid)) and state[0] not in "ZX"}


def _wait(is_true: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True
