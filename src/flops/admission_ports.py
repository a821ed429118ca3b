"""What the admission of nodes and of clusters needs from the outside world; see `flops.ports`."""

from __future__ import annotations

from typing import Protocol

from flops.core.admission import Invitation, NodeCertificate
from flops.core.clusters import Cluster
from flops.core.ids import NodeId


class AdmissionStore(Protocol):
    """Invitations and certificates in force; each method is one transaction. All raise ``disk_full``."""

    def put_invitation(self, invitation: Invitation) -> None:
        """Store an invitation."""
        ...

    def invitation(self, invitation_id: str) -> Invitation | None:
        """An invitation that was made."""
        ...

    def joined(self, invitation_id: str) -> list[str]:
        """Keys of the nodes that have joined by an invitation, removed ones too."""
        ...

    def admit(self, certificate: NodeCertificate, invitation_id: str) -> None:
        """Store a node's first certificate, and that the invitation was used for its key."""
        ...

    def renew(self, certificate: NodeCertificate) -> None:
        """Store a further certificate of a node; ended ones of it are forgotten."""
        ...

    def certificate(self, serial: str) -> NodeCertificate | None:
        """The certificate in force with a serial number."""
        ...

    def certificates_of(self, node_id: NodeId) -> list[NodeCertificate]:
        """A node's certificates in force, the latest last."""
        ...

    def expel(self, node_id: NodeId) -> None:
        """No certificate of this node is in force any more."""
        ...

    def expel_cluster(self, cluster: str) -> None:
        """No certificate and no invitation of this cluster, its relay and its nodes, is in force any more."""
        ...

    def forget_invitations(self, before_s: float) -> None:
        """Forget the invitations that ended before a time, with what is known of their use."""
        ...


class ClusterRegister(Protocol):
    """The clusters that have joined, durably."""

    def load(self) -> list[Cluster]:
        """All that was saved last; none at first.

        Raises:
            FlopsError: ``config_corrupt``, ``file_unreadable``.
        """
        ...

    def save(self, clusters: list[Cluster]) -> None:
        """Replace what was saved, all or nothing.

        Raises:
            FlopsError: ``disk_full``, ``file_unreadable``.
        """
        ...


class Authority(Protocol):
    """Signs certificates of one cluster."""

    @property
    def pem(self) -> str:
        """Its own certificate, which nodes trust."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of its own certificate."""
        ...

    def key_of(self, request: str) -> str:
        """Hex SHA-256 of the public key that a signing request (PEM) proves to have.

        Raises:
            FlopsError: ``usage`` for what is no signing request.
        """
        ...

    def sign_node(
        self,
        request: str,
        node_id: NodeId,
        addons: tuple[str, ...],
        now_s: float,
        life_s: float,
        cluster: str,
    ) -> NodeCertificate:
        """Sign the certificate of a cluster's node, or relay, by the id; names in the request do not count.

        Raises:
            FlopsError: ``usage`` for what is no signing request.
        """
        ...

    def sign_service(self, request: str, name: str, now_s: float, life_s: float) -> str:
        """Sign a certificate (PEM) for a service that others dial by a name; raises likewise."""
        ...
