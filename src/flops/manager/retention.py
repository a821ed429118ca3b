"""Gives back what the control plane keeps of nothing any more, on a thread of its own, every few minutes."""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass

from flops.core.ids import Digest
from flops.core.mock_progress import RUNNING
from flops.errors import FlopsError
from flops.ports import Clock, Orchestrator, ProjectStore
from flops.retention_ports import KeptBlobs

_log = logging.getLogger(__name__)

_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass(frozen=True)
class RetentionOptions:
    """What is kept for how long.

    Args:
        interval_s: between two sweeps.
        unreferenced_s: blobs that nothing refers to are kept so long after their last use: an upload comes
            before what refers to it.
    """

    interval_s: float = 600.0
    unreferenced_s: float = 3_600.0


class Retention:
    """Sweeps at its start and every few minutes.

    Blobs go that no record names. Records are read as text, every digest in them counts: a blob is never lost
    because somebody forgot to name a field here.

    Args:
        store: what the records are of.
        orchestrator: whose services need blobs.
        blobs: are swept.
        clock: says how long ago a blob was used.
        options: see `RetentionOptions`.
    """

    def __init__(
        self,
        store: ProjectStore,
        orchestrator: Orchestrator,
        blobs: KeptBlobs,
        clock: Clock,
        options: RetentionOptions | None = None,
    ) -> None:
        self._store = store
        self._orchestrator = orchestrator
        self._blobs = blobs
        self._clock = clock
        self._options = options or RetentionOptions()
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
        self._blobs.sweep()
        self._sweep_blobs()

    def _run(self) -> None:
        while not self._is_closed.is_set():
            try:
                self.sweep()
            except FlopsError as error:
                _log.warning("the sweep was cut short: %s", error)
            except Exception:  # noqa: BLE001 (the thread must outlive whatever it meets)
                _log.exception("the sweep stumbled")
            self._is_closed.wait(self._options.interval_s)

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
