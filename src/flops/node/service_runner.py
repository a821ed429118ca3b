"""The life of one service on this node, in a thread: prepare, run, watch, restart, stop."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Any

from flops.command import StoppedError, stopped_when
from flops.core.cluster import ServiceSpec, ServiceState, ServiceStatus
from flops.errors import ErrorCode, FlopsError
from flops.log import log_context
from flops.node.backoff import Backoff
from flops.node.disk_guard import DiskGuard
from flops.node.event_log import has_listened, last_failure
from flops.node.gpu_shares import GpuShares
from flops.node.preparation import Launch, Preparer
from flops.node.service_folder import Progress, ServiceFolder
from flops.ports import Runtime

WATCH_INTERVAL_S = 0.1
LAST_OUTPUT_BYTES = 4_000  # of a failed service, told with its failure
PASSING_ERRORS = frozenset({ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT})

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S = 0.5  # before the first restart; later pauses are longer


class ServiceRunner:
    """One service; `status` is what the node reports.

    Args:
        spec: the service.
        folder: where its state is kept.
        preparer: gets everything it needs.
        runtime: runs its process.
        progress: where it stood before, when this daemon finds it on disk.
        disk: watches what the services write.
        gpus: deals out the node's GPUs.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        folder: ServiceFolder,
        preparer: Preparer,
        runtime: Runtime,
        progress: Progress | None = None,
        disk: DiskGuard | None = None,
        gpus: GpuShares | None = None,
    ) -> None:
        self.spec = spec
        self._disk = disk or DiskGuard()
        self._gpus = gpus or GpuShares(())
        self.folder = folder
        self._preparer = preparer
        self._runtime = runtime
        initial = ServiceStatus(service_id=spec.id, state=ServiceState.PREPARING)
        self._progress = progress or Progress(initial)
        if self.status.state is ServiceState.RUNNING:
            self._gpus.keep(spec.id, self._progress.gpus)
        self._lock = threading.RLock()
        self._is_asked_to_stop = threading.Event()
        self._stop_detail = ""
        self._has_ended = threading.Event()
        if self.status.state.is_final:
            self._has_ended.set()
        self._thread: threading.Thread | None = None

    @property
    def status(self) -> ServiceStatus:
        """Where the service stands."""
        return self._progress.status

    @property
    def is_active(self) -> bool:
        """Whether its thread lives."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Bring the service to run, or watch it if it runs; nothing happens while its thread lives."""
        if not self.is_active:
            # A daemon thread: the end of the daemon does not wait for what it prepares.
            self._thread = threading.Thread(target=self._live, name=f"service-{self.spec.id}", daemon=True)
            self._thread.start()

    def ask_to_stop(self, detail: str = "It was asked to stop.") -> None:
        """End the service; returns at once, the status follows."""
        with self._lock:
            self._stop_detail = detail
            self._is_asked_to_stop.set()
            if not self.status.state.is_final and (
                self.status.state is not ServiceState.RUNNING or not self.is_active
            ):
                self._move(ServiceState.STOPPED, detail)

    def stop(self, detail: str, *, timeout_s: float) -> None:
        """End the service and wait until nothing of it runs, but not longer than `timeout_s`."""
        self.ask_to_stop(detail)
        deadline = time.monotonic() + timeout_s
        self._has_ended.wait(timeout_s)
        self._runtime.stop(self.spec.id)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.0, deadline - time.monotonic()))  # it removes what it has half built

    def free(self) -> None:
        """Remove what the ended service worked with; nothing of it runs afterwards."""
        self._runtime.stop(self.spec.id)
        self.folder.remove_work()

    def remove(self) -> None:
        """End the service and remove everything of it."""
        self.stop("It was removed.", timeout_s=10.0)
        self._runtime.remove(self.spec.id)
        self.folder.remove()

    def _live(self) -> None:
        with log_context(service_id=self.spec.id, project_id=self.spec.project_id):
            try:
                if self.folder.load_spec() is None:
                    self.folder.create(self.spec)
                pauses = Backoff(_FIRST_PAUSE_S, 30.0)
                while self._run_once():
                    self._is_asked_to_stop.wait(pauses.next_s())
            except StoppedError:
                _log.info("%s was stopped while it was prepared", self.spec.id)
            except FlopsError as error:
                _log.warning("%s failed: %s", self.spec.id, error)
                self._fail(error.to_dict(), exit_code=None)
            except Exception as exc:  # noqa: BLE001 (its defect must not hide: the cluster is told, the log has it)
                _log.exception("%s failed by a defect", self.spec.id)
                defect = FlopsError(
                    ErrorCode.INTERNAL, f"{self.spec.id} failed: {type(exc).__name__}: {exc}."
                )
                self._fail(defect.to_dict(), exit_code=None)

    def _run_once(self) -> bool:
        """Run the service to its end; whether it is to be started again after a pause."""
        found = self._find_run()
        if found is not None and found.state is ServiceState.STOPPED:
            # It was ended with its node, or with the machine: the cluster has it started again.
            self._move(ServiceState.STOPPED, found.detail)
            return False
        if found is None and not self._prepare_and_start():
            return False
        self._move(ServiceState.RUNNING, "")
        ended = self._watch()
        if ended is None:
            self._runtime.stop(self.spec.id)
            self._move(ServiceState.STOPPED, self._stop_detail)
            return False
        return self._take_end(ended)

    def _find_run(self) -> ServiceStatus | None:
        """Its process, if an earlier daemon started it and its end was not taken in; None to start it."""
        state = self.status.state
        if state is ServiceState.STOPPED:
            self._runtime.stop(self.spec.id)
            return None
        found = self._runtime.status(self.spec.id)
        if found is not None and found.state.is_final and state is ServiceState.RESTARTING:
            return None
        return found

    def _prepare_and_start(self) -> bool:
        if self.status.state is not ServiceState.RESTARTING:
            self._move(ServiceState.PREPARING, "")
        pauses = Backoff(_FIRST_PAUSE_S, 10.0)
        while not self._is_asked_to_stop.is_set():
            try:
                with stopped_when(self._is_asked_to_stop.is_set):
                    launch = self._preparer.prepare(self.spec, self.folder, self._report)
                return self._start(launch)
            except FlopsError as error:
                if error.code not in PASSING_ERRORS:
                    raise
                self._report(f"waiting: {error.message}")
                self._is_asked_to_stop.wait(pauses.next_s())
        return False

    def _start(self, launch: Launch) -> bool:
        with self._lock:
            if self._is_asked_to_stop.is_set():
                return False
            running = self.status.model_copy(update={"state": ServiceState.RUNNING, "detail": ""})
            gpus = self._gpus.take(self.spec.id, self.spec.resources.vgpus)
            self._progress = Progress(self.status, self.folder.events_size(), gpus)
            # Kept before the start: a daemon that is killed in between finds out by asking the runtime.
            self.folder.save(replace(self._progress, status=running))
            reach = launch.reach.model_copy(update={"gpus": gpus})
            self._runtime.start(
                self.spec.id, launch.argv, launch.env, launch.work_dir, self.spec.resources, reach
            )
            return True

    def _watch(self) -> ServiceStatus | None:
        """Wait for the service's end; None when it has to be stopped.

        Raises:
            FlopsError: ``disk_full`` or ``out_of_storage`` when it was ended for what it wrote; a new start
                would write it again.
        """
        try:
            while not self._is_asked_to_stop.wait(WATCH_INTERVAL_S):
                status = self._runtime.status(self.spec.id)
                ended = status if status is not None and status.state.is_final else None
                if ended is None or ended.state is ServiceState.FAILED:
                    self._guard_disk(has_failed=ended is not None)
                if ended is not None:
                    return ended
        finally:
            self._disk.forget(self.spec.id)
        return None

    def _guard_disk(self, *, has_failed: bool) -> None:
        """End the service if it fills the disk or its part of it, and give back what it wrote."""
        limit_mb = self.spec.resources.storage_mb
        problem = self._disk.problem_of(self.spec.id, self.folder.work_dir, limit_mb, has_failed=has_failed)
        if problem is not None:
            self._runtime.stop(self.spec.id, grace_s=0.0)
            self.folder.clear_work()
            raise problem

    def _take_end(self, ended: ServiceStatus) -> bool:
        if ended.state is ServiceState.COMPLETED:
            self._move(ServiceState.COMPLETED, "It has done its work.", exit_code=0)
            return False
        error = self._failure_of(ended)
        if self.status.restarts >= self._max_restarts():
            self._fail(error, exit_code=ended.exit_code)
            return False
        detail = f"It is started again: {error['message']}"
        restarts = self.status.restarts + 1
        self._move(ServiceState.RESTARTING, detail, exit_code=ended.exit_code, error=error, restarts=restarts)
        return True

    def _max_restarts(self) -> int:
        most, unheard = self.spec.max_restarts, self.spec.max_unheard_restarts
        return most if unheard is None or has_listened(self.folder.events) else min(most, unheard)

    def _failure_of(self, ended: ServiceStatus) -> dict[str, Any]:
        """What the user is told: what the service said itself, unless it was killed for want of memory."""
        told = last_failure(self.folder.events, self._progress.run_offset)
        error = FlopsError.from_dict(
            ended.error
            or FlopsError(
                ErrorCode.SERVICE_FAILED, f"{self.spec.id} was ended by a signal from outside."
            ).to_dict()
        )
        if told is not None and error.code is not ErrorCode.OUT_OF_MEMORY:
            return told
        details = {**error.details, "service_id": self.spec.id}
        if not self._preparer.site.hides_output(self.spec.kind):
            output = self._runtime.output(self.spec.id, tail_bytes=LAST_OUTPUT_BYTES).strip()
            details |= {"output": output} if output else {}
        return FlopsError(error.code, error.message, hint=error.hint, details=details).to_dict()

    def _fail(self, error: dict[str, Any], *, exit_code: int | None) -> None:
        self._move(ServiceState.FAILED, str(error.get("message", "")), exit_code=exit_code, error=error)

    def _report(self, step: str) -> None:
        with self._lock:
            state = self.status.state
            if not state.is_final:  # a restart was told with its reason, which no step may hide
                self._move(ServiceState.PREPARING if state is ServiceState.RESTARTING else state, step)

    def _move(
        self,
        state: ServiceState,
        detail: str,
        *,
        exit_code: int | None = None,
        error: dict[str, Any] | None = None,
        restarts: int | None = None,
    ) -> None:
        """Enter a state. Once a stop was asked for, the only state to enter is stopped."""
        with self._lock:
            before = self.status
            is_ended = before.state is ServiceState.STOPPED and self._is_asked_to_stop.is_set()
            if is_ended or (self._is_asked_to_stop.is_set() and not state.is_final):
                return
            status = ServiceStatus(
                service_id=self.spec.id,
                state=state,
                detail=detail,
                exit_code=exit_code,
                error=error,
                restarts=before.restarts if restarts is None else restarts,
            )
            self._progress = replace(self._progress, status=status)
            if status.model_copy(update={"detail": before.detail}) != before:
                self.folder.save(self._progress)
            if state.is_final:
                self._gpus.give_back(self.spec.id)
                self._has_ended.set()
        if state is not before.state:
            _log.info("%s: %s%s", self.spec.id, state.value, f" ({detail})" if detail else "")
