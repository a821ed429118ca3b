"""Which learner of a project is in which state, told from the project, its services and its history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from flops.core.cluster import Service, ServiceState
from flops.core.ids import NodeId, ServiceId
from flops.core.model import Value
from flops.core.project import Project, ProjectEvent
from flops.core.service_moves import learner_ids


class LearnerState(StrEnum):
    """Where a learner stands, as users see it."""

    WAITING = "waiting"  # started or about to be, not connected to the aggregator
    JOINED = "joined"
    RESTARTING = "restarting"  # ended, waits for its node to start it again
    LOST = "lost"  # its node is gone
    FAILED = "failed"
    ENDED = "ended"  # with its project, or asked to


class LearnerStanding(Value):
    """A learner, and what last went wrong with it."""

    service: ServiceId
    node: str  # its node's name
    state: LearnerState
    rows: int | None = None  # when it last joined; None when it never has
    reason: str = ""  # of its last failure, loss or leaving; it stays after the learner is back
    reason_at_s: float = 0.0


def learner_standings(
    project: Project,
    services: Sequence[Service],
    history: Sequence[ProjectEvent],
    nodes: Mapping[NodeId, str],
) -> tuple[LearnerStanding, ...]:
    """The learners of a project in the order of its placement; none before they are asked for.

    Args:
        project: the project.
        services: its services, as far as the cluster still knows them.
        history: its events so far, oldest first.
        nodes: node names by node id.
    """
    if project.training is None or project.placement is None:
        return ()
    states = {service.spec.id: service.status.state for service in services}
    return tuple(
        _standing(project, learner, nodes.get(node, node), states.get(learner), history)
        for learner, node in zip(learner_ids(project), project.placement.learners, strict=True)
    )


def last_words(event: ProjectEvent) -> str:
    """What a service printed before it ended, or else the traceback it told; empty when there is neither."""
    details = _failure(event).get("details") or {}
    return str(details.get("output") or details.get("traceback") or "").strip()


def _standing(
    project: Project,
    learner: ServiceId,
    node: str,
    state: ServiceState | None,
    history: Sequence[ProjectEvent],
) -> LearnerStanding:
    rows, reason, reason_at_s = None, "", 0.0
    has_failed = is_explained = False
    for event in history:
        if learner not in {event.data.get("learner"), event.data.get("service")}:
            continue
        if event.kind == "learner_joined":
            rows, is_explained = event.data.get("rows"), False
        elif (text := _reason(event)) and not (event.kind == "learner_left" and is_explained):
            # A crashed learner's connection ends as well, which would hide why.
            reason, reason_at_s, is_explained = text, event.time_s, True
        has_failed = has_failed or event.kind == "service_failed"
    failure = project.failure
    if failure is not None and learner in {failure.details.get("learner"), failure.details.get("service_id")}:
        has_failed, reason, reason_at_s = True, failure.message, project.spans[-1].entered_at_s
    return LearnerStanding(
        service=learner,
        node=node,
        state=_state(project, learner, state, has_failed=has_failed),
        rows=rows,
        reason=reason,
        reason_at_s=reason_at_s,
    )


def _state(
    project: Project, learner: ServiceId, state: ServiceState | None, *, has_failed: bool
) -> LearnerState:
    is_over = project.stage.is_final or learner not in project.services
    if has_failed or state is ServiceState.FAILED:
        return LearnerState.FAILED
    if not is_over and (state is ServiceState.LOST or learner in project.lost_services):
        return LearnerState.LOST
    if not is_over and state is ServiceState.RESTARTING:
        return LearnerState.RESTARTING
    if learner in project.failed_learners:
        return LearnerState.FAILED
    if is_over:
        return LearnerState.ENDED
    is_joined = project.training is not None and learner in project.training.learners
    return LearnerState.JOINED if is_joined else LearnerState.WAITING


def _reason(event: ProjectEvent) -> str:
    match event.kind:
        case "learner_left":
            return str(event.data.get("reason", ""))
        case "service_restarting" | "service_failed" | "service_told":
            message = str(_failure(event).get("message") or event.message)
            words = last_words(event).splitlines()
            return f"{message} Its last line: {words[-1].strip()}" if words else message
        case "service_lost":
            return event.message
        case _:
            return ""


def _failure(event: ProjectEvent) -> dict[str, Any]:
    failure = event.data.get("failure")
    return failure if isinstance(failure, dict) else {}
