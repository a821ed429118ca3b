"""Serves an ASGI application on a port, in a thread of this process."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from flops.errors import ErrorCode, FlopsError

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0  # what open requests get to end
_BACKLOG = 2048
_MAX_MESSAGE_BYTES = 16 * 1024**2


class _NodeProtocol(WebSocketsSansIOProtocol):
    """Makes `send` wait for a peer that does not read.

    uvicorn's own class waits for `writable` but never clears it (0.49), so a node that stands still would
    pile up messages in memory, beyond the limit of `SocketLink`.
    """

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()
        super().connection_lost(exc)


class HttpServer:
    """A server of the control plane, from `start` to `close`.

    Args:
        app: what it serves.
        host: address to listen on.
        port: port to listen on; 0 for a free one.
    """

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        self._host = host
        self._port = port
        config = uvicorn.Config(
            app,
            ws=_NodeProtocol,
            ws_max_size=_MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=int(_STOP_TIMEOUT_S),
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port, known after `start`."""
        return self._port

    def start(self) -> None:
        """Listen; returns when connections are accepted.

        Raises:
            FlopsError: ``port_occupied``, ``config_invalid`` for an address that is not of this machine,
                ``internal`` when the server does not start.
        """
        listener = _listen(self._host, self._port)
        self._port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, args=(listener,), name="http-server", daemon=True)
        self._thread.start()
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline_s:
                raise FlopsError(
                    ErrorCode.INTERNAL,
                    f"The server on {self._host}:{self._port} does not start; see the log.",
                )
            time.sleep(0.01)

    def close(self) -> None:
        """Stop listening, end all connections, and wait for it."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(timeout=3 * _STOP_TIMEOUT_S)

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.closing(listener):
            self._server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise FlopsError(ErrorCode.PORT_OCCUPIED, f"Port {port} of {host} is in use.") from exc
        raise FlopsError(
            ErrorCode.CONFIG_INVALID,
            f"Listening on {host}:{port} is not possible: {exc.strerror or exc}.",
            hint="Give an address of this machine, and a port you may use (above 1023 without root).",
        ) from exc
