"""Key and certificate of a node, or of a relay: made here, signed by the cluster, kept in one file.

The key is on the disk before anything is asked for, and it never leaves the node. A node that is killed
before it has the answer asks again with the same key and the same token, and gets the same certificate.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flops.core.admission import CLOCKS_DIFFER_BY_S, is_relay, renewal_due
from flops.core.clusters import DEFAULT_CLUSTER
from flops.core.model import Value
from flops.durable_file import file_error, write_durably
from flops.errors import ErrorCode, FlopsError
from flops.wire.cluster_tls import cluster_tls, split_chain, tls_problem, tls_to_anybody
from flops.wire.join import (
    AUTHORITY_PATH,
    CLUSTER_JOIN_PATH,
    CLUSTER_RENEWAL_PATH,
    JOIN_PATH,
    RENEWAL_PATH,
    SERVICE_PATH,
    AuthorityShown,
    CertificateSigned,
    ClusterJoinRequest,
    JoinRequest,
    JoinToken,
    RenewalRequest,
    ServiceCertificateRequest,
)

_TIMEOUT_S = 10.0
_KEY_END = "-----END PRIVATE KEY-----\n"

M = TypeVar("M", bound=Value)


@dataclass(frozen=True)
class Identity:
    """Who a node is to its cluster.

    Args:
        node_id: its name in the certificate.
        signer: who signed it.
        authority: the cluster's own certificate, PEM.
        not_before_s: when the certificate was signed, in seconds since the epoch.
        not_after_s: when it ends.
        cluster: that it is of.
    """

    node_id: str
    signer: str
    authority: str
    not_before_s: float
    not_after_s: float
    cluster: str = DEFAULT_CLUSTER

    @property
    def dials(self) -> str:
        """The cluster at whose port it is known: a node's own; a relay's is the manager's."""
        return DEFAULT_CLUSTER if is_relay(self.node_id) else self.cluster

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to renew the certificate."""
        return renewal_due(self.not_before_s, self.not_after_s, now_s)


def read_identity(path: Path) -> Identity | None:
    """The identity in a file; None for a node that has joined no cluster that encrypts.

    Raises:
        FlopsError: ``config_corrupt``, ``file_unreadable``.
    """
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        if isinstance(exc, OSError):
            raise file_error(exc, path) from exc
        raise _corrupt(path) from exc
    try:
        _load_key(text)
        own, authority = split_chain(text)
        found = x509.load_pem_x509_certificate(own.encode())
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise _corrupt(path) from exc
    return Identity(
        node_id=_common_name(found.subject),
        signer=_common_name(found.issuer),
        authority=authority,
        not_before_s=found.not_valid_before_utc.timestamp() + CLOCKS_DIFFER_BY_S,
        not_after_s=found.not_valid_after_utc.timestamp(),
        cluster=_attribute(found.subject, NameOID.ORGANIZATIONAL_UNIT_NAME) or DEFAULT_CLUSTER,
    )


def join_cluster(
    path: Path, token: JoinToken, cluster: str, node_id: str, addons: tuple[str, ...]
) -> Identity:
    """Have the cluster sign a certificate for a new key of this node; the same token again goes on.

    Nothing is told to a cluster that does not prove to be the one that made the token.

    Args:
        path: where the identity is kept.
        token: of `flops node invite`.
        cluster: ``host:port``.
        node_id: who this is.
        addons: what is switched on here.

    Raises:
        FlopsError: ``join_refused``, ``certificate_refused``, ``encryption_mismatch``, ``unreachable``,
            ``disk_full``, ``file_unreadable``.
    """

    def request(signing_request: str) -> JoinRequest:
        return JoinRequest(
            invitation=token.id,
            secret=token.secret,
            node_id=node_id,
            addons=addons,
            signing_request=signing_request,
        )

    return _join(path, token, f"{cluster}{JOIN_PATH}", request)


def join_manager(path: Path, token: JoinToken, manager: str, cluster: str) -> Identity:
    """Have the manager's authority sign a certificate for a new key of a relay; otherwise as `join_cluster`.

    Args:
        path: where the identity is kept.
        token: of `flops cluster invite`.
        manager: ``host:port`` of the manager's cluster.
        cluster: the name of the relay's own.
    """

    def request(signing_request: str) -> ClusterJoinRequest:
        return ClusterJoinRequest(
            invitation=token.id, secret=token.secret, cluster=cluster, signing_request=signing_request
        )

    return _join(path, token, f"{manager}{CLUSTER_JOIN_PATH}", request)


def _join(path: Path, token: JoinToken, where: str, request: Callable[[str], Value]) -> Identity:
    url = f"https://{where.partition('/')[0]}{AUTHORITY_PATH}"
    authority = trusted_authority(url, token.fingerprint, "the cluster that made the token")
    pending = path.with_name(f"{path.name}.{token.id[:32]}")
    if not pending.exists():
        write_durably(pending, new_key())
    key = pending.read_text(encoding="ascii")
    tls = cluster_tls(authority, cluster=token.name)
    signed = _post(f"https://{where}", request(signing_request(key)), tls)
    write_durably(path, key + signed.certificate + authority)
    pending.unlink(missing_ok=True)
    return _must_read(path)


def renew_identity(path: Path, cluster: str) -> Identity:
    """Have the certificate renewed for the same key.

    Raises:
        FlopsError: as `join_cluster`, without ``join_refused``.
    """
    identity = _must_read(path)
    text = path.read_text(encoding="ascii")
    key = text[: text.index(_KEY_END) + len(_KEY_END)]
    request = RenewalRequest(signing_request=signing_request(key))
    where = CLUSTER_RENEWAL_PATH if is_relay(identity.node_id) else RENEWAL_PATH
    tls = cluster_tls(identity.authority, path, identity.dials)
    signed = _post(f"https://{cluster}{where}", request, tls)
    write_durably(path, key + signed.certificate + identity.authority)
    return _must_read(path)


def certify_service(path: Path, cluster: str, service_id: str, target: Path, now_s: float) -> bool:
    """Write a key with a certificate of the cluster for a service on this node, unless a good one is there.

    Args:
        path: the node's own identity.
        cluster: ``host:port``.
        service_id: the service, which others dial.
        target: where it is written.
        now_s: seconds since the epoch.

    Returns:
        Whether a new one was written.

    Raises:
        FlopsError: as `renew_identity`, and ``forbidden`` when the service is not this node's.
    """
    present, identity = read_identity(target), _must_read(path)
    if present is not None and present.authority == identity.authority and not present.is_due(now_s):
        return False
    key = new_key()
    request = ServiceCertificateRequest(service_id=service_id, signing_request=signing_request(key))
    tls = cluster_tls(identity.authority, path, identity.dials)
    signed = _post(f"https://{cluster}{SERVICE_PATH}", request, tls)
    write_durably(target, key + signed.certificate + identity.authority)
    return True


def trusted_authority(url: str, fingerprint: str, expected: str) -> str:
    """The authority with a fingerprint, PEM; whoever answers is not trusted to say so.

    Args:
        url: where it is asked for.
        fingerprint: hex SHA-256 of its certificate.
        expected: whose it is, for messages.

    Raises:
        FlopsError: ``certificate_refused``, ``encryption_mismatch``, ``unreachable``.
    """
    shown = _ask("GET", url, AuthorityShown, tls_to_anybody())
    try:
        found = x509.load_pem_x509_certificate(shown.certificate.encode())
    except ValueError:
        found = None
    if found is None or found.fingerprint(hashes.SHA256()).hex() != fingerprint:
        raise FlopsError(
            ErrorCode.CERTIFICATE_REFUSED,
            f"What answers at {httpx.URL(url).netloc.decode()} is not {expected}; nothing was sent to it.",
            hint="Check the address, and that the line you copied is of this control plane.",
        )
    return found.public_bytes(serialization.Encoding.PEM).decode()


def _post(url: str, body: Value, tls: ssl.SSLContext) -> CertificateSigned:
    return _ask("POST", url, CertificateSigned, tls, body)


def _ask(method: str, url: str, answer: type[M], tls: ssl.SSLContext, body: Value | None = None) -> M:
    where = httpx.URL(url).netloc.decode()
    try:
        # The environment's proxies do not lead to the cluster.
        with httpx.Client(verify=tls, trust_env=False, timeout=_TIMEOUT_S) as client:
            response = client.request(method, url, json=None if body is None else body.model_dump())
    except httpx.HTTPError as exc:
        problem = tls_problem(exc, where)
        if problem is not None:
            raise problem from exc
        raise FlopsError(
            ErrorCode.UNREACHABLE, f"No cluster answers at {where}: {str(exc) or type(exc).__name__}."
        ) from exc
    try:
        if response.is_success:
            return answer.model_validate_json(response.content)
        raise FlopsError.from_dict(response.json())
    except (ValueError, AttributeError) as exc:
        raise FlopsError(
            ErrorCode.UNREACHABLE,
            f"What answers at {where} is no FLOps cluster (status {response.status_code}).",
        ) from exc


def new_key() -> str:
    """A private key, PEM."""
    return (
        ec.generate_private_key(ec.SECP256R1())
        .private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        .decode()
    )


def signing_request(key_pem: str) -> str:
    """A request to sign a certificate for a key, PEM; it proves that the key is there."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    return request.sign(_load_key(key_pem), hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def _load_key(text: str) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(text.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("another kind of key")  # noqa: TRY004 (what cannot be read is one error)
    return key


def _must_read(path: Path) -> Identity:
    identity = read_identity(path)
    if identity is None:
        raise _corrupt(path)
    return identity


def _common_name(name: x509.Name) -> str:
    return _attribute(name, NameOID.COMMON_NAME)


def _attribute(name: x509.Name, which: x509.ObjectIdentifier) -> str:
    found = name.get_attributes_for_oid(which)
    return str(found[0].value) if found else ""


def _corrupt(path: Path) -> FlopsError:
    return FlopsError(
        ErrorCode.CONFIG_CORRUPT,
        f"The node's key and certificate in {path} cannot be used.",
        hint="Join anew with a token: `flops node invite` there, `NodeEngine --token TOKEN -d` here.",
    )
