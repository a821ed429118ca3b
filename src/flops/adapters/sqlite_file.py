"""Whether a SQLite file is sound, asked without writing to it, also while its owner uses it."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

from flops.errors import ErrorCode, FlopsError

_STEPS_BETWEEN_LOOKS = 10_000


def check_sqlite_file(path: Path, *, within_s: float) -> None:
    """Have SQLite look through a file.

    Args:
        path: an existing file.
        within_s: give up after that.

    Raises:
        FlopsError: ``file_unreadable`` for a damaged file or one that cannot be read, ``timeout``.
    """
    deadline_s = time.monotonic() + within_s
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=within_s)
        ) as connection:
            connection.set_progress_handler(lambda: time.monotonic() > deadline_s, _STEPS_BETWEEN_LOOKS)
            answer = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.Error as exc:
        if time.monotonic() > deadline_s:
            raise FlopsError(
                ErrorCode.TIMEOUT, f"{path} could not be looked through in {within_s:g} s."
            ) from exc
        raise FlopsError(ErrorCode.FILE_UNREADABLE, f"{path} cannot be used: {exc}.") from exc
    if answer != "ok":
        first = answer.strip().splitlines()[-1]
        raise FlopsError(ErrorCode.FILE_UNREADABLE, f"{path} is damaged: {first}.")
