"""The services that the cluster placed on this node: which there are, and what becomes of them."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from flops.core.cluster import ServiceSpec, ServiceState, ServiceStatus, ServiceUsage
from flops.core.ids import ServiceId
from flops.core.output import Output
from flops.disclosure import withheld_output
from flops.errors import ErrorCode, FlopsError
from flops.node.disk_guard import DiskGuard
from flops.node.gpu_shares import GpuShares
from flops.node.preparation import Preparer
from flops.node.service_folder import ServiceFolder, folder_name
from flops.node.service_runner import ServiceRunner
from flops.ports import Runtime

STOP_TIMEOUT_S = 30.0
_USAGE_FRESH_S = 0.5

_log = logging.getLogger(__name__)


class Supervisor:
    """Starts, watches and ends the node's services; thread-safe, and no method waits for a service.

    Args:
        root: one folder per service.
        preparer: gets what a service needs.
        runtime: runs processes.
        gpus: numbers of the GPUs that services may use.
    """

    def __init__(self, root: Path, preparer: Preparer, runtime: Runtime, gpus: Sequence[int] = ()) -> None:
        self._root = root
        self._preparer = preparer
        self._runtime = runtime
        self._disk = DiskGuard()
        self._gpus = GpuShares(gpus)
        self._lock = threading.Lock()
        self._runners: dict[ServiceId, ServiceRunner] = {}
        self._removals: dict[ServiceId, tuple[threading.Thread, ServiceRunner]] = {}
        self._workers: set[threading.Thread] = set()
        self._usages: dict[ServiceId, tuple[float, ServiceUsage]] = {}
        self._unwanted: set[ServiceId] = set()  # the cluster will not have them run again
        self._freed: set[ServiceId] = set()

    def adopt(self) -> None:
        """Take over the services that an earlier daemon left: those that run are watched.

        What did not run waits for the cluster to say whether it should. To be called once, first.
        """
        if not self._root.is_dir():
            return
        for path in sorted(self._root.iterdir()):
            folder = ServiceFolder(path)
            spec = folder.load_spec()
            if spec is None or spec.id != path.name:
                _log.warning("%s holds no service, and is removed", path)
                folder.remove()
                continue
            runner = self._make_runner(spec, known=True)
            self._runners[spec.id] = runner
            if not runner.status.state.is_final and self._runtime.status(spec.id) is not None:
                runner.start()

    def start(self, spec: ServiceSpec) -> None:
        """Run a service. One that is known already is left alone."""
        with self._lock:
            if spec.id not in self._runners:
                self._start_new(spec)

    def ensure(self, services: Iterable[ServiceSpec], stopping: Iterable[str]) -> None:
        """Bring the node to what the cluster wants: no service that is not listed, those listed running.

        A service that has completed or failed is not run again; one that was ended with its node is.

        Args:
            services: what this node should have.
            stopping: ids of those that must not run.
        """
        wanted = {spec.id: spec for spec in services}
        must_not_run = set(stopping)
        for service_id in self.ids():
            if service_id not in wanted:
                self.remove(service_id)
        for spec in wanted.values():
            if spec.id in must_not_run:
                self.stop(spec.id)
            else:
                self._bring_up(spec)

    def _bring_up(self, spec: ServiceSpec) -> None:
        with self._lock:
            runner = self._runners.get(spec.id)
            if runner is None:
                self._start_new(spec)
            elif runner.status.state is ServiceState.STOPPED:
                self._runners[spec.id] = self._make_runner(spec, known=True)
                self._runners[spec.id].start()
            elif not runner.status.state.is_final:
                runner.start()

    def stop(self, service_id: ServiceId) -> None:
        """End a service; its files stay. An unknown or ended one is no error."""
        with self._lock:
            runner = self._runners.get(service_id)
            if runner is not None:
                self._unwanted.add(service_id)
            if runner is not None and not runner.status.state.is_final:
                runner.ask_to_stop()
                self._work(functools.partial(runner.stop, "It was asked to stop.", timeout_s=STOP_TIMEOUT_S))

    def free(self, service_id: ServiceId) -> None:
        """Give back what an ended service worked with, if it never runs again; its output and end stay.

        To be called when the cluster has every event of it. A service that was ended with its node, not by
        the cluster, goes on in its folder later.
        """
        with self._lock:
            runner = self._runners.get(service_id)
            if runner is None or service_id in self._freed:
                return
            state = runner.status.state
            is_over = state in {ServiceState.COMPLETED, ServiceState.FAILED}
            if is_over or (state is ServiceState.STOPPED and service_id in self._unwanted):
                self._freed.add(service_id)
                self._work(runner.free)

    def remove(self, service_id: ServiceId) -> None:
        """End a service and remove everything of it. An unknown one is no error."""
        with self._lock:
            runner = self._runners.pop(service_id, None)
            self._usages.pop(service_id, None)
            self._unwanted.discard(service_id)
            self._freed.discard(service_id)
            if runner is not None:
                _log.info("%s is removed", service_id)
                self._forget_removals()
                self._removals[service_id] = (self._work(runner.remove), runner)

    def stop_all(self, detail: str) -> None:
        """End every service, and wait until none runs."""
        with self._lock:
            active = [runner for runner in self._runners.values() if not runner.status.state.is_final]
            for runner in active:
                runner.ask_to_stop(detail)
            for runner in active:
                self._work(functools.partial(runner.stop, detail, timeout_s=STOP_TIMEOUT_S))
        self.join()

    def join(self) -> None:
        """Wait until what was asked for is done."""
        for worker in list(self._workers):
            worker.join(STOP_TIMEOUT_S * 2)

    def ids(self) -> list[ServiceId]:
        """Ids of all services."""
        with self._lock:
            return list(self._runners)

    def digests_in_use(self) -> frozenset[str]:
        """Bundles, environments and images of services that run, will run, or are about to end."""
        with self._lock:
            self._forget_removals()
            specs = [runner.spec for _, runner in self._removals.values()]
            specs += [
                runner.spec
                for runner in self._runners.values()
                if runner.is_active or not runner.status.state.is_final
            ]
        digests = {d for spec in specs for d in (spec.bundle, spec.environment, spec.model_environment)}
        images = {spec.image.rpartition("@sha256:")[2] for spec in specs if spec.image}
        return frozenset(digest for digest in digests if digest is not None) | images

    def specs(self) -> dict[ServiceId, ServiceSpec]:
        """What the services are."""
        with self._lock:
            return {service_id: runner.spec for service_id, runner in self._runners.items()}

    def statuses(self, *, with_usage: bool = False) -> Mapping[ServiceId, ServiceStatus]:
        """Where every service stands; measuring what they use takes milliseconds."""
        with self._lock:
            statuses = {service_id: runner.status for service_id, runner in self._runners.items()}
        if not with_usage:
            return statuses
        return {
            service_id: status.model_copy(update={"usage": self._usage(service_id)})
            if status.state is ServiceState.RUNNING
            else status
            for service_id, status in statuses.items()
        }

    def _usage(self, service_id: ServiceId) -> ServiceUsage:
        """Measured once for all who ask at about the same time: CPU counts since the last measurement."""
        now_s = time.monotonic()
        measured_at_s, usage = self._usages.get(service_id, (-_USAGE_FRESH_S, ServiceUsage()))
        if now_s - measured_at_s >= _USAGE_FRESH_S:
            usage = self._runtime.usage(service_id)
            with self._lock:
                if service_id in self._runners:  # not removed meanwhile
                    self._usages[service_id] = (now_s, usage)
        return usage

    def events_file(self, service_id: ServiceId) -> Path:
        """The event log of a service."""
        return ServiceFolder(self._root / folder_name(service_id)).events

    def output(self, service_id: ServiceId, after: int | None, limit_bytes: int) -> Output:
        """What follows a place in a service's output, or its end, if the operator lets others see it.

        Raises:
            FlopsError: ``service_not_found``, ``forbidden``.
        """
        with self._lock:
            runner = self._runners.get(service_id)
        if runner is None:
            raise FlopsError(ErrorCode.SERVICE_NOT_FOUND, f"Service {service_id} is not on this node.")
        site = self._preparer.site
        if site.hides_output(runner.spec.kind):
            raise withheld_output(service_id, site.name)
        return self._runtime.read_output(service_id, after, limit_bytes)

    def _start_new(self, spec: ServiceSpec) -> None:
        try:
            folder_name(spec.id)
        except FlopsError as error:
            _log.warning("a service is not started: %s", error)
            return
        runner = self._make_runner(spec, known=False)
        self._runners[spec.id] = runner
        removal, _ = self._removals.pop(spec.id, (None, None))
        self._work(functools.partial(_start_after, removal, runner))

    def _forget_removals(self) -> None:
        self._removals = {i: removal for i, removal in self._removals.items() if removal[0].is_alive()}

    def _make_runner(self, spec: ServiceSpec, *, known: bool) -> ServiceRunner:
        folder = ServiceFolder(self._root / spec.id)
        progress = folder.load(spec.id) if known else None
        return ServiceRunner(spec, folder, self._preparer, self._runtime, progress, self._disk, self._gpus)

    def _work(self, task: Callable[[], None]) -> threading.Thread:
        """Do something that waits, in a thread of its own."""
        self._workers = {worker for worker in self._workers if worker.is_alive()}
        worker = threading.Thread(target=task, name="supervisor", daemon=True)
        self._workers.add(worker)
        worker.start()
        return worker


def _start_after(removal: threading.Thread | None, runner: ServiceRunner) -> None:
    if removal is not None:  # ids are never used twice; but a cluster that forgot and asks again is obeyed
        removal.join()
    runner.start()
