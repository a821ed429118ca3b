"""Files that are whole at any moment, and what killed writers leave of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flops.durable_file import SharedSync, remove_unfinished, write_durably
from flops.testing.waiting import until

WRITE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flops.durable_file import write_durably
while True:
    write_durably(Path(sys.argv[1]), "x" * 20_000_000)
"""


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_durably(path, "whole")
    own = tmp_path / ".mine.tmp"
    own.touch()
    unfinished = f"{'.' + path.name}.*.tmp"
    with subprocess.Popen([sys.executable, "-c", WRITE, str(path)]) as writer:
        until(lambda: bool(list(tmp_path.glob(unfinished))), "a write")
        writer.kill()
    if not list(tmp_path.glob(unfinished)):  # it was killed between two writes
        (tmp_path / f".{path.name}.{'0' * 32}.tmp").touch()
    now_s = time.time()
    remove_unfinished(tmp_path, now_s - 60)
    assert list(tmp_path.glob(unfinished))  # somebody may be writing it
    for left in tmp_path.glob(unfinished):
        os.utime(left, (1, 1))
    remove_unfinished(tmp_path, now_s - 60)
    assert sorted(tmp_path.iterdir()) == [own, path]
    remove_unfinished(tmp_path / "absent", now_s)


def test_many_threads_share_a_sync_and_none_is_served_by_one_that_had_begun_before() -> None:
    done: set[int] = set()
    durable: set[int] = set()
    syncs = []

    def sync() -> None:
        seen = set(done)
        syncs.append(len(seen))
        time.sleep(0.002)  # a disk takes its time
        durable.update(seen)

    shared = SharedSync(sync)

    def write(worker: int) -> None:
        for number in range(worker * 1_000, worker * 1_000 + 20):
            done.add(number)
            shared.wait()
            assert number in durable

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(durable) == 160
    assert len(syncs) < 160


def test_a_sync_that_fails_serves_nobody() -> None:
    outcomes = iter([OSError(5, "Input/output error"), None])

    def sync() -> None:
        outcome = next(outcomes)
        if outcome is not None:
            raise outcome

    shared = SharedSync(sync)
    with pytest.raises(OSError, match="Input/output"):
        shared.wait()
    shared.wait()
    with pytest.raises(StopIteration):
        shared.wait()
