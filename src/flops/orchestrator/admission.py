"""Admission of nodes: who is invited, whose certificate is good, and who is locked out.

Certificates in force are listed, and everything else is refused: a certificate that was signed and never
stored, because the process was killed between, is worth nothing, and its node asks again.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading

from flops.admission_ports import AdmissionStore, Authority
from flops.core.admission import (
    Invitation,
    NodeCertificate,
    PeerCertificate,
    certificate_refused,
    check_join,
    check_peer,
    join_refused,
)
from flops.core.cluster import LEARNER_ADDON, Service, ServiceKind
from flops.core.ids import NodeId, ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.ports import Clock
from flops.wire.flight import aggregator_name, data_server_name
from flops.wire.join import JoinRequest, JoinToken

SERVICE_LIFE_S = 90 * 86_400.0  # longer than a training: a server of streams takes no new one
DEFAULT_LIFE_S = 7 * 86_400.0
_REMEMBERED_S = 30 * 86_400.0  # an invitation, after its end: so that its errors say why

_log = logging.getLogger(__name__)


class Admission:
    """Decides who may speak to a cluster as a node, or as a service of one; thread-safe.

    Args:
        store: invitations, and certificates in force.
        authority: signs.
        clock: tells what has expired.
        secret: what services' keys are made from.
        life_s: how long a node's certificate is good.
    """

    def __init__(
        self,
        store: AdmissionStore,
        authority: Authority,
        clock: Clock,
        *,
        secret: bytes,
        life_s: float = DEFAULT_LIFE_S,
    ) -> None:
        self._store = store
        self._authority = authority
        self._clock = clock
        self._secret = secret
        self._life_s = life_s
        self._lock = threading.Lock()

    @property
    def authority_pem(self) -> str:
        """The certificate of the cluster's authority."""
        return self._authority.pem

    def invite(self, cluster: str, *, nodes: int, for_s: float, addons: tuple[str, ...]) -> JoinToken:
        """Make a token.

        Args:
            cluster: ``host:port`` at which nodes reach the cluster.
            nodes: how many may join by it.
            for_s: how long, in seconds from now.
            addons: what they may switch on.

        Raises:
            FlopsError: ``disk_full``.
        """
        now_s = self._clock.now_s()
        token = JoinToken(
            cluster=cluster,
            fingerprint=self._authority.fingerprint,
            id=secrets.token_hex(6),
            secret=secrets.token_urlsafe(24),
        )
        self._store.forget_invitations(now_s - _REMEMBERED_S)
        self._store.put_invitation(
            Invitation(
                id=token.id,
                secret_hash=_hash(token.secret),
                nodes=nodes,
                addons=addons,
                expires_at_s=now_s + for_s,
            )
        )
        _log.info("invitation %s: %d nodes within %.0f s, with %s", token.id, nodes, for_s, addons)
        return token

    def join(self, request: JoinRequest) -> NodeCertificate:
        """Let a node join; the same node with the same key gets the same answer, and counts once.

        Raises:
            FlopsError: ``join_refused``, ``usage``, ``disk_full``.
        """
        key = self._authority.key_of(request.signing_request)
        node_id = NodeId(request.node_id)
        with self._lock:
            invitation = self._store.invitation(request.invitation)
            if invitation is None or not hmac.compare_digest(invitation.secret_hash, _hash(request.secret)):
                raise join_refused("this cluster has not made it")
            held = self._store.certificates_of(node_id)
            joined = self._store.joined(invitation.id)
            if key in joined:
                return self._same_again(held, key)
            now_s = self._clock.now_s()
            check_join(invitation, joined, key, request.addons, now_s)
            if any(certificate.key != key for certificate in held):
                raise join_refused(
                    f"a node with the id {node_id} has joined already, with another key",
                    hint=f"If it is the same machine, run `flops node remove {node_id}` first.",
                )
            signed = self._authority.sign_node(
                request.signing_request, node_id, invitation.addons, now_s, self._life_s
            )
            self._store.admit(signed, invitation.id)
        _log.info("node %s has joined by invitation %s; serial %s", node_id, invitation.id, signed.serial)
        return signed

    @staticmethod
    def _same_again(held: list[NodeCertificate], key: str) -> NodeCertificate:
        found = [certificate for certificate in held if certificate.key == key]
        if not found:
            raise join_refused("the node that joined by it was removed, or has another id")
        return found[-1]

    def check(self, peer: PeerCertificate | None) -> NodeCertificate:
        """The certificate in force of a connection's other side.

        Raises:
            FlopsError: ``certificate_refused``.
        """
        if peer is None:
            raise FlopsError(ErrorCode.CERTIFICATE_REFUSED, "No certificate was shown, and this needs one.")
        return check_peer(peer, self._store.certificate(peer.serial), self._clock.now_s())

    def admit(self, peer: PeerCertificate | None, node_id: str) -> NodeCertificate:
        """Likewise, of one that says which node it is.

        Raises:
            FlopsError: ``certificate_refused``.
        """
        certificate = self.check(peer)
        if certificate.node_id != node_id:
            raise certificate_refused(
                certificate.node_id, f"is not one of node {node_id[:80]!r}, which it says it is"
            )
        return certificate

    def renew(self, peer: PeerCertificate | None, request: str) -> NodeCertificate:
        """Sign a further certificate for the node at the other side, for the key it has.

        Raises:
            FlopsError: ``certificate_refused``, ``usage``, ``disk_full``.
        """
        with self._lock:
            present = self.check(peer)
            if self._authority.key_of(request) != present.key:
                raise certificate_refused(present.node_id, "cannot be renewed for another key")
            now_s = self._clock.now_s()
            signed = self._authority.sign_node(request, present.node_id, present.addons, now_s, self._life_s)
            self._store.renew(signed)
        _log.info("the certificate of node %s is renewed; serial %s", signed.node_id, signed.serial)
        return signed

    def certify_service(self, peer: PeerCertificate | None, service: Service | None, request: str) -> str:
        """Sign a certificate for an aggregator, which learners dial; only its own node gets one.

        Raises:
            FlopsError: ``certificate_refused``, ``forbidden``, ``usage``.
        """
        node_id = self.check(peer).node_id
        spec = service.spec if service is not None else None
        if spec is None or spec.node_id != node_id or spec.kind is not ServiceKind.AGGREGATOR:
            raise FlopsError(
                ErrorCode.FORBIDDEN,
                f"Node {node_id} has no such aggregator, and gets no certificate for one.",
                hint="Certificates of services are for the node that runs them.",
            )
        name = aggregator_name(spec.project_id)
        return self._authority.sign_service(request, name, self._clock.now_s(), SERVICE_LIFE_S)

    def certify_data_server(self, peer: PeerCertificate | None, request: str) -> str:
        """Sign a certificate for a node's ML data server, which devices dial.

        Raises:
            FlopsError: ``certificate_refused``, ``forbidden`` for a node that may not have one, ``usage``.
        """
        certificate = self.check(peer)
        check_addons(certificate, {LEARNER_ADDON}, certificate.node_id)
        name = data_server_name(certificate.node_id)
        return self._authority.sign_service(request, name, self._clock.now_s(), SERVICE_LIFE_S)

    def is_member(self, node_id: NodeId) -> bool:
        """Whether certificates of a node are in force."""
        return bool(self._store.certificates_of(node_id))

    def expel(self, node_id: NodeId) -> None:
        """Lock a node out for good; a new token lets it in again, with a new key.

        Raises:
            FlopsError: ``disk_full``.
        """
        with self._lock:
            self._store.expel(node_id)

    def service_key(self, service_id: ServiceId) -> str:
        """What a service shows to the cluster's port: good for this service, while it has not ended."""
        return hmac.new(self._secret, f"service:{service_id}".encode(), hashlib.sha256).hexdigest()

    def is_service_key(self, service_id: str, key: str) -> bool:
        """Whether a key is that of a service."""
        return hmac.compare_digest(self.service_key(ServiceId(service_id)).encode(), key.encode())


def check_addons(certificate: NodeCertificate, names: set[str], node: str) -> None:
    """Refuse a node that has switched on what it was not invited for.

    Raises:
        FlopsError: ``forbidden``.
    """
    if refused := sorted(names - set(certificate.addons)):
        raise FlopsError(
            ErrorCode.FORBIDDEN,
            f"Node {node} has switched on {', '.join(refused)}, which its token did not allow.",
            hint="Switch it off there (`NodeEngine config addon NAME off`), or remove and invite it anew.",
        )


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
