"""A service's output on disk: one file of bounded size, and the one before it. Only the standard library.

Places count the bytes since the service's first start. A file that does not begin at place 0 says in its
first line where it begins, so that both files and every kill in between tell the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CONTINUES = re.compile("── continues at byte ([0-9]{1,18})\n".encode())
_HEAD_BYTES = 64
_OPEN_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Part:
    """An open file of output.

    Args:
        descriptor: the file.
        offset: length of the line that says where it begins.
        place: where it begins.
        end: the place behind its last byte.
    """

    descriptor: int
    offset: int
    place: int
    end: int

    def read(self, start: int, end: int) -> bytes:
        """The bytes between two places, as far as they are in this file."""
        start, end = max(start, self.place), min(end, self.end)
        return os.pread(self.descriptor, max(0, end - start), self.offset + start - self.place)


class OutputWriter:
    """Appends to a service's output.

    Args:
        path: the current file; the one before it has ``.1`` at its end.
        limit_bytes: largest size of a file.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        with open_parts(path) as parts:
            self._place = parts[-1].end if parts else 0
            last = parts[-1].read(self._place - 1, self._place) if parts else b""
        self._is_within_line = last not in {b"", b"\n"}
        self._open()

    def write_line(self, text: str) -> None:
        """Append a line of its own."""
        self.write(b"\n" * self._is_within_line + text.encode() + b"\n")

    def write(self, data: bytes) -> None:
        """Append; what a full disk does not take is dropped, since the service must never wait for it."""
        if self._size + len(data) > self._limit_bytes or self._descriptor < 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            if self._size:
                with contextlib.suppress(OSError):
                    self._path.replace(_before(self._path))
            self._open()
        head = b"" if self._size or not self._place else f"── continues at byte {self._place}\n".encode()
        with contextlib.suppress(OSError):
            written = os.write(self._descriptor, head + data)
            if written < len(head):
                os.ftruncate(self._descriptor, 0)
                return
            self._size += written
            self._place += written - len(head)

    def _open(self) -> None:
        self._descriptor = -1
        self._size = 0
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._descriptor).st_size


@contextlib.contextmanager
def open_parts(path: Path) -> Iterator[Sequence[Part]]:
    """The files of an output as they are at one moment, oldest first, without a gap between them.

    Args:
        path: the current file.
    """
    names = (_before(path), path)
    deadline_s = time.monotonic() + _OPEN_TIMEOUT_S
    while True:
        with contextlib.ExitStack() as stack:
            files = [_open_if_there(stack, name) for name in names]
            parts = _parts_of([file for file in files if file is not None])
            is_one_moment = [_identity(file) for file in files] == [_identity(name) for name in names]
            if is_one_moment or time.monotonic() > deadline_s:
                yield parts
                return


def remove_output(path: Path) -> None:
    """Remove an output's files."""
    for name in (path, _before(path)):
        name.unlink(missing_ok=True)


def _before(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


def _parts_of(files: Sequence[int]) -> list[Part]:
    parts: list[Part] = []
    place = 0
    for file in files:
        match = _CONTINUES.match(os.pread(file, _HEAD_BYTES, 0))
        if match is not None and int(match[1]) != place:
            place = int(match[1])
            parts.clear()  # what lies between is gone
        offset = match.end() if match is not None else 0
        end = place + os.fstat(file).st_size - offset
        parts.append(Part(file, offset, place, end))
        place = end
    return parts


def _open_if_there(stack: contextlib.ExitStack, path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    stack.callback(os.close, descriptor)
    return descriptor


def _identity(file: int | Path | None) -> tuple[int, int] | None:
    """Which file it is; None for none."""
    try:
        stat = file.stat() if isinstance(file, Path) else None if file is None else os.fstat(file)
    except OSError:
        return None
    return None if stat is None else (stat.st_dev, stat.st_ino)
