"""What a service tells is told whole or not at all."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops import actor
from flops.actor import EVENTS_FILE, EventLog
from flops.testing.disk import small_disk
from flops.testing.waiting import until


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, "32k") as disk:
        yield disk


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return ballast


def told(disk: Path) -> list[str]:
    return [json.loads(line)["message"] for line in (disk / EVENTS_FILE).read_text().splitlines()]


def test_an_event_waits_for_space_and_is_whole(disk: Path) -> None:
    events = EventLog(disk)
    events.tell("progress", message="first")
    ballast = fill(disk)
    long = "x" * 6_000  # begins in the last page that the file has, and needs another one
    teller = threading.Thread(target=events.tell, args=("progress",), kwargs={"message": long})
    teller.start()
    teller.join(0.5)
    assert teller.is_alive()
    assert told(disk) == ["first"]
    ballast.unlink()
    until(lambda: not teller.is_alive())
    assert told(disk) == ["first", long]


def test_what_never_fits_leaves_nothing_behind(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "_SPACE_PATIENCE_S", 0.1)
    events = EventLog(disk)
    events.tell("progress", message="first")
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        events.tell("progress", message="x" * 6_000)
    events.tell("progress", message="last")
    assert told(disk) == ["first", "last"]
