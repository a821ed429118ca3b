"""The output of containers, taken from the engine's log into the node's files of bounded size."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from flops.adapters.containers.engine import ContainerEngine, EngineFacts
from flops.adapters.output_files import OutputWriter, remove_output
from flops.adapters.runtime_records import read_output_of
from flops.core.ids import ServiceId
from flops.core.output import Output
from flops.durable_file import file_error, write_durably
from flops.errors import FlopsError

PLACE_FILE = "output.json"  # how far the engine's log was taken over


class ContainerOutput:
    """Takes over what containers write: when it is asked for, and at their end. Not thread-safe.

    The engine's log has no places to go on from, only times, which Podman tells to the second. So what is
    kept is the last second, and how many pieces of it were taken.

    Args:
        engine: has the logs.
        folder: takes the files, ``<service id>.log``.
        limit_bytes: largest size of a file, and of the engine's log.
    """

    def __init__(self, engine: ContainerEngine, folder: Path, limit_bytes: int) -> None:
        self._engine = engine
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._places: dict[ServiceId, tuple[int, int]] = {}  # as in the files, which a full disk keeps back

    def log_config(self, facts: EngineFacts) -> dict[str, Any]:
        """What the engine is told: keep it in a file of bounded size, which its API can read."""
        size = {"max-size": str(self._limit_bytes)}
        if facts.name == "podman":
            return {"Type": "k8s-file", "Config": size}
        return {"Type": "json-file", "Config": {**size, "max-file": "2"}}

    def begin(self, service_id: ServiceId, folder: Path, heading: str) -> None:
        """A container is about to start.

        Args:
            service_id: the service.
            folder: the runtime's folder of it.
            heading: line to begin with, "" for none.

        Raises:
            FlopsError: ``disk_full``, ``file_unreadable``.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise file_error(exc, self._folder) from exc
        (folder / PLACE_FILE).unlink(missing_ok=True)
        self._places[service_id] = (0, 0)
        if heading:
            OutputWriter(self._path(service_id), self._limit_bytes).write_line(heading)

    def take(self, service_id: ServiceId, folder: Path, container: str) -> None:
        """Take over what a container has written since the last time."""
        second, taken = self._places.get(service_id) or _load_place(folder)
        pieces = list(self._engine.logs(container, second))
        known = sum(1 for at_s, _ in pieces if at_s == second)
        new = pieces[taken if known >= taken else 0 :]  # fewer than before: the engine has begun a new file
        if not new:
            return
        writer = OutputWriter(self._path(service_id), self._limit_bytes)
        for _, data in new:
            writer.write(data)
        last = pieces[-1][0]
        place = last, sum(1 for at_s, _ in pieces if at_s == last)
        self._places[service_id] = place
        with suppress(FlopsError):  # on a full disk, the next daemon takes it once more
            write_durably(folder / PLACE_FILE, json.dumps(place))

    def read(self, service_id: ServiceId, after: int | None, limit_bytes: int) -> Output:
        """What follows a place in what was taken over; its end when `after` is None."""
        return read_output_of(self._path(service_id), after, limit_bytes)

    def remove(self, service_id: ServiceId) -> None:
        """Remove the files."""
        self._places.pop(service_id, None)
        remove_output(self._path(service_id))

    def _path(self, service_id: ServiceId) -> Path:
        return self._folder / f"{service_id}.log"


def _load_place(folder: Path) -> tuple[int, int]:
    try:
        second, taken = json.loads((folder / PLACE_FILE).read_text())
        return int(second), int(taken)
    except (OSError, ValueError, TypeError):
        return 0, 0
