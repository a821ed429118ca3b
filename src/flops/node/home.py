"""A node's home: one daemon at a time, and an id that stays."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path

from flops.durable_file import file_error, write_durably
from flops.errors import ErrorCode, FlopsError

_LOCK = "hhqqi4x"


@contextlib.contextmanager
def only_daemon(pid_file: Path) -> Iterator[None]:
    """Hold a home for this process.

    Raises:
        FlopsError: ``already_running``, ``file_unreadable``, ``disk_full``.
    """
    try:
        pid_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as exc:
        raise file_error(exc, pid_file) from exc
    try:
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK))
        except (BlockingIOError, PermissionError) as exc:
            raise already_running(pid_file) from exc
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as exc:
            raise file_error(exc, pid_file) from exc
        yield
    finally:
        os.close(descriptor)


def running_pid(pid_file: Path) -> int | None:
    """Process id of the home's daemon; None when none runs."""
    try:
        descriptor = os.open(pid_file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Asks without locking, so that a look at the node is never in the way of a daemon that starts.
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK))
        if struct.unpack(_LOCK, answer)[0] == fcntl.F_UNLCK:
            return None
        with contextlib.suppress(ValueError):
            return int(os.pread(descriptor, 32, 0))
    finally:
        os.close(descriptor)
    return None


def _lock(kind: int) -> bytes:
    """A ``struct flock`` for the whole file, as fcntl(2) describes it."""
    return struct.pack(_LOCK, kind, os.SEEK_SET, 0, 0, 0)


def already_running(pid_file: Path) -> FlopsError:
    """The error of a second start."""
    pid = running_pid(pid_file)
    who = f"process {pid}" if pid is not None else "another process"
    return FlopsError(
        ErrorCode.ALREADY_RUNNING,
        f"NodeEngine is already running ({who}, home {pid_file.parent}).",
        hint="`NodeEngine status` shows it, `NodeEngine stop` ends it; --home makes another node.",
    )


def keep_node_id(path: Path) -> str:
    """The node's id, made at its first start.

    Raises:
        FlopsError: ``disk_full``, ``file_unreadable``.
    """
    try:
        known = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        known = ""
    except (OSError, UnicodeDecodeError) as exc:
        raise FlopsError(ErrorCode.FILE_UNREADABLE, f"{path} cannot be read: {exc}.") from exc
    if known:
        return known
    made = uuid.uuid4().hex
    write_durably(path, f"{made}\n")
    return made
