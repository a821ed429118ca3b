"""Runs other programs: with a deadline, without a shell, and without leaving anything of them behind.

Whoever has work done that may become needless says so once, around it::

    with stopped_when(is_asked_to_stop):
        environments.materialise(lock, report)

A program that runs then is ended, and the work raises `StoppedError`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flops.errors import ErrorCode, FlopsError

_POLL_S = 0.1
_MAX_ERRORS_BYTES = 1_048_576
_LEASH = ("/bin/sh", "-c", "read nothing; kill -9 0")  # 0 is its own process group
_is_needless: ContextVar[Callable[[], bool]] = ContextVar("is_needless", default=lambda: False)


class StoppedError(FlopsError):
    """Work was not finished because nobody needs it any more."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.CONFLICT, "The work was stopped: nobody needs it any more.")


@contextlib.contextmanager
def stopped_when(is_needless: Callable[[], bool]) -> Iterator[None]:
    """Have work in this context stop within about 100 ms of `is_needless` becoming true.

    What makes the work around it needless makes this work needless, too.
    """
    outer = _is_needless.get()
    token = _is_needless.set(lambda: is_needless() or outer())
    try:
        yield
    finally:
        _is_needless.reset(token)


def stop_if_needless() -> None:
    """Stop here if the work has become needless.

    Raises:
        StoppedError: it has.
    """
    if _is_needless.get()():
        raise StoppedError


@dataclass(frozen=True)
class Completed:
    """How a program ended.

    Args:
        exit_code: its exit code, negative for a signal.
        output: what it wrote to standard output.
        errors: the end of what it wrote to standard error.
        is_timed_out: it was ended because the time was up.
        stopped_because: what `watch` answered, if that ended it.
    """

    exit_code: int
    output: bytes
    errors: str
    is_timed_out: bool = False
    stopped_because: str | None = None


def run_command(
    argv: Sequence[str],
    *,
    environ: Mapping[str, str],
    cwd: Path,
    timeout_s: float,
    send: bytes = b"",
    watch: Callable[[str], str | None] = lambda _: None,
    keep_open: Sequence[int] = (),
) -> Completed:
    """Run a program to its end, with all the processes it starts in its own process group.

    They end with this process, however it ends.

    Args:
        argv: the program and its arguments.
        environ: its whole environment.
        cwd: the folder it runs in.
        timeout_s: seconds after which it is killed.
        send: its standard input.
        watch: called about every 100 ms with what is new on standard error; a text it returns ends the
            program.
        keep_open: file descriptors the program inherits, such as a lock that must outlive us.

    Raises:
        OSError: when the program cannot be started, or when the disk is full.
        StoppedError: the work became needless; the program was ended.
    """
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        _leashed_group() as group,
    ):
        stdin.write(send)
        stdin.seek(0)
        process = subprocess.Popen(
            list(argv),
            stdin=stdin,
            stdout=out,
            stderr=err,
            cwd=cwd,
            env=dict(environ),
            process_group=group,
            pass_fds=tuple(keep_open),
        )
        try:
            is_timed_out, reason = _follow(process, err, timeout_s, watch)
        finally:
            with contextlib.suppress(ProcessLookupError):  # the program killed its group itself
                os.killpg(group, signal.SIGKILL)
            process.wait()
        out.seek(0)
        return Completed(process.wait(), out.read(), _read(err, 0)[-_MAX_ERRORS_BYTES:], is_timed_out, reason)


def _follow(
    process: subprocess.Popen[bytes],
    err: IO[bytes],
    timeout_s: float,
    watch: Callable[[str], str | None],
) -> tuple[bool, str | None]:
    deadline = time.monotonic() + timeout_s
    position = 0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_S)
        news = _read(err, position)
        position += len(news.encode(errors="surrogateescape"))
        if (reason := watch(news)) is not None:
            return False, reason
        if process.returncode is not None:
            return False, None
        stop_if_needless()
        if time.monotonic() > deadline:
            return True, None


def _read(file: IO[Any], position: int) -> str:
    # The child shares the file's offset, so reading must not move it.
    data = os.pread(file.fileno(), 64 * _MAX_ERRORS_BYTES, position)
    return data.decode(errors="surrogateescape")


@contextlib.contextmanager
def _leashed_group() -> Iterator[int]:
    """A process group that is killed at the end of the block, and when this process is killed before.

    The group's first process reads from a pipe that nobody writes to: it ends with the only process that
    could. The kernel's signal at a parent's death is no help: it is sent when the *thread* ends that started
    the program, and to the program alone.
    """
    with subprocess.Popen(_LEASH, stdin=subprocess.PIPE, env={}, process_group=0) as leash:
        try:
            yield leash.pid
        finally:
            leash.kill()
