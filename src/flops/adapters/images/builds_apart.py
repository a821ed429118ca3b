"""Dockerfiles run by a process apart: the one who asks may be confined, and cannot mount anything.

A service that prepares Dockerfiles parts with this process before it is confined, and before it has read
anything of a user's. It takes orders through a socket that nobody else has, and knows where they may lead.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flops.command import StoppedError, stop_if_needless, stopped_when
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ContainerBuild, ContainerBuilds, Report

_MESSAGE_BYTES = 131_072
_POLL_S = 0.1
_END_TIMEOUT_S = 10.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def part_with(open_builds: Callable[[], ContainerBuilds], root: Path) -> BuildsApart:
    """Start the process; to be called while there is one thread.

    Args:
        open_builds: makes what runs Dockerfiles, in the new process.
        root: builds have their folders in it.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        there.close()
        return BuildsApart(here, pid)
    here.close()
    try:
        for number in _SIGNALS:  # it ends with whoever has the other end of the socket
            signal.signal(number, signal.SIG_IGN)
        _serve(there, open_builds(), root)
    finally:
        sys.stdout.flush()
        os._exit(0)


class BuildsApart:
    """Implements `flops.image_ports.ContainerBuilds`; runs one Dockerfile at a time.

    Args:
        connection: to the process.
        pid: of the process, a child of this one.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self._pid = pid
        self._lock = threading.Lock()

    def run(self, build: ContainerBuild, report: Report, keep_open: Sequence[int] = ()) -> None:
        """Have a Dockerfile run.

        Raises:
            FlopsError: see `flops.image_ports.ContainerBuilds.run`.
            StoppedError: the work became needless; the process has ended then, and runs no other one.
        """
        order = {
            "folder": str(build.folder),
            "platform": build.platform.value,
            "bases": build.bases,
            "timeout_s": build.timeout_s,
            "what": build.what,
        }
        while not self._lock.acquire(timeout=_POLL_S):
            stop_if_needless()
        try:
            with contextlib.suppress(OSError):  # it is gone: so is its answer
                socket.send_fds(self._connection, [json.dumps(order).encode()], list(keep_open))
            self._follow(report)
        except BaseException as exc:
            if not isinstance(exc, FlopsError) or isinstance(exc, StoppedError):
                self.close()
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process with all that it runs; nothing happens when it has ended."""
        self._connection.close()
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(self._pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline_s:
                time.sleep(0.01)

    def _follow(self, report: Report) -> None:
        while True:
            stop_if_needless()
            try:
                if not select.select([self._connection], [], [], _POLL_S)[0]:
                    continue
                message = self._connection.recv(_MESSAGE_BYTES)
            except (OSError, ValueError):  # closed
                message = b""
            if not message:
                raise FlopsError(ErrorCode.IMAGE_BUILD_FAILED, "The process that runs Dockerfiles has ended.")
            told = json.loads(message)
            if "step" in told:
                report(told["step"])
            elif told["error"] is None:
                return
            else:
                raise FlopsError.from_dict(told["error"])


def _serve(connection: socket.socket, builds: ContainerBuilds, root: Path) -> None:
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 8)
        if not message:
            return
        try:
            with stopped_when(lambda: _is_closed(connection)):
                _run(json.loads(message), descriptors, connection, builds, root)
        except StoppedError:
            return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _run(
    order: dict[str, Any],
    descriptors: Sequence[int],
    connection: socket.socket,
    builds: ContainerBuilds,
    root: Path,
) -> None:
    error: dict[str, Any] | None = None
    folder = Path(order["folder"]).resolve()
    build = ContainerBuild(
        folder, Platform(order["platform"]), tuple(order["bases"]), order["timeout_s"], order["what"]
    )
    try:
        if folder.is_relative_to(root.resolve()):
            builds.run(build, lambda step: _tell(connection, {"step": step}), descriptors)
        else:
            error = FlopsError(ErrorCode.FORBIDDEN, f"No Dockerfile is run in {folder}.").to_dict()
    except StoppedError:
        raise
    except FlopsError as exc:
        error = exc.to_dict()
    except Exception as exc:  # noqa: BLE001 (the asker is told, whatever it is)
        error = FlopsError(ErrorCode.INTERNAL, f"A Dockerfile was not run: {exc!r}").to_dict()
    _tell(connection, {"error": error})


def _tell(connection: socket.socket, what: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more: that ends the build
        connection.send(json.dumps(what).encode())


def _is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
