"""What a node keeps on disk of one service, so that a new daemon knows it."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from flops.actor import EVENTS_FILE
from flops.core.cluster import ServiceSpec, ServiceState, ServiceStatus, ServiceUsage
from flops.core.ids import ServiceId
from flops.durable_file import file_error, write_durably
from flops.errors import ErrorCode, FlopsError

_SPEC_FILE = "spec.json"
_STATUS_FILE = "status.json"
_MAX_ID_CHARACTERS = 150

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a service stands.

    Args:
        status: its state.
        run_offset: size of its event log when its process was started last; what follows was told since.
        gpus: numbers of the GPUs that it was started with.
    """

    status: ServiceStatus
    run_offset: int = 0
    gpus: tuple[int, ...] = ()


class ServiceFolder:
    """The folder of one service: its spec, its progress, and the folder it works in.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def work_dir(self) -> Path:
        """The folder the service may write to; kept over its restarts."""
        return self.path / "work"

    @property
    def events(self) -> Path:
        """The service's event log."""
        return self.work_dir / EVENTS_FILE

    def create(self, spec: ServiceSpec) -> None:
        """Make the folder.

        Raises:
            FlopsError: ``disk_full``, ``file_unreadable``.
        """
        try:
            self.work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise file_error(exc, self.work_dir) from exc
        write_durably(self.path / _SPEC_FILE, spec.model_dump_json())

    def load_spec(self) -> ServiceSpec | None:
        """The service's spec; None when it cannot be read, as after a kill before it was written."""
        try:
            return ServiceSpec.model_validate_json((self.path / _SPEC_FILE).read_bytes())
        except (OSError, ValidationError):
            return None

    def save(self, progress: Progress) -> None:
        """Keep where the service stands; a full disk is logged, since the service itself goes on."""
        status = progress.status.model_copy(update={"usage": ServiceUsage()})
        record = {
            "status": status.model_dump(mode="json"),
            "run_offset": progress.run_offset,
            "gpus": progress.gpus,
        }
        try:
            write_durably(self.path / _STATUS_FILE, json.dumps(record))
        except FlopsError as error:
            _log.warning("the state of %s is not kept: %s", status.service_id, error.message)

    def load(self, service_id: ServiceId) -> Progress:
        """Where the service stood; being prepared when nothing is known."""
        try:
            raw = json.loads((self.path / _STATUS_FILE).read_bytes())
            status = ServiceStatus.model_validate(raw["status"])
            return Progress(status, int(raw["run_offset"]), tuple(raw.get("gpus") or ()))
        except (OSError, ValueError, KeyError, TypeError):
            return Progress(ServiceStatus(service_id=service_id, state=ServiceState.PREPARING))

    def events_size(self) -> int:
        """Bytes in the event log."""
        with contextlib.suppress(OSError):
            return self.events.stat().st_size
        return 0

    def clear_work(self) -> None:
        """Remove what the service wrote, apart from its events."""
        with contextlib.suppress(OSError):
            for path in self.work_dir.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path != self.events:
                    path.unlink(missing_ok=True)

    def remove_work(self) -> None:
        """Remove what the service has written; what it was and how it ended stays."""
        shutil.rmtree(self.work_dir, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)


def folder_name(service_id: str) -> str:
    """Return the id of a service if it can name a folder.

    Raises:
        FlopsError: ``usage``.
    """
    is_plain = all(c.isascii() and (c.isalnum() or c in "-_.") for c in service_id)
    if not is_plain or not service_id.strip(".") or len(service_id) > _MAX_ID_CHARACTERS:
        raise FlopsError(ErrorCode.USAGE, f"{service_id[:200]!r} cannot be the id of a service.")
    return service_id
