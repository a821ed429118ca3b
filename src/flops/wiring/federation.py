"""Joins the manager with the clusters of its federation, and makes the tokens by which others join."""

from __future__ import annotations

from flops.core.address import reached_elsewhere, split_port, with_port
from flops.core.clusters import DEFAULT_CLUSTER, Cluster, find_cluster
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.admission import Admission
from flops.orchestrator.clusters import Clusters
from flops.settings import ControlSettings
from flops.wire.rest import (
    ClusterInvitationMade,
    ClusterInvitationRequest,
    InvitationMade,
    InvitationRequest,
)


class Federation:
    """Implements `flops.manager.cluster_routes.ClusterDesk`.

    Args:
        settings: of the control plane.
        clusters: those that have joined.
        admission: makes tokens; None where nothing is encrypted.
        port: of the manager's own cluster.
    """

    def __init__(
        self,
        settings: ControlSettings,
        clusters: Clusters,
        admission: Admission | None,
        port: int,
    ) -> None:
        self._host = settings.cluster_host
        self._clusters = clusters
        self._admission = admission
        self._port = port

    def all(self) -> list[Cluster]:
        """All clusters, the manager's own first."""
        return self._clusters.all()

    def remove(self, name: str, *, is_forced: bool = False) -> Cluster:
        """Lock a cluster out with its nodes; see `ClusterDesk`."""
        return self._clusters.remove(name, is_forced=is_forced)

    def invite(self, wanted: InvitationRequest) -> InvitationMade:
        """Make a token for nodes; see `ClusterDesk`."""
        admission = self._must_encrypt("nodes join it without a token")
        if wanted.cluster == DEFAULT_CLUSTER:
            address = self._own_address(wanted.address)
        else:
            address = find_cluster(self.all(), wanted.cluster).address
            if wanted.address:
                address = with_port(wanted.address, split_port(address)[1])
        token = admission.invite(
            address, nodes=wanted.nodes, for_s=wanted.for_s, addons=wanted.addons, cluster=wanted.cluster
        )
        return InvitationMade(token=token.text(), cluster=address, nodes=wanted.nodes, addons=wanted.addons)

    def invite_cluster(self, name: str, wanted: ClusterInvitationRequest) -> ClusterInvitationMade:
        """Make a token for a further cluster; see `ClusterDesk`."""
        admission = self._must_encrypt("other clusters join it without a token")
        address = self._own_address(wanted.address)
        token = admission.invite_relay(address, name, for_s=wanted.for_s)
        return ClusterInvitationMade(token=token.text(), name=name, manager=address)

    def _must_encrypt(self, otherwise: str) -> Admission:
        if self._admission is None:
            raise FlopsError(
                ErrorCode.CONFLICT,
                f"The cluster at {self._host} does not encrypt: {otherwise}.",
                hint="FLOPS_CLUSTER_HOST names an address that other machines reach; see docs/security.md.",
            )
        return self._admission

    def _own_address(self, told: str | None) -> str:
        return with_port(reached_elsewhere(self._host, told, "The cluster"), self._port)
