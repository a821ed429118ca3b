"""How a service's status follows what happens to it and its node. Pure: each returns the new status, or None.

None means that nothing changes. A final status never changes.
"""

from __future__ import annotations

from flops.core.cluster import Service, ServiceState, ServiceStatus, ServiceUsage

_TAKEN_BY_NODE = frozenset({ServiceState.PREPARING, ServiceState.RUNNING, ServiceState.RESTARTING})


def status_when_reported(service: Service, reported: ServiceStatus) -> ServiceStatus | None:
    """The node reports a status; a repeated or late report changes nothing.

    A service that ended with its node, although nobody asked for its end, is lost rather than stopped: it
    runs again when the node is back.
    """
    known = service.status
    if known.state.is_final or reported.state is ServiceState.LOST:
        return None
    if reported.state is ServiceState.STOPPED and service.should_run:
        return status_when_node_lost(service, "It was ended on its node, and is started again with it.")
    is_same = _without_usage(reported) == _without_usage(known)
    return None if is_same else reported


def status_when_missing(service: Service, node_name: str) -> ServiceStatus | None:
    """The node said what it has, and this service is not among it."""
    if service.status.state.is_final:
        return None
    if not service.should_run:
        return _moved(service, ServiceState.STOPPED, f"It does not run on {node_name} any more.")
    if service.status.state is ServiceState.PENDING:
        return None
    return _moved(service, ServiceState.PENDING, f"{node_name} is back without it and starts it again.")


def status_when_node_lost(service: Service, detail: str) -> ServiceStatus | None:
    """The node is gone, or has ended the service by itself."""
    if service.status.state.is_final:
        return None
    if not service.should_run:
        return _moved(service, ServiceState.STOPPED, detail)
    if service.status.state in _TAKEN_BY_NODE:
        return _moved(service, ServiceState.LOST, detail)
    return None


def status_when_given_up(service: Service, detail: str) -> ServiceStatus | None:
    """The service is removed, or asked to stop while nobody can answer."""
    return None if service.status.state.is_final else _moved(service, ServiceState.STOPPED, detail)


def may_run(service: Service) -> bool:
    """Whether its node should run it."""
    return service.should_run and not service.status.state.is_final


def _moved(service: Service, state: ServiceState, detail: str) -> ServiceStatus:
    return service.status.model_copy(update={"state": state, "detail": detail, "usage": ServiceUsage()})


def _without_usage(status: ServiceStatus) -> ServiceStatus:
    return status.model_copy(update={"usage": ServiceUsage()})
