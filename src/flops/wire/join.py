"""How a node joins a cluster that encrypts: tokens, and the messages of ``/api/node``.

The node asks ``GET /api/node/authority`` without trusting the answer, holds it against the fingerprint in its
token, and only then sends `JoinRequest` to ``POST /api/node/join``, over TLS to that authority's cluster.
``POST /api/node/certificate`` with a `RenewalRequest` renews a certificate that is still good;
``POST /api/node/service-certificate`` with a `ServiceCertificateRequest` makes one for an aggregator
there, or for the node's ML data server.
"""

from __future__ import annotations

from pydantic import Field

from flops.core.model import Value
from flops.errors import ErrorCode, FlopsError
from flops.wire.token_text import read_line, write_line

AUTHORITY_PATH = "/api/node/authority"
MANAGER_AUTHORITY_PATH = "/api/flops/authority"  # of the manager, for users' machines
JOIN_PATH = "/api/node/join"
RENEWAL_PATH = "/api/node/certificate"
SERVICE_PATH = "/api/node/service-certificate"
PEER_EXTENSION = "flops.peer"  # of a request's scope: the server puts a `PeerCertificate` there
_PREFIX = "flops1."


class JoinToken(Value):
    """What an operator carries to a new node."""

    cluster: str  # host:port
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")  # SHA-256 of the authority's certificate
    id: str
    secret: str

    def text(self) -> str:
        """The token as people copy it."""
        return write_line(_PREFIX, self.cluster, self.fingerprint, self.id, self.secret)

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Read a token.

        Raises:
            FlopsError: ``join_refused`` for what is none, such as half of one.
        """
        try:
            cluster, fingerprint, invitation_id, secret = read_line(_PREFIX, text)
            return cls(cluster=cluster, fingerprint=fingerprint, id=invitation_id, secret=secret)
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


class RenewalRequest(Value):
    """A node whose certificate ends."""

    signing_request: str


class ServiceCertificateRequest(Value):
    """A service on this node that others dial."""

    service_id: str
    signing_request: str


class CertificateSigned(Value):
    """The answer to all of these."""

    certificate: str  # PEM
