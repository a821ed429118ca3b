"""Reads a service's event log line by line, for sending it on until the cluster has stored it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WINDOW_LINES = 100  # sent and not acknowledged; more wait
RESEND_AFTER_S = 5.0  # without an acknowledgement
_RESEND_PAUSE_S = 0.5
_MAX_LINE_BYTES = 4 * 1024**2


class EventLogReader:
    """Follows one event log on one connection.

    Args:
        path: the log; it may not exist yet.
        acknowledged: the last line that the cluster has stored.
    """

    def __init__(self, path: Path, acknowledged: int) -> None:
        self._path = path
        self._acknowledged = acknowledged
        self._line = 0  # the last one read
        self._offset = 0  # just behind it
        self._has_gap = False
        self._changed_at_s = time.monotonic()

    def next_lines(self, *, is_final: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        """Lines to send now, with their numbers.

        Args:
            is_final: the service has ended, so a last line without its end will not get one.
        """
        if self._must_resend():
            self._line, self._offset, self._has_gap = 0, 0, False
            self._changed_at_s = time.monotonic()
        for number, line in self._read(is_final=is_final):
            if number > self._acknowledged:
                yield number, _parse(number, line)

    def acknowledge(self, line: int) -> None:
        """The cluster has stored everything up to `line`; told twice, the next line is missing there."""
        if line > self._acknowledged:
            self._changed_at_s = time.monotonic()
        elif line < self._line:
            self._has_gap = True
        self._acknowledged = line

    def is_drained(self) -> bool:
        """Whether the cluster has stored every line that is there."""
        try:
            size = self._path.stat().st_size
        except OSError:
            return True
        return size <= self._offset and self._line <= self._acknowledged

    def _must_resend(self) -> bool:
        pause_s = time.monotonic() - self._changed_at_s
        is_late = self._line > self._acknowledged and pause_s > RESEND_AFTER_S
        return is_late or (self._has_gap and pause_s > _RESEND_PAUSE_S)

    def _read(self, *, is_final: bool) -> Iterator[tuple[int, bytes]]:
        try:
            if self._path.stat().st_size <= self._offset:
                return
            file = self._path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self._offset)
            while self._line - self._acknowledged < WINDOW_LINES:
                line = file.readline(_MAX_LINE_BYTES)
                is_whole = line.endswith(b"\n") or len(line) == _MAX_LINE_BYTES
                if not line or not (is_whole or is_final):
                    return
                self._line += 1
                self._offset += len(line)
                yield self._line, line


def last_failure(path: Path, offset: int) -> dict[str, Any] | None:
    """The error of the last ``failed`` event that stands behind `offset`; None when there is none."""
    errors = [event.get("error") for event in _events_behind(path, offset) if event.get("kind") == "failed"]
    return next((error for error in reversed(errors) if isinstance(error, dict)), None)


def has_listened(path: Path) -> bool:
    """Whether the service has ever told that it listens."""
    return bool(last_address(path))


def last_address(path: Path) -> str:
    """Where the service told last that it listens; "" when it never did."""
    told = [event.get("address") for event in _events_behind(path, 0) if event.get("kind") == "listening"]
    return str(told[-1]) if told else ""


def _events_behind(path: Path, offset: int) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(offset)
        for line in file:
            yield _parse(0, line)


def _parse(number: int, line: bytes) -> dict[str, Any]:
    """A line's event; one that cannot be read still has its place, so that no number is missing."""
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if isinstance(event, dict):
        return event
    message = f"Line {number} of the event log cannot be read."
    return {"kind": "progress", "time_s": 0.0, "message": message}
