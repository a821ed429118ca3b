"""The federation of a manager that tests run by itself: its own cluster, and no other one."""

from __future__ import annotations

from flops.core.clusters import DEFAULT_CLUSTER, Cluster
from flops.errors import ErrorCode, FlopsError
from flops.wire.rest import (
    ClusterInvitationMade,
    ClusterInvitationRequest,
    InvitationMade,
    InvitationRequest,
)


class OneCluster:
    """Implements `flops.manager.cluster_routes.ClusterDesk`: nobody joins by a token."""

    def all(self) -> list[Cluster]:
        """The manager's own cluster."""
        return [Cluster(name=DEFAULT_CLUSTER, is_connected=True)]

    def remove(self, name: str, *, is_forced: bool = False) -> Cluster:
        """Refuse it: see `ClusterDesk`."""
        raise FlopsError(ErrorCode.CLUSTER_NOT_FOUND, f"There is no cluster {name[:80]!r} to remove.")

    def invite(self, wanted: InvitationRequest) -> InvitationMade:
        """Refuse it: see `ClusterDesk`."""
        raise FlopsError(ErrorCode.CONFLICT, "Nodes join this cluster without a token.")

    def invite_cluster(self, name: str, wanted: ClusterInvitationRequest) -> ClusterInvitationMade:
        """Refuse it: see `ClusterDesk`."""
        raise FlopsError(ErrorCode.CONFLICT, "Clusters join this one without a token.")
