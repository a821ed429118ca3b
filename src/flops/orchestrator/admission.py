"""Admission of nodes and of other clusters: who is invited, whose certificate is good, and who is locked out.

Certificates in force are listed, and everything else is refused: a certificate that was signed and never
stored, because the process was killed between, is worth nothing, and its node asks again.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
from collections.abc import Callable

from flops.admission_ports import AdmissionStore, Authority
from flops.core.admission import (
    Caller,
    Invitation,
    NodeCertificate,
    PeerCertificate,
    certificate_refused,
    check_addressee,
    check_join,
    check_peer,
    is_relay,
    join_refused,
    relay_id,
)
from flops.core.cluster import LEARNER_ADDON, Service, ServiceKind
from flops.core.clusters import DEFAULT_CLUSTER, check_cluster_name
from flops.core.ids import NodeId, ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.ports import Clock
from flops.wire.flight import aggregator_name, data_server_name
from flops.wire.join import ClusterJoinRequest, JoinRequest, JoinToken

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

    def invite(
        self,
        address: str,
        *,
        nodes: int,
        for_s: float,
        addons: tuple[str, ...],
        cluster: str = DEFAULT_CLUSTER,
    ) -> JoinToken:
        """Make a token for nodes.

        Args:
            address: ``host:port`` at which they reach the cluster.
            nodes: how many may join by it.
            for_s: how long, in seconds from now.
            addons: what they may switch on.
            cluster: that they join.

        Raises:
            FlopsError: ``disk_full``.
        """
        token = self._make_token(address, cluster)
        self._keep(token, cluster=cluster, nodes=nodes, addons=addons, for_s=for_s)
        return token

    def invite_relay(self, address: str, cluster: str, *, for_s: float) -> JoinToken:
        """Make a token for the relay of a further cluster.

        Args:
            address: ``host:port`` at which it reaches us.
            cluster: the name that it will have.
            for_s: how long, in seconds from now.

        Raises:
            FlopsError: ``usage`` for what is no name; ``conflict`` when there is such a cluster;
                ``disk_full``.
        """
        check_cluster_name(cluster)
        if self._in_force(relay_id(cluster)):
            raise FlopsError(
                ErrorCode.CONFLICT,
                f"There is a cluster {cluster} already.",
                hint=f"Take another name, or run `flops cluster remove {cluster}` first.",
            )
        token = self._make_token(address, DEFAULT_CLUSTER)
        self._keep(token, cluster=cluster, for_s=for_s, is_for_relay=True)
        return token

    def _make_token(self, address: str, name: str) -> JoinToken:
        return JoinToken(
            cluster=address,
            name=name,
            fingerprint=self._authority.fingerprint,
            id=secrets.token_hex(6),
            secret=secrets.token_urlsafe(24),
        )

    def _keep(
        self,
        token: JoinToken,
        *,
        cluster: str,
        for_s: float,
        nodes: int = 1,
        addons: tuple[str, ...] = (),
        is_for_relay: bool = False,
    ) -> None:
        now_s = self._clock.now_s()
        self._store.forget_invitations(now_s - _REMEMBERED_S)
        self._store.put_invitation(
            Invitation(
                id=token.id,
                secret_hash=_hash(token.secret),
                nodes=nodes,
                addons=addons,
                expires_at_s=now_s + for_s,
                cluster=cluster,
                is_for_relay=is_for_relay,
            )
        )
        whom = f"the relay of {cluster}" if is_for_relay else f"{nodes} nodes of {cluster}, with {addons}"
        _log.info("invitation %s: %s, within %.0f s", token.id, whom, for_s)

    def join(self, request: JoinRequest, caller: Caller | None = None) -> NodeCertificate:
        """Let a node join; the same node with the same key gets the same answer, and counts once.

        Raises:
            FlopsError: ``join_refused``, ``usage``, ``disk_full``; ``certificate_refused`` of its cluster.
        """
        cluster = self.cluster_of(caller or Caller())
        return self._join(request, NodeId(request.node_id), cluster, request.addons)

    def join_relay(self, request: ClusterJoinRequest) -> NodeCertificate:
        """Let the relay of a further cluster join, likewise."""
        cluster = check_cluster_name(request.cluster)
        return self._join(request, relay_id(cluster), cluster, ())

    def _join(
        self,
        request: JoinRequest | ClusterJoinRequest,
        node_id: NodeId,
        cluster: str,
        addons: tuple[str, ...],
    ) -> NodeCertificate:
        key = self._authority.key_of(request.signing_request)
        with self._lock:
            invitation = self._store.invitation(request.invitation)
            if invitation is None or not hmac.compare_digest(invitation.secret_hash, _hash(request.secret)):
                raise join_refused("this cluster has not made it")
            check_addressee(invitation, cluster, is_for_relay=is_relay(node_id))
            joined = self._store.joined(invitation.id)
            if key in joined:
                return self._same_again(self._store.certificates_of(node_id), key)
            now_s = self._clock.now_s()
            check_join(invitation, joined, key, addons, now_s)
            held = self._in_force(node_id) if is_relay(node_id) else self._store.certificates_of(node_id)
            if any(certificate.key != key for certificate in held):
                raise _taken(node_id, cluster)
            signed = self._authority.sign_node(
                request.signing_request, node_id, invitation.addons, now_s, self._life_s, cluster
            )
            self._store.admit(signed, invitation.id)
        _log.info("%s has joined by invitation %s; serial %s", node_id, invitation.id, signed.serial)
        return signed

    def _in_force(self, node_id: NodeId) -> list[NodeCertificate]:
        """Certificates that have not expired: a relay whose have joins anew, its nodes stay what they are."""
        now_s = self._clock.now_s()
        return [c for c in self._store.certificates_of(node_id) if now_s < c.not_after_s]

    @staticmethod
    def _same_again(held: list[NodeCertificate], key: str) -> NodeCertificate:
        found = [certificate for certificate in held if certificate.key == key]
        if not found:
            raise join_refused("the node that joined by it was removed, or has another id")
        return found[-1]

    def cluster_of(self, caller: Caller) -> str:
        """The cluster that somebody comes through: ours, unless a relay passes it on.

        Raises:
            FlopsError: ``certificate_refused`` for a relay whose certificate is not in force.
        """
        return DEFAULT_CLUSTER if caller.relay is None else self.check_relay(caller).cluster

    def check(self, caller: Caller) -> NodeCertificate:
        """The certificate in force of the node at the other side.

        Raises:
            FlopsError: ``certificate_refused``, also for one that comes through another cluster than its own.
        """
        cluster = self.cluster_of(caller)
        certificate = self._must_be_in_force(caller.peer, "No certificate was shown, and this needs one.")
        if certificate.cluster != cluster:
            raise FlopsError(
                ErrorCode.CERTIFICATE_REFUSED,
                f"Node {certificate.node_id} has joined the cluster {certificate.cluster}, and this is "
                f"{cluster}.",
                hint=f"Have it dial {certificate.cluster}; to move it, `flops node remove` it, and join here "
                "by a new token.",
            )
        return certificate

    def admit(self, caller: Caller, node_id: str) -> NodeCertificate:
        """Likewise, of one that says which node it is.

        Raises:
            FlopsError: ``certificate_refused``.
        """
        certificate = self.check(caller)
        if certificate.node_id != node_id:
            raise certificate_refused(
                certificate.node_id, f"is not one of node {node_id[:80]!r}, which it says it is"
            )
        return certificate

    def renew(self, caller: Caller, request: str) -> NodeCertificate:
        """Sign a further certificate for the node at the other side, for the key it has.

        Raises:
            FlopsError: ``certificate_refused``, ``usage``, ``disk_full``.
        """
        return self._renew(lambda: self.check(caller), request)

    def renew_relay(self, caller: Caller, request: str) -> NodeCertificate:
        """Likewise, for the relay at the other side."""
        return self._renew(lambda: self.check_relay(caller), request)

    def check_relay(self, caller: Caller) -> NodeCertificate:
        """The certificate in force of the relay at the other side.

        Raises:
            FlopsError: ``certificate_refused``.
        """
        return self._must_be_in_force(caller.relay, "No cluster's certificate was shown.")

    def _must_be_in_force(self, peer: PeerCertificate | None, otherwise: str) -> NodeCertificate:
        if peer is None:
            raise FlopsError(ErrorCode.CERTIFICATE_REFUSED, otherwise)
        return check_peer(peer, self._store.certificate(peer.serial), self._clock.now_s())

    def _renew(self, check: Callable[[], NodeCertificate], request: str) -> NodeCertificate:
        with self._lock:
            present = check()
            if self._authority.key_of(request) != present.key:
                raise certificate_refused(present.node_id, "cannot be renewed for another key")
            signed = self._authority.sign_node(
                request,
                present.node_id,
                present.addons,
                self._clock.now_s(),
                self._life_s,
                present.cluster,
            )
            self._store.renew(signed)
        _log.info("the certificate of %s is renewed; serial %s", signed.node_id, signed.serial)
        return signed

    def certify_service(self, caller: Caller, service: Service | None, request: str) -> str:
        """Sign a certificate for an aggregator, which learners dial; only its own node gets one.

        Raises:
            FlopsError: ``certificate_refused``, ``forbidden``, ``usage``.
        """
        node_id = self.check(caller).node_id
        spec = service.spec if service is not None else None
        if spec is None or spec.node_id != node_id or spec.kind is not ServiceKind.AGGREGATOR:
            raise FlopsError(
                ErrorCode.FORBIDDEN,
                f"Node {node_id} has no such aggregator, and gets no certificate for one.",
                hint="Certificates of services are for the node that runs them.",
            )
        name = aggregator_name(spec.project_id)
        return self._authority.sign_service(request, name, self._clock.now_s(), SERVICE_LIFE_S)

    def certify_data_server(self, caller: Caller, request: str) -> str:
        """Sign a certificate for a node's ML data server, which devices dial.

        Raises:
            FlopsError: ``certificate_refused``, ``forbidden`` for a node that may not have one, ``usage``.
        """
        certificate = self.check(caller)
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

    def expel_cluster(self, cluster: str) -> None:
        """Lock a cluster out for good, with its nodes; tokens that were made for it and them end, too.

        Raises:
            FlopsError: ``disk_full``.
        """
        with self._lock:
            self._store.expel_cluster(cluster)

    def service_key(self, service_id: ServiceId) -> str:
        """What a service shows to the cluster's port: good for this service, while it has not ended."""
        return hmac.new(self._secret, f"service:{service_id}".encode(), hashlib.sha256).hexdigest()

    def is_service_key(self, service_id: str, key: str) -> bool:
        """Whether a key is that of a service."""
        return hmac.compare_digest(self.service_key(ServiceId(service_id)).encode(), key.encode())


def _taken(node_id: NodeId, cluster: str) -> FlopsError:
    if is_relay(node_id):
        return join_refused(
            f"there is a cluster {cluster} already, with another key",
            hint=f"If it is the same machine, run `flops cluster remove {cluster}` first.",
        )
    return join_refused(
        f"a node with the id {node_id} has joined already, with another key",
        hint=f"If it is the same machine, run `flops node remove {node_id}` first.",
    )


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
