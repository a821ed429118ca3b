"""Has the kernel notice that the other side of a connection has vanished, without a word.

A killed process closes its connections and is noticed at once. A vanished host, or a cut cable, sends
nothing: whoever waits for its next message waits for good, and whoever sends to it for a quarter of an hour.

This module is part of the actor kit: it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

SILENCE_LIMIT_S = 8  # a host that does not answer for so long counts as gone
_INTERNET = (socket.AF_INET, socket.AF_INET6)


def keep_connections_alive(port: int) -> int:
    """Have this process's connections over `port` broken when their other side is silent for too long.

    Flight gives no access to gRPC's own keepalive on the server; the kernel's probes need no cooperation of
    the Python interpreter, which user code may hold for minutes. A side that is there and busy answers them.

    Args:
        port: local or remote TCP port of the connections.

    Returns:
        How many connections it was set for.
    """
    guarded = 0
    for descriptor in _open_descriptors():
        with contextlib.suppress(OSError):  # closed in the meantime, or not connected
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family not in _INTERNET:
                    continue
                if port in (connection.getsockname()[1], connection.getpeername()[1]):
                    _set_keepalive(connection)
                    guarded += 1
    return guarded


def _open_descriptors() -> list[int]:
    try:
        return [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    except OSError:
        return []


def _set_keepalive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_LIMIT_S // 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_LIMIT_S // 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_LIMIT_S * 1000)
