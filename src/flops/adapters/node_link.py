"""The node's WebSocket connection to its cluster."""

from __future__ import annotations

import contextlib
import socket
import ssl

from pydantic import ValidationError
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidStatus,
    InvalidURI,
)
from websockets.sync.client import ClientConnection, connect

from flops.adapters.tls_socket import TlsSocket
from flops.core.address import split_port
from flops.errors import ErrorCode, FlopsError
from flops.wire.cluster_tls import alert_of, speaks_tls, tls_problem
from flops.wire.node import FROM_CLUSTER, FromCluster, FromNode

OPEN_TIMEOUT_S = 5.0
_PING_INTERVAL_S = 5.0
_PING_TIMEOUT_S = 10.0  # a cluster that is silent for longer is dialled anew
_CLOSE_TIMEOUT_S = 1.0
_PROBE_S = 2.0  # to find out why a connection broke off
_BROKEN_OFF = (InvalidMessage, ConnectionClosed, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)
_MAX_MESSAGE_BYTES = 64 * 1024**2


class WebSocketLink:
    """Implements the `ClusterConnection` of `flops.node.session`.

    Args:
        connection: an open connection.
        stack: closes it.
        cluster: its address, for messages.
    """

    def __init__(self, connection: ClientConnection, stack: contextlib.ExitStack, cluster: str) -> None:
        self._connection = connection
        self._stack = stack
        self._cluster = cluster

    def send(self, message: FromNode) -> None:
        """Send a message.

        Raises:
            FlopsError: ``unreachable`` when the connection has ended.
        """
        try:
            self._connection.send(message.model_dump_json())
        except (ConnectionClosed, OSError) as exc:
            raise self._ended(exc) from exc

    def receive(self, timeout_s: float) -> FromCluster | None:
        """The next message; None when none comes in time, or for one this version does not know.

        Raises:
            FlopsError: ``unreachable`` when the connection has ended.
        """
        try:
            text = self._connection.recv(timeout=timeout_s)
        except TimeoutError:
            return None
        except (ConnectionClosed, OSError) as exc:
            raise self._ended(exc) from exc
        try:
            return FROM_CLUSTER.validate_json(text)
        except ValidationError:
            return None

    def close(self) -> None:
        """End the connection; never raises."""
        with contextlib.suppress(ConnectionClosed, OSError):
            self._stack.close()

    def _ended(self, exc: Exception) -> FlopsError:
        reason = exc.rcvd.reason if isinstance(exc, ConnectionClosed) and exc.rcvd is not None else ""
        why = f": {reason.rstrip('.')}" if reason else ""
        return FlopsError(
            ErrorCode.UNREACHABLE, f"The connection to the cluster at {self._cluster} ended{why}."
        )


def dial_cluster(
    cluster: str, *, tls: ssl.SSLContext | None = None, timeout_s: float = OPEN_TIMEOUT_S
) -> WebSocketLink:
    """Open a connection to a cluster.

    Args:
        cluster: ``host:port``.
        tls: how to encrypt; None not to.
        timeout_s: how long opening may take.

    Raises:
        FlopsError: ``unreachable``, ``certificate_refused``, ``encryption_mismatch``.
    """
    stack = contextlib.ExitStack()
    try:
        encrypted = None if tls is None else _connect_by_tls(cluster, tls, timeout_s)
        # A cluster is in the same network: a proxy for the Internet does not lead there.
        connecting = connect(
            f"ws://{cluster}/api/node/link",
            sock=encrypted,  # type: ignore[arg-type]  # it is one for all that is asked of it
            proxy=None,
            compression=None,
            open_timeout=timeout_s,
            close_timeout=_CLOSE_TIMEOUT_S,
            ping_interval=_PING_INTERVAL_S,
            ping_timeout=_PING_TIMEOUT_S,
            max_size=_MAX_MESSAGE_BYTES,
        )
        connection = stack.enter_context(connecting)
    except (OSError, TimeoutError, InvalidHandshake, InvalidURI, ConnectionClosed) as exc:
        stack.close()
        problem = _plain_problem(exc, cluster) if tls is None else _tls_problem(exc, cluster, tls)
        if problem is not None:
            raise problem from exc
        raise FlopsError(ErrorCode.UNREACHABLE, f"No cluster answers at {cluster}: {_reason(exc)}.") from exc
    return WebSocketLink(connection, stack, cluster)


def _connect_by_tls(cluster: str, tls: ssl.SSLContext, timeout_s: float) -> TlsSocket:
    host, port = split_port(cluster)
    connection = socket.create_connection((host, port), timeout=timeout_s)
    encrypted = TlsSocket(connection, tls, host)
    connection.settimeout(None)
    return encrypted


def _tls_problem(exc: Exception, cluster: str, tls: ssl.SSLContext) -> FlopsError | None:
    """What it means when TLS fails, or ends at once: the alert may have come after the handshake."""
    problem = tls_problem(exc, cluster)
    if problem is not None or not isinstance(exc, _BROKEN_OFF):
        return problem
    return alert_of(*split_port(cluster), tls, _PROBE_S)


def _plain_problem(exc: Exception, cluster: str) -> FlopsError | None:
    """What it means when something answers that does not speak HTTP."""
    if not isinstance(exc, _BROKEN_OFF) or not speaks_tls(*split_port(cluster), _PROBE_S):
        return None
    return FlopsError(
        ErrorCode.ENCRYPTION_MISMATCH,
        f"The cluster at {cluster} encrypts, and this node has no certificate of it.",
        hint="Join with a token: `flops node invite` there, then `NodeEngine --token TOKEN -d` here.",
    )


def _reason(exc: Exception) -> str:
    if isinstance(exc, InvalidStatus):
        return f"it speaks HTTP, but is no FLOps cluster (status {exc.response.status_code})"
    if isinstance(exc, TimeoutError):
        return "time-out"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return str(exc).rstrip(".") or type(exc).__name__


def client_tls(certificate: str, key: str) -> ssl.SSLContext:
    """How a node encrypts its connection, showing its own certificate if it has one.

    Raises:
        FlopsError: ``file_unreadable``.
    """
    context = ssl.create_default_context()
    if certificate:
        try:
            context.load_cert_chain(certificate, key or None)
        except (OSError, ssl.SSLError) as exc:
            raise FlopsError(
                ErrorCode.FILE_UNREADABLE, f"The certificate {certificate} cannot be used: {exc}."
            ) from exc
    return context
