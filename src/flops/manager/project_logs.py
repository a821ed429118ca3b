"""Outputs of a project's services, fetched from their nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from flops.core.cluster import Service, ServiceKind
from flops.core.ids import ProjectId, ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.manager.engine import Engine
from flops.wire.rest import ProjectLogs, ServiceLog

_OTHERS = ""
_AT_ONCE = 32


def read_logs(
    engine: Engine, project_id: ProjectId, service: str | None, after: Sequence[str], tail_bytes: int
) -> ProjectLogs:
    """What the services of a project have written.

    Args:
        engine: knows the project and reaches the nodes.
        project_id: the project.
        service: only the service of this id, or those of this kind.
        after: where to begin, ``SERVICE:PLACE``, or ``PLACE`` for all others; without it, with the end.
        tail_bytes: how much of each at most.

    Raises:
        FlopsError: ``project_not_found``; ``service_not_found``; ``usage`` for `after`; for a single service
            that was asked for by its id ``node_lost``, ``timeout``, or ``forbidden`` by its node.
    """
    engine.get(project_id)
    places = _parse_places(after)
    names = {node.id: node.name for node in engine.nodes()}

    def read(found: Service) -> ServiceLog:
        log = ServiceLog(
            service_id=found.spec.id,
            kind=found.spec.kind.value,
            node=names.get(found.spec.node_id, found.spec.node_id),
            state=found.status.state.value,
        )
        place = places.get(found.spec.id, places.get(_OTHERS))
        try:
            output = engine.service_logs(ServiceId(found.spec.id), after=place, tail_bytes=tail_bytes)
        except FlopsError as exc:
            if found.spec.id == service:
                raise
            return log.model_copy(update={"problem": exc.message})  # it hides none of the others
        return log.model_copy(update=dict(output))

    chosen = _choose(engine.services(project_id), project_id, service)
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # a node that stands still takes seconds for each
        return ProjectLogs(services=tuple(pool.map(read, chosen)))


def _choose(services: Sequence[Service], project_id: ProjectId, service: str | None) -> list[Service]:
    if service is None:
        return list(services)
    chosen = [s for s in services if service in {s.spec.id, s.spec.kind.value}]
    if not chosen and service not in set(ServiceKind):
        ids = ", ".join(sorted(s.spec.id for s in services)) or "none yet"
        kinds = ", ".join(ServiceKind)
        raise FlopsError(
            ErrorCode.SERVICE_NOT_FOUND,
            f"Project {project_id} has no service {service!r}.",
            hint=f"Its services are: {ids}. A kind names all of its kind: {kinds}.",
        )
    return chosen


def _parse_places(after: Sequence[str]) -> Mapping[str, int]:
    places = {}
    for text in after:
        service, _, place = text.rpartition(":")
        if not (place.isascii() and place.isdecimal() and len(place) <= 18):
            raise FlopsError(ErrorCode.USAGE, f"after: {text!r} is neither PLACE nor SERVICE:PLACE.")
        places[service] = int(place)
    return places
