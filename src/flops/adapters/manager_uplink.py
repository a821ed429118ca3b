"""A relay's way to the manager: requests and nodes' connections over HTTP, with the relay's certificate."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Sequence

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from flops.core.address import split_port
from flops.errors import ErrorCode, FlopsError
from flops.wire.cluster_tls import tls_problem

_OPEN_TIMEOUT_S = 5.0
_SILENCE_S = 60.0  # without a single byte: the manager may read a large blob first
_PING_INTERVAL_S = 5.0
_PING_TIMEOUT_S = 10.0  # as nodes do that dial the manager themselves
_CLOSE_TIMEOUT_S = 1.0
_MAX_MESSAGE_BYTES = 64 * 1024**2


class ManagerUplink:
    """Implements `flops.relay.uplink.Uplink`. Every request has a connection of its own: none outlives the
    certificate that it was opened with.

    Args:
        manager: ``host:port`` of its cluster's port.
        tls: how to encrypt; None not to.
    """

    def __init__(self, manager: str, tls: ssl.SSLContext | None) -> None:
        self._manager = manager
        self._tls = tls

    @contextlib.asynccontextmanager
    async def ask(
        self,
        method: str,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        body: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[UplinkAnswer]:
        """Ask for a path with its query; see `Uplink`."""
        scheme, (host, port) = "http" if self._tls is None else "https", split_port(self._manager)
        url = httpx.URL(scheme=scheme, host=host, port=port, raw_path=target)
        timeout = httpx.Timeout(_SILENCE_S, connect=_OPEN_TIMEOUT_S)
        verify = True if self._tls is None else self._tls
        try:
            async with (
                httpx.AsyncClient(verify=verify, trust_env=False, timeout=timeout) as client,
                client.stream(method, url, headers=list(headers), content=body) as response,
            ):
                yield UplinkAnswer(response, self._manager)
        except (httpx.HTTPError, OSError) as exc:
            raise self._problem(exc) from exc

    @contextlib.asynccontextmanager
    async def dial(self, headers: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[UplinkLink]:
        """Open a node's connection; see `Uplink`."""
        scheme = "ws" if self._tls is None else "wss"
        connecting = connect(
            f"{scheme}://{self._manager}/api/node/link",
            ssl=self._tls,
            additional_headers=[(name.decode(), value.decode()) for name, value in headers],
            proxy=None,
            compression=None,
            open_timeout=_OPEN_TIMEOUT_S,
            close_timeout=_CLOSE_TIMEOUT_S,
            ping_interval=_PING_INTERVAL_S,
            ping_timeout=_PING_TIMEOUT_S,
            max_size=_MAX_MESSAGE_BYTES,
        )
        try:
            connection = await connecting
        except (OSError, TimeoutError, InvalidHandshake, InvalidURI, ConnectionClosed) as exc:
            raise self._problem(exc) from exc
        try:
            yield UplinkLink(connection, self._manager)
        finally:
            await connection.close()

    def _problem(self, exc: Exception) -> FlopsError:
        return _away(self._manager, exc)


class UplinkAnswer:
    """Implements `flops.relay.uplink.Answer`."""

    def __init__(self, response: httpx.Response, manager: str) -> None:
        self._response = response
        self._manager = manager

    @property
    def status(self) -> int:
        """The status of HTTP."""
        return self._response.status_code

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        """All headers, names in lower case."""
        return [(name.lower(), value) for name, value in self._response.headers.raw]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; see `Answer`."""
        try:
            async for chunk in self._response.aiter_raw():
                yield chunk
        except (httpx.HTTPError, OSError) as exc:
            raise _away(self._manager, exc) from exc


class UplinkLink:
    """Implements `flops.relay.uplink.Link`."""

    def __init__(self, connection: ClientConnection, manager: str) -> None:
        self._connection = connection
        self._manager = manager

    async def send(self, text: str) -> None:
        """Send a message; see `Link`."""
        try:
            await self._connection.send(text)
        except ConnectionClosed as exc:
            raise self._ended(exc) from exc

    async def receive(self) -> str:
        """The next message; see `Link`."""
        try:
            return str(await self._connection.recv(decode=True))
        except ConnectionClosed as exc:
            raise self._ended(exc) from exc

    def _ended(self, exc: ConnectionClosed) -> FlopsError:
        reason = exc.rcvd.reason if exc.rcvd is not None else ""
        why = f": {reason.rstrip('.')}" if reason else ""
        return FlopsError(
            ErrorCode.UNREACHABLE, f"The connection to the manager at {self._manager} ended{why}."
        )


def _away(manager: str, exc: Exception) -> FlopsError:
    problem = tls_problem(exc, manager)
    if problem is not None:
        return problem
    reason = (isinstance(exc, OSError) and exc.strerror) or str(exc).rstrip(".") or type(exc).__name__
    return FlopsError(ErrorCode.UNREACHABLE, f"The manager at {manager} does not answer: {reason}.")
