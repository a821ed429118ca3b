"""Files that are whole at any moment: written under another name, fsynced, renamed; then the folder is."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from flops.errors import ErrorCode, FlopsError

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def write_durably(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Replace a file's content, all or nothing; missing folders are made, readable by the owner only.

    Raises:
        FlopsError: ``disk_full``, or ``file_unreadable`` when the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 (opens a descriptor)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise file_error(exc, path) from exc


def remove_unfinished(folder: Path, before_s: float) -> None:
    """Remove what killed writers of `write_durably` left in a folder, and nothing else there.

    Args:
        folder: where files are written; it need not exist.
        before_s: younger ones may still be written; seconds since the epoch.
    """
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if _UNFINISHED.fullmatch(path.name) and path.stat().st_mtime < before_s:
                path.unlink()


def keep_token(path: Path) -> str:
    """Read a random token from a file that only its owner can read; made when it is first asked for.

    Raises:
        FlopsError: ``config_corrupt`` when the file is empty; ``disk_full``, ``file_unreadable``.
    """
    if not path.exists():
        write_durably(path, secrets.token_urlsafe(32) + "\n")
    token = path.read_text().strip()
    if not token:
        raise FlopsError(
            ErrorCode.CONFIG_CORRUPT,
            f"The token file {path} is empty.",
            hint="Delete the file: a new token is made at the next start; tokens made from the old one end.",
        )
    return token


def sync_folder(folder: Path) -> None:
    """Make names that were made or removed in a folder durable."""
    _sync(folder, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    _sync(path, 0)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SharedSync:
    """A sync that threads wait for together: one serves all who asked before it began.

    Args:
        sync: makes everything durable that was done before it is called.
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._asking = threading.Lock()
        self._turn = threading.Lock()
        self._asked = 0
        self._served = 0

    def wait(self) -> None:
        """Return when everything that this thread did before is durable.

        Raises:
            OSError: it may not be.
        """
        with self._asking:
            self._asked += 1
            number = self._asked
        with self._turn:
            if self._served < number:
                newest = self._asked
                self._sync()
                self._served = newest


def file_error(exc: OSError, path: Path) -> FlopsError:
    """The error users see when a file cannot be read or written."""
    if exc.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return FlopsError(ErrorCode.DISK_FULL, f"{path} cannot be written: {exc.strerror}.")
    return FlopsError(ErrorCode.FILE_UNREADABLE, f"{path}: {exc.strerror or exc}.")
