"""Gives back what the control plane keeps of nothing any more, on a thread of its own, every few minutes."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flops.core.cluster import Service
from flops.core.ids import Digest
from flops.core.mock_progress import RUNNING
from flops.core.retention import Entry, Limits, choose_victims
from flops.errors import FlopsError
from flops.ports import Clock, Orchestrator, ProjectStore
from flops.retention_ports import KeptBlobs

_log = logging.getLogger(__name__)

DAY_S = 86_400.0
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass(frozen=True)
class RetentionOptions:
    """What is kept for how long.

    Args:
        keep_logs_projects: the output of ended services is kept of so many projects, the last ones.
        keep_logs_s: and so long after the project's last service has ended.
        interval_s: between two sweeps.
        unreferenced_s: blobs that nothing refers to are kept so long after their last use: an upload comes
            before what refers to it.
    """

    keep_logs_projects: int = 200
    keep_logs_s: float = 30 * DAY_S
    interval_s: float = 600.0
    unreferenced_s: float = 3_600.0


class Retention:
    """Sweeps at its start and every few minutes.

    Ended services go with their output when there are too many or they are too old; their project stays, with
    its history. Blobs go that no record names. Records are read as text, and every digest in them counts: no
    blob is lost because somebody forgot to name a field here.

    Args:
        store: what the records are of.
        orchestrator: whose services need blobs.
        blobs: are swept.
        clock: says how long ago a blob was used.
        options: see `RetentionOptions`.
        others: sweep what else there is, in passing.
    """

    def __init__(
        self,
        store: ProjectStore,
        orchestrator: Orchestrator,
        blobs: KeptBlobs,
        clock: Clock,
        options: RetentionOptions | None = None,
        others: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._store = store
        self._orchestrator = orchestrator
        self._blobs = blobs
        self._clock = clock
        self._options = options or RetentionOptions()
        self._others = tuple(others)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after what it does now."""
        self._is_closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def sweep(self) -> None:
        """Give back what nothing refers to; may be done at any time, also twice at once.

        Raises:
            FlopsError: whatever is in the way; what is left goes with the next sweep.
        """
        self._forget_services()
        self._blobs.sweep()
        self._sweep_blobs()
        for sweep in self._others:
            sweep()

    def _run(self) -> None:
        while not self._is_closed.is_set():
            try:
                self.sweep()
            except FlopsError as error:
                _log.warning("the sweep was cut short: %s", error)
            except Exception:  # noqa: BLE001 (the thread must outlive whatever it meets)
                _log.exception("the sweep stumbled")
            self._is_closed.wait(self._options.interval_s)

    def _forget_services(self) -> None:
        ended: dict[str, list[Service]] = {}  # by project, or mock data
        for service in self._orchestrator.services():
            if service.status.state.is_final:
                ended.setdefault(service.spec.project_id, []).append(service)
        active = {str(project.id) for project in self._store.all() if not project.stage.is_final}
        active |= {mock.id for mock in self._store.list_mock_data() if mock.state == RUNNING}
        entries = [
            Entry(key=key, used_at_s=max(s.updated_at_s for s in services), is_in_use=key in active)
            for key, services in ended.items()
        ]
        limits = Limits(max_count=self._options.keep_logs_projects, max_age_s=self._options.keep_logs_s)
        for victim in choose_victims(entries, limits, self._clock.now_s()):
            for service in ended[victim.key]:
                self._orchestrator.remove_service(service.spec.id)
            count = len(ended[victim.key])
            _log.info("removed the output of %d ended services of %s: it is old", count, victim.key)

    def _sweep_blobs(self) -> None:
        since_s = self._clock.now_s() - self._options.unreferenced_s
        stored = self._blobs.digests()  # before the records are read: what comes later is young
        since_s = min([since_s, *self._begins_of_work()])
        referenced = self._referenced()
        for digest in stored:
            if digest not in referenced and not self._is_closed.is_set():
                size_bytes = self._blobs.remove_unless_used(digest, since_s)
                if size_bytes:
                    _log.info("removed blob %s, %d bytes: nothing refers to it", digest[:12], size_bytes)

    def _begins_of_work(self) -> list[float]:
        """When the projects that run began: nodes that are away may tell hours later what was uploaded."""
        return [project.created_at_s for project in self._store.all() if not project.stage.is_final]

    def _referenced(self) -> set[Digest]:
        # The services first: a project that starts one later names the same blobs itself.
        texts = [
            service.spec.model_dump_json()
            for service in self._orchestrator.services()
            if service.should_run and not service.status.state.is_final
        ]
        texts += [mock.dataset_blob or "" for mock in self._store.list_mock_data() if mock.state == RUNNING]
        texts += [project.model_dump_json() for project in self._store.all()]
        texts += [environment.model_dump_json() for environment in self._store.environments()]
        return {Digest(found) for text in texts for found in _DIGEST.findall(text)}
