from __future__ import annotations

import json
from pathlib import Path

import pytest

from flops.node import event_log
from flops.node.event_log import WINDOW_LINES, EventLogReader, has_listened, last_failure


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def tell(log: Path, *numbers: int) -> None:
    with log.open("a") as file:
        for number in numbers:
            file.write(json.dumps({"kind": "progress", "message": str(number)}) + "\n")


def lines(reader: EventLogReader, *, is_final: bool = False) -> list[int]:
    return [number for number, _ in reader.next_lines(is_final=is_final)]


def test_lines_are_given_once_in_order(log: Path) -> None:
    reader = EventLogReader(log, 0)
    assert lines(reader) == []
    assert reader.is_drained()
    tell(log, 1, 2)
    assert [(n, e["message"]) for n, e in reader.next_lines(is_final=False)] == [(1, "1"), (2, "2")]
    tell(log, 3)
    assert lines(reader) == [3]
    assert not reader.is_drained()
    for line in (1, 2, 3):
        reader.acknowledge(line)
    assert reader.is_drained()
    assert lines(reader) == []


def test_it_begins_behind_what_is_stored(log: Path) -> None:
    tell(log, 1, 2, 3)
    assert lines(EventLogReader(log, 2)) == [3]
    reader = EventLogReader(log, 3)
    assert lines(reader) == []
    assert reader.is_drained()


def test_a_line_that_is_being_written_waits(log: Path) -> None:
    tell(log, 1)
    with log.open("a") as file:
        file.write('{"kind": ')
    reader = EventLogReader(log, 0)
    assert lines(reader) == [1]
    with log.open("a") as file:
        file.write('"progress"}\n')
    assert lines(reader) == [2]


def test_a_broken_last_line_of_an_ended_service_keeps_its_place(log: Path) -> None:
    log.write_text('{"kind": "progress"}\n[1]\n{"kind": "fai')
    events = list(EventLogReader(log, 0).next_lines(is_final=True))
    assert [number for number, _ in events] == [1, 2, 3]
    assert events[2][1]["message"] == "Line 3 of the event log cannot be read."


def test_only_so_many_lines_are_under_way(log: Path) -> None:
    tell(log, *range(3 * WINDOW_LINES))
    reader = EventLogReader(log, 0)
    assert len(lines(reader)) == WINDOW_LINES
    assert lines(reader) == []
    reader.acknowledge(10)
    assert lines(reader) == list(range(WINDOW_LINES + 1, WINDOW_LINES + 11))


def test_a_gap_is_filled(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "_RESEND_PAUSE_S", -1.0)
    tell(log, 1, 2, 3)
    reader = EventLogReader(log, 0)
    lines(reader)
    reader.acknowledge(1)
    assert lines(reader) == []
    reader.acknowledge(1)
    assert lines(reader) == [2, 3]


def test_what_is_not_acknowledged_is_sent_again(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(log, 1, 2)
    reader = EventLogReader(log, 0)
    assert lines(reader) == [1, 2]
    monkeypatch.setattr(event_log, "RESEND_AFTER_S", -1.0)
    assert lines(reader) == [1, 2]
    reader.acknowledge(2)
    assert lines(reader) == []


def test_a_cluster_that_forgot_gets_it_again(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "_RESEND_PAUSE_S", -1.0)
    tell(log, 1, 2, 3)
    reader = EventLogReader(log, 2)
    lines(reader)
    reader.acknowledge(0)
    assert lines(reader) == [1, 2, 3]


def test_a_service_has_listened_since_it_first_told_so(log: Path) -> None:
    assert not has_listened(log)
    log.write_text('{"kind": "progress", "message": "listening"}\n')
    assert not has_listened(log)
    with log.open("a") as file:
        file.write('no json\n{"kind": "listening", "address": "h:1"}\n{"kind": "failed"}\n')
    assert has_listened(log)


def test_the_last_failure_of_this_run_is_found(log: Path) -> None:
    assert last_failure(log, 0) is None
    log.write_text('{"kind": "failed", "error": {"code": "old"}}\n')
    offset = log.stat().st_size
    assert last_failure(log, offset) is None
    with log.open("a") as file:
        file.write('{"kind": "failed", "error": {"code": "new"}}\nno json\n')
    assert last_failure(log, offset) == {"code": "new"}
