"""Serves an ASGI application on a port, in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

from flops.core.admission import PeerCertificate, serial_text
from flops.errors import ErrorCode, FlopsError
from flops.wire.join import PEER_EXTENSION

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0  # what open requests get to end
_BACKLOG = 2048
_MAX_MESSAGE_BYTES = 16 * 1024**2
_NO_CHECK_OF_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL
_TLS_BEGINS = b"\x16\x03"

_log = logging.getLogger(__name__)


class _WithPeer:
    """Tells an application whose certificate a connection has shown."""

    def __init__(self, app: ASGIApp, transport: asyncio.BaseTransport) -> None:
        self._app = app
        shown: dict[str, Any] = transport.get_extra_info("peercert") or {}
        names = dict(pair for part in shown.get("subject", ()) for pair in part)
        serial = str(shown.get("serialNumber", ""))
        self._peer = None
        if serial:
            self._peer = PeerCertificate(
                serial=serial_text(int(serial, 16)), name=names.get("commonName", "")
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        extensions = {**(scope.get("extensions") or {}), PEER_EXTENSION: self._peer}
        await self._app({**scope, "extensions": extensions}, receive, send)


class _HttpProtocol(HttpToolsProtocol):
    """Tells the application the certificate of the other side, and the operator of TLS where none is."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app = _WithPeer(self.app, transport)

    def data_received(self, data: bytes) -> None:
        if self.scheme == "http" and data.startswith(_TLS_BEGINS):
            _log.warning("%s is refused: it speaks TLS, and this port does not encrypt", self.client)
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            self.transport.close()
            return
        super().data_received(data)


class _NodeProtocol(WebSocketsSansIOProtocol):
    """Makes `send` wait for a peer that does not read.

    uvicorn's own class waits for `writable` but never clears it (0.49), so a node that stands still would
    pile up messages in memory, beyond the limit of `SocketLink`.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.app = _WithPeer(self.app, transport)

    def shutdown(self) -> None:
        """End the connection with the server; uvicorn's own class fails for one that is closing already."""
        try:
            super().shutdown()
        except InvalidState:
            self.transport.close()

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
        tls: how to encrypt; None not to.
        listener: of `listen`, when the port had to be known before.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self._host = host
        self._listener = listener
        self._port = port
        config = uvicorn.Config(
            app,
            http=_HttpProtocol,
            ws=_NodeProtocol,
            ws_max_size=_MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=int(_STOP_TIMEOUT_S),
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
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
        listener = self._listener or listen(self._host, self._port)
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


class _ToldHandshake(ssl.SSLObject):
    """A connection whose failed handshake is logged: asyncio says nothing about it."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as exc:
            reason = getattr(exc, "verify_message", "") or str(exc.reason or exc).lower().replace("_", " ")
            _log.warning("a connection is refused, its TLS handshake failed: %s", reason)
            raise


def server_tls(identity: Path, authority: str | None) -> ssl.SSLContext:
    """How a server encrypts.

    Args:
        identity: file with its key and certificates; when it has changed, `load_cert_chain` takes the new.
        authority: whose certificates clients may show, PEM; None when they show none. A client without one,
            or with an expired one, is let in all the same: what it may do is the application's to say.

    Raises:
        OSError: the files cannot be read; as `ssl.SSLError` when they hold something else.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2 if authority is None else ssl.TLSVersion.TLSv1_3
    context.sslobject_class = _ToldHandshake
    context.load_cert_chain(identity, password="")  # rather than ask somebody at a terminal for it
    if authority is not None:
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags |= _NO_CHECK_OF_TIME
        context.load_verify_locations(cadata=authority)
    return context


def listen(host: str, port: int) -> socket.socket:
    """Take a port; who calls waits until a server serves it.

    Raises:
        FlopsError: ``port_occupied``, ``config_invalid`` for an address that is not of this machine.
    """
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
