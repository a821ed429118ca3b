"""How nodes and relays join a cluster that encrypts: tokens, and what is said below ``/api``.

The node asks ``GET /api/node/authority`` without trusting the answer, holds it against the fingerprint in its
token, and only then sends `JoinRequest` to ``POST /api/node/join``, over TLS to that authority's cluster.
``POST /api/node/certificate`` with a `RenewalRequest` renews a certificate that is still good;
``POST /api/node/service-certificate`` with a `ServiceCertificateRequest` makes one for an aggregator
there, or for the node's ML data server.

The relay of a further cluster joins likewise by a `ClusterJoinRequest` to ``POST /api/cluster/join``, renews
its certificate by ``POST /api/cluster/certificate``, and tells every `HEARTBEAT_INTERVAL_S` that it is there,
by a `RelayPresence` to ``POST /api/cluster/presence``. What it passes on of its nodes has a header: which
certificate the node has shown (`NODE_HEADER`), or, where nothing is encrypted, which cluster it is
(`CLUSTER_HEADER`).
"""

from __future__ import annotations

from pydantic import Field

from flops.core.admission import PeerCertificate
from flops.core.clusters import DEFAULT_CLUSTER
from flops.core.model import Value
from flops.errors import ErrorCode, FlopsError
from flops.wire.token_text import read_line, write_line

AUTHORITY_PATH = "/api/node/authority"
MANAGER_AUTHORITY_PATH = "/api/flops/authority"  # of the manager, for users' machines
JOIN_PATH = "/api/node/join"
RENEWAL_PATH = "/api/node/certificate"
SERVICE_PATH = "/api/node/service-certificate"
CLUSTER_JOIN_PATH = "/api/cluster/join"
CLUSTER_RENEWAL_PATH = "/api/cluster/certificate"
PRESENCE_PATH = "/api/cluster/presence"
NODE_HEADER = "flops-node"
CLUSTER_HEADER = "flops-cluster"
PEER_EXTENSION = "flops.peer"  # of a request's scope: the server puts a `PeerCertificate` there
_PREFIX = "flops1."


class JoinToken(Value):
    """What an operator carries to a new node."""

    cluster: str  # host:port
    name: str = DEFAULT_CLUSTER  # of the cluster at that address
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")  # SHA-256 of the authority's certificate
    id: str
    secret: str

    def text(self) -> str:
        """The token as people copy it."""
        parts = [self.cluster, self.fingerprint, self.id, self.secret]
        return write_line(_PREFIX, *parts, *([] if self.name == DEFAULT_CLUSTER else [self.name]))

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Read a token.

        Raises:
            FlopsError: ``join_refused`` for what is none, such as half of one.
        """
        try:
            cluster, fingerprint, invitation_id, secret, *name = read_line(_PREFIX, text)
            return cls(
                cluster=cluster,
                name=name[0] if name else DEFAULT_CLUSTER,
                fingerprint=fingerprint,
                id=invitation_id,
                secret=secret,
            )
        except ValueError as exc:
            raise FlopsError(
                ErrorCode.JOIN_REFUSED,
                "That is no token of FLOps, or not a whole one.",
                hint="Copy the whole line that `flops node invite` printed; it begins with flops1.",
            ) from exc


class AuthorityShown(Value):
    """Whom nodes of this cluster trust, and users."""

    certificate: str  # PEM; "" where nothing is signed by an authority of the cluster


class JoinRequest(Value):
    """A node that wants to join."""

    invitation: str
    secret: str
    node_id: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    addons: tuple[str, ...] = ()
    signing_request: str  # PEM; the key it belongs to never leaves the node


class ClusterJoinRequest(Value):
    """A relay that wants to join."""

    invitation: str
    secret: str
    cluster: str  # its name
    signing_request: str


class RelayPresence(Value):
    """A relay that is there."""

    cluster: str
    relay: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")  # which installation it is
    address: str  # host:port at which its nodes reach it
    version: str = ""


class RenewalRequest(Value):
    """A node or a relay whose certificate ends."""

    signing_request: str


class ServiceCertificateRequest(Value):
    """A service on this node that others dial."""

    service_id: str
    signing_request: str


class CertificateSigned(Value):
    """The answer to all of these."""

    certificate: str  # PEM


def node_header(peer: PeerCertificate) -> str:
    """How a relay says which certificate a node has shown to it."""
    return f"{peer.serial} {peer.name}"


def read_node_header(text: str) -> PeerCertificate | None:
    """What `node_header` has written; None for anything else."""
    serial, _, name = text.partition(" ")
    return PeerCertificate(serial=serial, name=name) if serial and name else None
