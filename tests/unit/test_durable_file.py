"""Files that are whole at any moment, and what killed writers leave of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from flops.durable_file import remove_unfinished, write_durably
from flops.testing.waiting import until

WRITE = """
import sys
from pathlib import Path
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
