from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.sqlite_file import check_sqlite_file
from flops.cli.examination import run_checks
from flops.core.health import Finding, Severity, fine
from flops.errors import ErrorCode, FlopsError


def test_a_check_that_hangs_fails_or_has_a_defect_hides_no_other_one() -> None:
    release = threading.Event()

    def hang() -> Iterator[Finding]:
        release.wait(20)
        yield fine("hang", "h", "It came late.")

    def fail() -> Iterator[Finding]:
        raise FlopsError(ErrorCode.CONFIG_CORRUPT, "conf.json is no JSON.", hint="Mend it.")

    def break_down() -> Iterator[Finding]:
        raise ZeroDivisionError("by zero")

    began_s = time.monotonic()
    checks = {
        "hang": hang,
        "fail": fail,
        "defect": break_down,
        "fine": lambda: [fine("fine", "f", "Good.")],
    }
    try:
        found = run_checks(checks, limit_s=0.3)
    finally:
        release.set()
    assert time.monotonic() - began_s < 3
    assert [(f.check, f.severity) for f in found] == [
        ("hang", Severity.PROBLEM),
        ("fail", Severity.PROBLEM),
        ("defect", Severity.PROBLEM),
        ("fine", Severity.OK),
    ]
    assert "within 0.3 s" in found[0].what
    assert (found[1].what, found[1].advice) == ("conf.json is no JSON.", "Mend it.")
    assert "ZeroDivisionError: by zero" in found[2].what


def test_a_database_is_looked_at_while_it_is_in_use_and_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a b%20.sqlite"  # a name that a URI would read as another one
    with sqlite3.connect(path) as owner:
        owner.execute("PRAGMA journal_mode=WAL")
        owner.execute("CREATE TABLE t (x)")
        owner.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(1_000)])
        owner.commit()
        before = path.read_bytes()
        owner.execute("BEGIN IMMEDIATE")  # another one writes
        check_sqlite_file(path, within_s=2)
        owner.rollback()
    assert path.read_bytes() == before
    owner.close()


@pytest.mark.parametrize("damage", [b"\xff" * 4_096, b""], ids=["overwritten", "cut off"])
def test_a_damaged_database_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "projects.sqlite"
    owner = sqlite3.connect(path)
    owner.execute("CREATE TABLE t (x)")
    owner.executemany("INSERT INTO t VALUES (?)", [("word " * 50,) for _ in range(500)])
    owner.commit()
    owner.close()
    whole = path.read_bytes()
    path.write_bytes(
        whole[: len(whole) // 2] + damage + (whole[len(whole) // 2 + 4_096 :] if damage else b"")
    )
    with pytest.raises(FlopsError) as caught:
        check_sqlite_file(path, within_s=2)
    assert caught.value.code is ErrorCode.FILE_UNREADABLE
    assert str(path) in caught.value.message


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "projects.sqlite"
    path.write_bytes(b"no database " * 500)
    with pytest.raises(FlopsError, match="not a database"):
        check_sqlite_file(path, within_s=2)
