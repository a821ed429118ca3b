"""What both runtimes keep of a service on disk, read in one way: its folder, its records, its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flops.adapters.output_files import open_parts
from flops.core.ids import ServiceId
from flops.core.output import Output, piece_of
from flops.errors import ErrorCode, FlopsError


def folder_of(root: Path, service_id: ServiceId) -> Path:
    """The folder of a service's records.

    Raises:
        FlopsError: ``usage`` for an id that would lead elsewhere.
    """
    if not service_id or "/" in service_id or service_id.startswith("."):
        raise FlopsError(ErrorCode.USAGE, f"{service_id!r} cannot be the id of a service.")
    return root / service_id


def read_record(path: Path) -> dict[str, Any] | None:
    """A record as it was written; None when there is none, or it cannot be read."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None


def read_output_of(path: Path, after: int | None, limit_bytes: int) -> Output:
    """What follows a place in an output, over its files and restarts of the service.

    Args:
        path: the current file of the output.
        after: the place; None for the end of the output.
        limit_bytes: how much is read at the most.
    """
    with open_parts(path) as parts:
        return piece_of(
            lambda start, end: b"".join(part.read(start, end) for part in parts),
            parts[0].place if parts else 0,
            parts[-1].end if parts else 0,
            after=after,
            limit_bytes=limit_bytes,
        )
