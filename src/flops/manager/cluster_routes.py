"""The endpoints about clusters, and about who joins them."""

from __future__ import annotations

from typing import Annotated, Protocol

from fastapi import APIRouter, Query

from flops.core.clusters import Cluster
from flops.core.federation import summarize
from flops.manager.engine import Engine
from flops.wire.rest import (
    ClusterInvitationMade,
    ClusterInvitationRequest,
    ClusterList,
    InvitationMade,
    InvitationRequest,
    Message,
)


class ClusterDesk(Protocol):
    """The clusters of a federation, and the tokens by which others join."""

    def all(self) -> list[Cluster]:
        """All clusters, the manager's own first."""
        ...

    def remove(self, name: str, *, is_forced: bool = False) -> Cluster:
        """Lock a cluster out with its nodes, and forget it.

        Raises:
            FlopsError: ``cluster_not_found``, ``conflict``.
        """
        ...

    def invite(self, wanted: InvitationRequest) -> InvitationMade:
        """Make a token for nodes.

        Raises:
            FlopsError: ``conflict`` where nothing is encrypted, ``cluster_not_found``, ``usage``.
        """
        ...

    def invite_cluster(self, name: str, wanted: ClusterInvitationRequest) -> ClusterInvitationMade:
        """Make a token for a further cluster.

        Raises:
            FlopsError: ``conflict`` where nothing is encrypted, or there is such a cluster; ``usage``.
        """
        ...


def build_cluster_routes(engine: Engine, desk: ClusterDesk) -> APIRouter:
    """The endpoints of clusters and invitations."""
    router = APIRouter(prefix="/api/flops", tags=["cluster"])

    @router.get("/clusters")
    def list_clusters() -> ClusterList:
        """All clusters, connected or not, each with what its connected nodes have."""
        return ClusterList(clusters=tuple(summarize(desk.all(), engine.nodes())))

    @router.post("/clusters/{name}/invitation")
    def invite_cluster(name: str, wanted: ClusterInvitationRequest | None = None) -> ClusterInvitationMade:
        """Make a token by which a further cluster joins."""
        return desk.invite_cluster(name, wanted or ClusterInvitationRequest())

    @router.delete("/clusters/{name}")
    def remove_cluster(
        name: str,
        force: Annotated[bool, Query(description="also with services: they have failed then")] = False,
    ) -> Message:
        """Lock a cluster out at once, with all its nodes, and forget it."""
        desk.remove(name, is_forced=force)
        return Message(message=f"Cluster {name} was removed, with its nodes.")

    @router.post("/invitations")
    def invite_nodes(wanted: InvitationRequest | None = None) -> InvitationMade:
        """Make a token by which nodes join a cluster that encrypts."""
        return desk.invite(wanted or InvitationRequest())

    return router
