"""Where a data server listens, and the files by which others find it: its endpoint and its admin token."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from flops.core.address import reached_here
from flops.durable_file import keep_token, write_durably
from flops.errors import ErrorCode, FlopsError
from flops.wire.flight import ENDPOINT_FILE, TOKEN_FILE
from flops.wire.server_trust import ServerTrust


def admin_token(folder: Path) -> str:
    """Read the admin token; make it at the first start. Only the owner can read it.

    Raises:
        FlopsError: ``config_corrupt`` when the file is empty.
    """
    return keep_token(folder / TOKEN_FILE)


@contextlib.contextmanager
def announced(folder: Path, host: str, port: int, trust: ServerTrust | None = None) -> Iterator[None]:
    """Tell where the server listens and what it is known by, as long as it does."""
    path = folder / ENDPOINT_FILE
    endpoint: dict[str, object] = {"host": reached_here(host), "port": port, "pid": os.getpid()}
    if trust is not None:
        endpoint |= asdict(trust)
    write_durably(path, json.dumps(endpoint) + "\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def check_address(host: str, port: int) -> None:
    """Find out why an address cannot be used; gRPC would not say.

    Raises:
        FlopsError: ``port_occupied``, ``config_invalid``.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror as exc:
        raise FlopsError(
            ErrorCode.CONFIG_INVALID, f"{host!r} is not an address of this machine: {exc.strerror}."
        ) from exc
    except OSError as exc:
        if exc.errno in {errno.EADDRINUSE, errno.EACCES}:
            raise FlopsError(
                ErrorCode.PORT_OCCUPIED, f"Cannot listen on {host}:{port}: {exc.strerror}."
            ) from exc
        raise FlopsError(
            ErrorCode.CONFIG_INVALID, f"{host!r} is not an address of this machine: {exc.strerror}."
        ) from exc
