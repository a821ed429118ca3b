"""What holds when a node is removed that will never come back."""

from __future__ import annotations

from collections.abc import Sequence

from flops.core.cluster import Node, Service, ServiceState, ServiceStatus, ServiceUsage
from flops.errors import ErrorCode, FlopsError


def check_removal(
    node: Node, services: Sequence[Service], *, is_forced: bool, is_locked_out: bool = False
) -> None:
    """Refuse to remove a node that is there, or, unless forced, one with services that have not ended.

    Args:
        node: the node.
        services: those of it that have not ended.
        is_forced: whether its services may be given up.
        is_locked_out: whether it cannot come back by itself; else one that is there would do so at once.

    Raises:
        FlopsError: ``conflict``.
    """
    if node.is_connected and not is_locked_out:
        raise FlopsError(
            ErrorCode.CONFLICT,
            f"Node {node.name} is connected.",
            hint="Run `NodeEngine stop` on its machine first; only a node that is gone can be removed.",
        )
    if services and not is_forced:
        ids = ", ".join(service.spec.id for service in services)
        raise FlopsError(
            ErrorCode.CONFLICT,
            f"Node {node.name} has services that go on when it is back: {ids}.",
            hint="If it will never be back, add --force (?force=true): they count as failed then.",
        )


def status_when_node_removed(service: Service, node_name: str) -> ServiceStatus:
    """What becomes of a service that had not ended: it has failed, unless it was asked to stop."""
    status = service.status.model_copy(update={"usage": ServiceUsage()})
    if service.should_run:
        error = FlopsError(
            ErrorCode.NODE_LOST,
            f"The node {node_name}, which had {service.spec.id}, was removed.",
            hint="It was given up for good. Submit the project again, to have it placed on other nodes.",
        )
        failed = {"state": ServiceState.FAILED, "detail": error.message, "error": error.to_dict()}
        return status.model_copy(update=failed)
    stopped = {"state": ServiceState.STOPPED, "detail": f"Its node {node_name} was removed."}
    return status.model_copy(update=stopped)
