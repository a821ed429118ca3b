"""TLS to a cluster: its own authority is trusted and nobody else, and it is known by its name in there.

A cluster may be reached at any address, behind NAT, and at another one tomorrow. What makes it the cluster is
the certificate that its authority signed for its `server_name`; nodes' certificates have other names.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

from flops.core.clusters import DEFAULT_CLUSTER
from flops.errors import ErrorCode, FlopsError

_DOMAIN = "cluster.flops.internal"
MANAGER_NAME = "manager.flops.internal"  # beside the addresses at which it listens
_PEM_END = "-----END CERTIFICATE-----"


def server_name(cluster: str) -> str:
    """The name in the certificate of a cluster's port: no cluster can play another one."""
    return _DOMAIN if cluster == DEFAULT_CLUSTER else f"{cluster}.{_DOMAIN}"


class NamedTls(ssl.SSLContext):
    """Expects the other side to have a name, a cluster's, whatever address was dialled."""

    expected = _DOMAIN

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        """As of the base class, with the expected name."""
        return super().wrap_socket(*arguments, **{**options, "server_hostname": self.expected})

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Likewise."""
        return super().wrap_bio(incoming, outgoing, server_side, self.expected, session)


class _ManagerTls(NamedTls):
    expected = MANAGER_NAME


def manager_tls(authority: str) -> NamedTls:
    """How to speak to the manager of an authority's cluster.

    Args:
        authority: its certificate, PEM.

    Raises:
        FlopsError: ``file_unreadable`` for what is no certificate.
    """
    context = _ManagerTls(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=authority)
    except (ssl.SSLError, ValueError) as exc:
        raise FlopsError(
            ErrorCode.FILE_UNREADABLE,
            f"The certificate of the manager's authority cannot be used: {exc}.",
            hint="`flops status --connect` on the machine of the control plane, `flops connect` here.",
        ) from exc
    return context


def cluster_tls(authority: str, identity: Path | None = None, cluster: str = DEFAULT_CLUSTER) -> NamedTls:
    """How to speak to the cluster of an authority.

    Args:
        authority: its certificate, PEM.
        identity: file with a node's key and certificate, to show them.
        cluster: the name of the cluster that is dialled.

    Raises:
        FlopsError: ``file_unreadable``.
    """
    context = NamedTls(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.expected = server_name(cluster)
    try:
        context.load_verify_locations(cadata=authority)
        if identity is not None:
            context.load_cert_chain(identity)
    except (OSError, ssl.SSLError, ValueError) as exc:
        what = "The cluster's certificate" if identity is None else f"The certificate in {identity}"
        raise FlopsError(
            ErrorCode.FILE_UNREADABLE,
            f"{what} cannot be used: {exc}.",
            hint="Join anew with a token: `flops node invite` on the cluster, `NodeEngine --token …` here.",
        ) from exc
    return context


def http_options(authority: str, service_id: str, key: str, cluster: str) -> dict[str, Any]:
    """Options of an HTTP client that speaks to the cluster as a service; none where it does not encrypt.

    Args:
        authority: certificate of the cluster's authority, or "".
        service_id: who it is.
        key: what the cluster knows it by.
        cluster: the cluster's name.
    """
    return {"verify": cluster_tls(authority, cluster=cluster), "auth": (service_id, key)} if authority else {}


def tls_problem(
    exc: BaseException, where: str, *, expected: str = "the cluster that this node has joined", hint: str = ""
) -> FlopsError | None:
    """What a failed handshake means for whoever dialled; None when it is none.

    Args:
        exc: what came of it.
        where: what was dialled.
        expected: who should have answered.
        hint: what to do, the catalogue's if not given.
    """
    found = _tls_error(exc)
    if found is None:
        return None
    reason = str(found.reason or "")
    if isinstance(found, ssl.SSLCertVerificationError):
        return FlopsError(
            ErrorCode.CERTIFICATE_REFUSED,
            f"What answers at {where} is not {expected}: {found.verify_message}.",
            hint=hint or None,
        )
    if "ALERT" in reason:
        text = reason.lower().replace("_", " ")
        return FlopsError(ErrorCode.CERTIFICATE_REFUSED, f"{where} refuses this node's certificate: {text}.")
    return FlopsError(
        ErrorCode.ENCRYPTION_MISMATCH,
        f"What answers at {where} does not encrypt, and is spoken to by TLS only.",
        hint=hint or None,
    )


def _tls_error(exc: BaseException | None) -> ssl.SSLError | None:
    while exc is not None:
        if isinstance(exc, ssl.SSLError) and not isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return exc
        exc = exc.__cause__ or exc.__context__
    return None


def tls_to_anybody() -> ssl.SSLContext:
    """How to speak to whoever is there, who is not trusted for it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def speaks_tls(host: str, port: int, timeout_s: float) -> bool:
    """Whether TLS is spoken on a port; who is there does not matter."""
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as connection,
            tls_to_anybody().wrap_socket(connection),
        ):
            return True
    except OSError:
        return False


def alert_of(host: str, port: int, tls: ssl.SSLContext, timeout_s: float) -> FlopsError | None:
    """Why a TLS connection is broken off after its handshake; None when nothing says why.

    A cluster that has proved to be ours, and hangs up at once, does not like the certificate it was shown.
    """
    where = f"{host}:{port}"
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as connection,
            tls.wrap_socket(connection, server_hostname=host) as wrapped,
        ):
            try:
                wrapped.recv(1)
            except TimeoutError:
                return None
            except OSError as exc:
                if (problem := tls_problem(exc, where)) is not None:
                    return problem
    except OSError as exc:
        return tls_problem(exc, where)
    return FlopsError(
        ErrorCode.CERTIFICATE_REFUSED,
        f"The cluster at {where} hangs up when it sees this node's certificate.",
    )


def split_chain(pem: str) -> list[str]:
    """The certificates of a PEM text, each on its own."""
    return [
        "-----BEGIN CERTIFICATE-----" + part.split("-----BEGIN CERTIFICATE-----", 1)[1] + _PEM_END + "\n"
        for part in pem.split(_PEM_END)[:-1]
    ]


def key_and_certificate(pem: str) -> tuple[str, str]:
    """The certificates of a PEM text, and the private key that begins it, in the order that Flight wants."""
    key, begin, certificates = pem.partition("-----BEGIN CERTIFICATE-----")
    return begin + certificates, key


def dialled_in_vain(
    host: str, port: int, tls: ssl.SSLContext | None, name: str, expected: str, timeout_s: float
) -> FlopsError | None:
    """What of encryption kept a connection from being made; None when nothing did.

    Args:
        host: what was dialled.
        port: likewise.
        tls: how it was; None for in the clear.
        name: that the other side should have had.
        expected: who should have answered, for messages.
        timeout_s: how long to look.
    """
    where = f"{host}:{port}"
    if tls is None:
        if not speaks_tls(host, port, timeout_s):
            return None
        return FlopsError(
            ErrorCode.ENCRYPTION_MISMATCH, f"What answers at {where} encrypts, and was not told so."
        )
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as connection,
            tls.wrap_socket(connection, server_hostname=name),
        ):
            return None
    except OSError as exc:
        return tls_problem(exc, where, expected=expected)
