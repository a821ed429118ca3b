"""Services as containers of this machine's engine. They outlive the node's daemon and the engine's."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flops.adapters import service_shim as shim
from flops.adapters.containers.description import IMAGE_USER, describe
from flops.adapters.containers.engine import ContainerEngine, EngineFacts, EngineRefusedError
from flops.adapters.containers.mounts import empty_root, give_to
from flops.adapters.containers.output import ContainerOutput
from flops.adapters.process_usage import UsageMeter
from flops.adapters.runtime_records import folder_of, read_record
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

OUTPUT_BYTES = 8 * 1024**2  # of one file; the one before it is kept too, and the engine keeps as much
LAUNCH_FILE = "launch.json"  # how it was started; written before the container is made
RUN_FILE = "run.json"  # its main process; written after the start
STOP_FILE = "stop.json"  # it was asked to end
EXIT_FILE = "exit.json"  # how it ended; the container is gone then
RUNTIME_LABEL = "org.flops.runtime"
SERVICE_LABEL = "org.flops.service"
_TEMPORARY_FOLDER = "tmp"  # in the work folder
_SIGNALS_FROM = 128
_KILLED = _SIGNALS_FROM + signal.SIGKILL
_KILL_TIMEOUT_S = 20.0
_POLL_S = 0.02
_NOT_STARTED = frozenset({"created", "configured", "initialized"})
_ENDED = frozenset({"exited", "stopped", "dead"})

_log = logging.getLogger(__name__)


class ContainerRuntime:
    """Implements `flops.ports.Runtime`.

    A service's state is its container's while there is one. At its end, its exit and its output are taken
    over into files of the node, and the container is removed.

    Args:
        root: folder of this runtime: what runs, and how it ended.
        output_dir: folder of the services' output files, ``<service id>.log``.
        engine: runs the containers.
        machine_bytes: memory of the machine, see `Resources.bounded`.
        output_bytes: largest size of an output file.
    """

    def __init__(
        self,
        root: Path,
        output_dir: Path,
        engine: ContainerEngine,
        *,
        machine_bytes: int | None = None,
        output_bytes: int = OUTPUT_BYTES,
    ) -> None:
        self._machine_bytes = machine_bytes
        self._root = root
        self._engine = engine
        self._name = hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:12]
        self._output = ContainerOutput(engine, output_dir, output_bytes)
        self._output_bytes = output_bytes
        self._meter = UsageMeter()
        self._lock = threading.RLock()  # an end is taken over once
        self._facts: EngineFacts | None = None
        self._unknown: set[ServiceId] = set()  # told as running, because the engine was away
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
        """Start a service's container; an already running one is left alone.

        Raises:
            FlopsError: ``unreachable`` or ``timeout`` when the engine is away; ``disk_full``,
                ``file_unreadable`` or ``service_failed`` when it cannot be started.
        """
        folder = self._folder(service_id)
        with _alone(folder):
            before = self.status(service_id)
            if before is not None and before.state is ServiceState.RUNNING:
                if service_id in self._unknown:
                    raise FlopsError(ErrorCode.UNREACHABLE, before.detail)
                return
            facts = self._engine_facts()
            self._make_room(service_id, has_image=bool(reach and reach.image))
            self._begin(service_id, folder, resources, before)
            image = reach.image if reach is not None else ""
            if not image and shutil.which(argv[0], path=env.get("PATH", os.defpath)) is None:
                problem = f"{argv[0]} cannot be started: there is no such program"
                self._write_exit(folder, {"problem": problem})
                return
            variables = {**env, "TMPDIR": str(self._prepare_folders(work_dir, reach, facts))}
            bounded = resources.bounded(self._machine_bytes)
            body = describe(facts, argv, variables, work_dir, bounded, reach)
            body["Labels"] = {RUNTIME_LABEL: self._name, SERVICE_LABEL: service_id}
            body["HostConfig"]["LogConfig"] = self._output.log_config(facts)
            self._run(service_id, body)

    def _begin(
        self, service_id: ServiceId, folder: Path, resources: Resources, before: ServiceStatus | None
    ) -> None:
        """Forget how it ended last, and keep how it is started now."""
        attempt = int((read_record(folder / LAUNCH_FILE) or {}).get("attempt", 0)) + 1
        for file in (EXIT_FILE, RUN_FILE, STOP_FILE):
            (folder / file).unlink(missing_ok=True)
        launch = {"attempt": attempt, "boot_id": self._boot_id, "memory_mb": resources.memory_mb}
        write_durably(folder / LAUNCH_FILE, json.dumps(launch))
        self._output.begin(service_id, folder, "" if before is None else restart_heading(attempt, before))

    def _make_room(self, service_id: ServiceId, *, has_image: bool) -> None:
        """What needs the engine before anything is changed: so that it is not changed while it is away."""
        reference, archive = empty_root()
        try:
            self._engine.remove(self._container(service_id))
            if not has_image and not self._engine.has_image(reference):
                self._engine.import_root(reference, archive)
        except EngineRefusedError as exc:
            raise FlopsError(
                ErrorCode.SERVICE_FAILED, f"{service_id} cannot be started in a container: {exc.message}."
            ) from exc

    def _run(self, service_id: ServiceId, body: Mapping[str, Any]) -> None:
        name = self._container(service_id)
        try:
            self._engine.create(name, body)
            self._engine.start(name)
        except EngineRefusedError as exc:
            self._remove_container(service_id)
            raise FlopsError(
                ErrorCode.SERVICE_FAILED, f"{service_id} cannot be started in a container: {exc.message}."
            ) from exc
        self.status(service_id)  # keeps which process it is

    def _prepare_folders(self, work_dir: Path, reach: Reach | None, facts: EngineFacts) -> Path:
        """Make the folders that it may write to, and give them to its user; returns the temporary one."""
        temporary = work_dir / _TEMPORARY_FOLDER
        folders = [work_dir, *map(Path, reach.writable if reach is not None else ())]
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in (*folders, temporary):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.geteuid() == 0 and not facts.is_rootless:
                give_to(IMAGE_USER, folders)
        except OSError as exc:
            raise file_error(exc, work_dir) from exc
        return temporary

    def status(self, service_id: ServiceId) -> ServiceStatus | None:
        """The service's state, also after a restart of the caller; None when it was never started.

        While the engine is away, a service of which nothing else is known counts as running.
        """
        folder = self._folder(service_id)
        record = read_record(folder / EXIT_FILE)
        if record is not None:
            return _ended(service_id, record)
        launch = read_record(folder / LAUNCH_FILE)
        if launch is None:
            return None
        running = ServiceStatus(service_id=service_id, state=ServiceState.RUNNING)
        if launch.get("boot_id") != self._boot_id:
            return stopped_status(service_id, None, MACHINE_RESTARTED)
        if self._process(folder) is not None:
            return running
        try:
            return self._look(service_id, folder, launch)
        except (FlopsError, EngineRefusedError) as exc:
            self._unknown.add(service_id)
            return running.model_copy(update={"detail": exc.message})

    def _look(self, service_id: ServiceId, folder: Path, launch: Mapping[str, Any]) -> ServiceStatus | None:
        """Ask the engine, and take over the end if it has ended."""
        with self._lock:
            record = read_record(folder / EXIT_FILE)
            if record is not None:
                return _ended(service_id, record)
            container = self._engine.inspect(self._container(service_id))
            state = dict((container or {}).get("State") or {})
            was_unknown = service_id in self._unknown
            self._unknown.discard(service_id)
            if container is None and (was_unknown or (folder / RUN_FILE).exists()):
                record = {"problem": "was removed, by another than this node"}
            elif container is None or state.get("Status") in _NOT_STARTED:
                return None
            elif state.get("Status") in _ENDED and not state.get("Running"):
                record = _end_of(state, launch, is_stopped=(folder / STOP_FILE).exists())
            else:
                self._keep_process(folder, int(state.get("Pid") or 0))
                return ServiceStatus(service_id=service_id, state=ServiceState.RUNNING)
            self._take_end(service_id, folder, record)
            return _ended(service_id, record)

    def _take_end(self, service_id: ServiceId, folder: Path, record: Mapping[str, Any]) -> None:
        """Keep the output and the end here; the container is kept until both are."""
        try:
            self._output.take(service_id, folder, self._container(service_id))
        except EngineRefusedError as exc:
            _log.warning("the last output of %s is not to be had: %s", service_id, exc)
        try:
            self._write_exit(folder, record)
        except FlopsError as error:
            _log.warning("the end of %s is not kept yet: %s", service_id, error.message)
        else:
            self._remove_container(service_id)

    def _write_exit(self, folder: Path, record: Mapping[str, Any]) -> None:
        write_durably(folder / EXIT_FILE, json.dumps(record))

    def _remove_container(self, service_id: ServiceId) -> None:
        try:
            self._engine.remove(self._container(service_id))
        except (FlopsError, EngineRefusedError) as exc:
            _log.warning("the container of %s is not removed yet: %s", service_id, exc)

    def stop(self, service_id: ServiceId, *, grace_s: float = 5.0) -> None:
        """End the service with all its children: first politely, after `grace_s` for good."""
        status = self.status(service_id)
        folder = self._folder(service_id)
        if status is None or status.state is not ServiceState.RUNNING:
            if (folder / LAUNCH_FILE).exists():
                self._remove_container(service_id)
            return
        with suppress(FlopsError):  # on a full disk, it counts as ended by a signal
            write_durably(folder / STOP_FILE, "{}")
        try:
            self._engine.stop(self._container(service_id), math.ceil(grace_s))
        except (FlopsError, EngineRefusedError) as exc:
            _log.warning("%s is ended without the engine: %s", service_id, exc)
            self._end_process(folder, grace_s)
        self.status(service_id)

    def _end_process(self, folder: Path, grace_s: float) -> None:
        """What the engine does, for when it is away: the main process takes all others with it."""
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_TIMEOUT_S)):
            pid = self._process(folder)
            if pid is None:
                return
            shim.send_signal({pid}, number)
            deadline_s = time.monotonic() + wait_s
            while self._process(folder) is not None and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)

    def remove(self, service_id: ServiceId) -> None:
        """Stop the service and forget it, with its output."""
        self.stop(service_id, grace_s=0.0)
        self._output.remove(service_id)
        shutil.rmtree(self._folder(service_id), ignore_errors=True)
        self._meter.forget(service_id)

    def running(self) -> list[ServiceId]:
        """Every service of this runtime that runs now."""
        found: set[str] = set()
        if not self._root.is_dir():
            return []
        try:
            for entry in self._engine.list(f"{RUNTIME_LABEL}={self._name}", only_running=True):
                found.add(str((entry.get("Labels") or {}).get(SERVICE_LABEL, "")))
        except (FlopsError, EngineRefusedError):
            found = {path.name for path in self._root.iterdir() if self._process(path) is not None}
        return [ServiceId(name) for name in sorted(found) if name]

    def usage(self, service_id: ServiceId) -> ServiceUsage:
        """What the service uses now; zeros when it is not running."""
        pid = self._process(self._folder(service_id))
        # The main process is the engine's init, which is no part of the service.
        return self._meter.measure(service_id, shim.living_descendants(pid) if pid is not None else ())

    def output(self, service_id: ServiceId, *, tail_bytes: int = 65_536) -> str:
        """The end of the service's output; "" when there is none."""
        return self.read_output(service_id, None, tail_bytes).text

    def read_output(self, service_id: ServiceId, after: int | None, limit_bytes: int) -> Output:
        """What follows a place in the service's output, over restarts; its end when `after` is None."""
        folder = self._folder(service_id)
        if (folder / RUN_FILE).exists() and not (folder / EXIT_FILE).exists():
            with self._lock, suppress(FlopsError, EngineRefusedError):
                self._output.take(service_id, folder, self._container(service_id))
        return self._output.read(service_id, after, limit_bytes)

    def limits(self) -> tuple[tuple[str, ...], str]:
        """Which limits can be enforced here (memory, cpu, pids, files, network, signals); why not all."""
        try:
            facts = self._engine_facts()
        except FlopsError as error:
            return (), error.message.rstrip(".")
        missing = [name for name in ("memory", "cpu", "pids") if name not in facts.limits]
        why = f"{', '.join(missing)}: {facts.name} does not limit it here" if missing else ""
        if missing and facts.is_rootless:
            why += " (without root, that needs control groups of version 2 that are delegated)"
        if facts.can_restrict_network:
            return (*facts.limits, "files", "network", "signals"), why
        no_network = "network: needs Landlock (Linux 6.7), and Docker 23 if it is Docker"
        return (*facts.limits, "files", "signals"), "; ".join(filter(None, (why, no_network)))

    def _engine_facts(self) -> EngineFacts:
        if self._facts is None:
            try:
                self._facts = self._engine.facts()
            except EngineRefusedError as exc:
                raise FlopsError(
                    ErrorCode.UNREACHABLE, f"The container engine cannot be used: {exc.message}."
                ) from exc
        return self._facts

    def _folder(self, service_id: ServiceId) -> Path:
        return folder_of(self._root, service_id)

    def _container(self, service_id: ServiceId) -> str:
        return f"flops-{self._name}-{service_id}"

    def _keep_process(self, folder: Path, pid: int) -> None:
        state = shim.process_state(pid) if pid > 0 else None
        run = {"pid": pid, "started_ticks": state[2] if state is not None else 0}
        if run != read_record(folder / RUN_FILE):
            with suppress(FlopsError):  # then the engine is asked again
                write_durably(folder / RUN_FILE, json.dumps(run))

    def _process(self, folder: Path) -> int | None:
        """The main process of the service's container, if it lives and can be seen from here."""
        run = read_record(folder / RUN_FILE)
        if run is None or not run.get("started_ticks"):
            return None
        state = shim.process_state(int(run["pid"]))
        is_it = state is not None and state[0] not in "ZX" and state[2] == run["started_ticks"]
        return int(run["pid"]) if is_it else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a service's folder, also against other processes of this node."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise file_error(exc, folder) from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _end_of(state: Mapping[str, Any], launch: Mapping[str, Any], *, is_stopped: bool) -> dict[str, Any]:
    """What is kept of an end, from the engine's words about it."""
    code = int(state.get("ExitCode", -1))
    memory_mb = launch.get("memory_mb")
    why = ""
    if state.get("OOMKilled") and code != 0:
        why = WANTED_MEMORY
    elif code == _KILLED and memory_mb is not None and not is_stopped:
        # Podman does not say it; who else kills by this signal is told apart by nobody.
        why = f"was killed by SIGKILL: most likely it needed more than the {memory_mb} MB that it may use"
    return {"exit_code": _signal_or_code(code), "is_stopped": is_stopped, "out_of_memory": why}


def _signal_or_code(code: int) -> int:
    """Engines tell a signal as 128 and its number."""
    is_signal = _SIGNALS_FROM < code < _SIGNALS_FROM + signal.NSIG
    return _SIGNALS_FROM - code if is_signal else code


def _ended(service_id: ServiceId, record: Mapping[str, Any]) -> ServiceStatus:
    code = record.get("exit_code")
    if record.get("is_stopped"):
        return stopped_status(service_id, code)
    return ended_status(
        service_id,
        code,
        out_of_memory=str(record.get("out_of_memory") or ""),
        problem=str(record.get("problem") or ""),
    )
