"""Which learner of a project is in which state, told from the project, its services and its history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flops.core.cluster import Service, ServiceState
from flops.core.ids import NodeId, ServiceId
from flops.core.model import Value
from flops.core.project import Project, ProjectEvent
from flops.core.service_moves import learner_ids


class LearnerState(StrEnum):
    """Where a learner stands, as users see it."""

    WAITING = "waiting"  # its node prepares it, or has not taken it yet
    LOADING = "loading"  # it runs, and has not joined the aggregator yet
    JOINED = "joined"  # connected; takes part from the next round
    TRAINING = "training"  # takes part in the present round
    RESTARTING = "restarting"  # ended, waits for its node to start it again
    LOST = "lost"  # its node is gone
    FAILED = "failed"  # for good, or its code in the present round
    ENDED = "ended"  # with its project, or asked to


class LearnerStanding(Value):
    """A learner, and what last went wrong with it."""

    service: ServiceId
    node: str  # its node's name
    state: LearnerState
    since_s: float | None = None  # when it came into this state; None when that is not known
    doing: str = ""  # what it does or waits for, in some words
    rows: int | None = None  # when it last joined; None when it never has
    reason: str = ""  # of its last failure, loss or leaving; it stays after the learner is back
    reason_at_s: float = 0.0


@dataclass
class _Story:
    """What the history tells of a learner."""

    rows: int | None = None
    reason: str = ""
    reason_at_s: float = 0.0
    is_explained: bool = False
    has_failed: bool = False  # for good
    round: int = 0  # the present one; 0 between rounds
    is_in_round: bool = False
    has_failed_in_round: bool = False
    doing: str = ""  # the last thing that it, or its node, said of it
    doing_at_s: float = 0.0
    changed_at_s: float | None = None

    def take_in(self, event: ProjectEvent, learner: ServiceId) -> None:
        """Go on with the next event."""
        kind = event.kind
        if kind.startswith("cluster_round_"):  # of a hierarchical training: only of those in the cluster
            kind = kind.removeprefix("cluster_") if learner in event.data.get("learners", ()) else ""
        match kind:
            case "round_started":
                self.round = int(event.data.get("round", 0))
                self.is_in_round = learner in event.data.get("learners", ())
                self.has_failed_in_round = False
                self.changed_at_s = event.time_s if self.is_in_round else self.changed_at_s
            case "round_completed":
                self.changed_at_s = event.time_s if self.is_in_round else self.changed_at_s
                self.round, self.is_in_round, self.has_failed_in_round = 0, False, False
        if learner in {event.data.get("learner"), event.data.get("service")}:
            self._take_in_own(event)

    def _take_in_own(self, event: ProjectEvent) -> None:
        if event.kind == "service_progressed":
            self.doing, self.doing_at_s = event.message.partition(": ")[2], event.time_s
            return
        self.changed_at_s = event.time_s
        if event.kind == "learner_joined":
            self.rows, self.is_explained, self.is_in_round = event.data.get("rows"), False, False
        elif (text := _reason(event)) and not (event.kind == "learner_left" and self.is_explained):
            # A crashed learner's connection ends as well, which would hide why.
            self.reason, self.reason_at_s, self.is_explained = text, event.time_s, True
        self.has_failed = self.has_failed or event.kind == "service_failed"
        self.has_failed_in_round = self.has_failed_in_round or event.kind == "learner_failed"


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
    known = {service.spec.id: service for service in services}
    return tuple(
        _standing(project, learner, nodes.get(node, node), known.get(learner), history)
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
    service: Service | None,
    history: Sequence[ProjectEvent],
) -> LearnerStanding:
    story = _Story()
    for event in history:
        story.take_in(event, learner)
    failure = project.failure
    if failure is not None and learner in {failure.details.get("learner"), failure.details.get("service_id")}:
        story.has_failed, story.reason = True, failure.message
        story.reason_at_s = story.changed_at_s = project.spans[-1].entered_at_s
    state = _state(project, learner, service, story)
    return LearnerStanding(
        service=learner,
        node=node,
        state=state,
        since_s=_since(project, state, service, story),
        doing="" if project.stage.is_final else _doing(state, service, story),
        rows=story.rows,
        reason=story.reason,
        reason_at_s=story.reason_at_s,
    )


def _state(project: Project, learner: ServiceId, service: Service | None, story: _Story) -> LearnerState:
    state = service.status.state if service is not None else ServiceState.PENDING
    is_over = project.stage.is_final or learner not in project.services
    if story.has_failed or state is ServiceState.FAILED:
        return LearnerState.FAILED
    if not is_over and (state is ServiceState.LOST or learner in project.lost_services):
        return LearnerState.LOST
    if not is_over and state is ServiceState.RESTARTING:
        return LearnerState.RESTARTING
    if story.has_failed_in_round or learner in project.failed_learners:
        return LearnerState.FAILED
    if is_over:
        return LearnerState.ENDED
    if project.training is not None and learner in project.training.learners:
        return LearnerState.TRAINING if story.is_in_round else LearnerState.JOINED
    return LearnerState.LOADING if state is ServiceState.RUNNING else LearnerState.WAITING


def _since(project: Project, state: LearnerState, service: Service | None, story: _Story) -> float | None:
    if state is LearnerState.ENDED:
        return project.spans[-1].entered_at_s if project.stage.is_final else story.changed_at_s
    if state in {LearnerState.WAITING, LearnerState.LOADING, LearnerState.RESTARTING} and service is not None:
        return service.updated_at_s
    return story.changed_at_s


def _doing(state: LearnerState, service: Service | None, story: _Story) -> str:
    detail = service.status.detail if service is not None else ""
    match state:
        case LearnerState.WAITING:
            return detail or "Waits for its node."
        case LearnerState.LOADING if service is not None and story.doing_at_s >= service.updated_at_s:
            return story.doing
        case LearnerState.LOADING:
            return "Loads its code and its data."
        case LearnerState.JOINED:
            return "Waits to take part in a round."
        case LearnerState.TRAINING:
            return f"Takes part in round {story.round}."
        case LearnerState.LOST:
            return "Waits for its node, which is gone."
        case LearnerState.RESTARTING:
            return "Waits for its node to start it again."
        case LearnerState.FAILED if story.has_failed_in_round and not story.has_failed:
            return "Waits for the next round."
        case _:
            return ""


def _reason(event: ProjectEvent) -> str:
    match event.kind:
        case "learner_left":
            return str(event.data.get("reason", ""))
        case "service_restarting" | "service_failed" | "service_told" | "learner_failed":
            failure = _failure(event)
            message = str(failure.get("message") or event.message)
            output = str((failure.get("details") or {}).get("output") or "").strip().splitlines()
            return f"{message} Its last line: {output[-1].strip()}" if output else message
        case "service_lost":
            return event.message
        case _:
            return ""


def _failure(event: ProjectEvent) -> dict[str, Any]:
    failure = event.data.get("failure")
    return failure if isinstance(failure, dict) else {}
