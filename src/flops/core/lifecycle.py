"""The life of a project as a pure state machine: events in, a changed project, history and effects out.

`_TABLE` decides every pair of event and stage: a move, `LATE` (the project is past it, nothing happens), or
`IMPOSSIBLE` (raises). A second delivery of any event changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from flops.core import cluster_moves, late_nodes, service_moves, training_moves
from flops.core.change import Change, Step
from flops.core.effects import EffectKind
from flops.core.endings import abort, end_if_nothing_runs, fail, stop_services
from flops.core.events import (
    Aborted,
    AggregatorListening,
    DeleteRequested,
    EnvironmentLocked,
    InferenceListening,
    LearnerFailed,
    LearnerJoined,
    LearnerLeft,
    LifecycleEvent,
    ModelPackaged,
    NodesTakenIn,
    PlacementDecided,
    RepositoryResolved,
    RoundCompleted,
    RoundStarted,
    ServiceChanged,
    ServiceProgressed,
    ServicesEnded,
    ServiceTold,
    StepFailed,
    StopRequested,
    Submitted,
    TrainingCompleted,
    TrainingStarted,
)
from flops.core.ids import ProjectId
from flops.core.project import Placement, Project, Stage
from flops.core.sla import ProjectSla

__all__ = ["IllegalTransitionError", "Step", "decide", "new_project", "step"]

Move = Callable[[Change, Any], None]
LATE = "late"
IMPOSSIBLE = "impossible"
Decision = Move | str


class IllegalTransitionError(Exception):
    """An event that cannot happen in the project's stage: a defect. Tells how the project got there."""

    def __init__(self, project: Project, event: LifecycleEvent) -> None:
        spans = " → ".join(f"{span.stage.value} ({span.entered_at_s:.3f})" for span in project.spans)
        super().__init__(
            f"{event.name} cannot happen to project {project.id} while it is {project.stage.value} "
            f"(version {project.version}; {spans}; last: {project.doing!r}): {event!r}"
        )


def new_project(project_id: ProjectId, sla: ProjectSla, now_s: float) -> Project:
    """A project as it is before its first event, which is `Submitted`."""
    return Project(id=project_id, sla=sla, created_at_s=now_s, updated_at_s=now_s)


def step(project: Project, event: LifecycleEvent, now_s: float) -> Step:
    """Take in an event.

    Args:
        project: the project as it is stored.
        event: what happened.
        now_s: when, in seconds since the epoch.

    Returns:
        The project with the next version, its new history and effects; or the project as it is.

    Raises:
        IllegalTransitionError: the event is impossible in the project's stage.
    """
    if 0 < event.seq <= project.cluster_seq:
        return Step(project=project, is_changed=False)
    decision = decide(project.stage, type(event))
    if decision == IMPOSSIBLE:
        raise IllegalTransitionError(project, event)
    if isinstance(decision, str):
        return Step(project=project, is_changed=False)
    change = Change(project, event, now_s)
    decision(change, event)
    return change.finish()


def decide(stage: Stage, event: type[LifecycleEvent]) -> Decision:
    """What the table says about an event in a stage."""
    return _TABLE[event][stage]


# Moves from submission to placement


def _submit(change: Change, _event: Submitted) -> None:
    sla = change.project.sla
    training = sla.training_configuration
    url = sla.ml_repo_url.rsplit("@", 1)[-1] if "://" in sla.ml_repo_url else sla.ml_repo_url
    where = f"{url} at {sla.ml_repo_ref}" if sla.ml_repo_ref else url
    change.enter(Stage.SUBMITTED, "Accepted.")
    rounds, learners = f"{training.training_rounds} rounds", f"{training.min_available_clients} learners"
    if training.is_hierarchical:
        rounds = f"{training.training_cycles} cycles of {rounds}"
        learners = f"{learners} in each cluster"
    change.note(
        f"The project was accepted: {where}, {rounds} with {learners} on data tagged "
        f"{', '.join(training.data_tags)}."
    )
    change.enter(Stage.RESOLVING, f"Looks up the repository {where}.")
    change.request(EffectKind.RESOLVE_REPOSITORY)


def _repository_resolved(change: Change, event: RepositoryResolved) -> None:
    if change.project.repository is not None:
        return
    commit = event.repository.commit
    change.set(
        repository=event.repository,
        environment=event.environment,
        doing="Looks for nodes that can take the project.",
    )
    if event.environment is None:
        known = "its environment has to be built"
    elif change.project.runs_images:
        known = "its environment is known already, only its code has to be put into images"
    else:
        known = "its environment is known already, nothing has to be built"
    change.note(f"The repository is at commit {commit[:12]}; {known}.", commit=commit)
    change.request(EffectKind.DECIDE_PLACEMENT)


def _try_placement(change: Change, event: PlacementDecided) -> None:
    if change.project.repository is None:
        return
    if not change.project.needs_build:
        _place(change, event)
        return
    what = "images" if change.project.runs_images else "environment"
    builder = service_moves.service_id("builder", change.project)
    node = event.nodes.get(event.placement.builder or "", "a node")
    change.set(placement=event.placement, services=(*change.project.services, builder))
    change.enter(Stage.BUILDING, f"Builds the {what} on {node}. This can take some minutes.")
    are_built = "images are" if change.project.runs_images else "environment is"
    change.note(f"The project can be placed. Its {are_built} built on {node}.", node=node)
    change.request(EffectKind.START_BUILDER)


def _environment_locked(change: Change, event: EnvironmentLocked) -> None:
    # The nodes may have changed while the environment was built: place anew.
    change.set(environment=event.environment, images=event.images, placement=None)
    notes = " ".join(event.environment.notes)
    what = "The environment is built." if event.images is None else "The images are built and pushed."
    change.note(f"{what} {notes}".strip(), notes=list(event.environment.notes))
    change.enter(Stage.PLACING, "Looks for nodes that can take the project.")
    change.request(EffectKind.DECIDE_PLACEMENT)


def _place(change: Change, event: PlacementDecided) -> None:
    if change.project.stage is Stage.PLACING and change.project.placement is not None:
        return
    names = event.nodes
    placement = event.placement
    aggregator = service_moves.service_id("aggregator", change.project)
    where = names.get(placement.aggregator, placement.aggregator)
    learners = [names.get(node, node) for node in placement.learners]
    change.set(placement=placement, services=(*change.project.services, aggregator))
    doing = f"Starts the aggregator on {where}."
    if change.project.stage is Stage.PLACING:
        change.set(doing=doing)
    else:
        change.enter(Stage.PLACING, doing)
    change.note(
        f"Placed: the aggregator on {where}, learners on {_counted(learners)}.",
        aggregator=where,
        learners=learners,
    )
    if change.project.sla.training_configuration.is_hierarchical:
        _note_clusters(change, placement)
    change.request(EffectKind.START_AGGREGATOR)


def _note_clusters(change: Change, placement: Placement) -> None:
    """Say which clusters take part, and which do not."""
    names = [cluster.name for cluster in placement.clusters]
    for name, why in placement.left_out.items():
        change.note(f"The cluster {name} is left out: {why}", kind="cluster_left_out", cluster=name)
    if len(names) == 1:
        change.note(
            f"There is one cluster only, {names[0]}: hierarchical training goes on with one cluster's "
            "aggregator below the root.",
            kind="one_cluster_only",
            cluster=names[0],
        )


def _counted(names: list[str]) -> str:
    """Each name once, with its count when it stands more than once."""
    counts = Counter(names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())


# Ends


def _step_failed(change: Change, event: StepFailed) -> None:
    """Only the failure of an effect that the project waits for is its failure.

    An effect may run again after a restart, although its result was taken in.
    """
    project = change.project
    waits_for = {
        EffectKind.RESOLVE_REPOSITORY: project.stage is Stage.RESOLVING and project.repository is None,
        EffectKind.DECIDE_PLACEMENT: project.placement is None
        and project.stage in {Stage.RESOLVING, Stage.PLACING},
        EffectKind.START_BUILDER: project.stage is Stage.BUILDING,
        EffectKind.START_AGGREGATOR: project.stage is Stage.PLACING,
        EffectKind.START_CLUSTERS: project.stage is Stage.TRAINING,
        EffectKind.START_LEARNERS: project.stage is Stage.TRAINING,
        EffectKind.BUILD_INFERENCE: project.stage is Stage.PACKAGING,
        EffectKind.START_INFERENCE: project.stage is Stage.DEPLOYING,
    }
    if waits_for.get(event.kind, False):
        fail(change, event.failure)


def _services_ended(change: Change, event: ServicesEnded) -> None:
    if set(event.services) & set(change.project.services):
        service_moves.forget(change, event.services)
        end_if_nothing_runs(change)


def _request_stop(change: Change, _event: StopRequested) -> None:
    services = change.project.services
    change.enter(Stage.STOPPING, f"Stops {len(services)} services." if services else "Stops.")
    change.note("A stop was asked for.")
    stop_services(change, services)
    end_if_nothing_runs(change)


def _request_stop_of_inference(change: Change, _event: StopRequested) -> None:
    if not change.project.inference_url:
        return
    change.set(inference_url="", doing="Completed; the inference service was stopped.")
    change.note("A stop was asked for: the inference service ends.")
    stop_services(change, change.project.services)


def _request_deletion(change: Change, _event: DeleteRequested) -> None:
    if change.project.is_deletion_requested:
        return
    change.set(is_deletion_requested=True, inference_url="")
    if change.project.stage.is_final or change.project.stage is Stage.STOPPING:
        change.set(doing="Is being deleted.")
    else:
        change.enter(Stage.STOPPING, "Is being deleted.")
    change.note("The deletion was asked for.")
    stop_services(change, change.project.services)
    end_if_nothing_runs(change)


# The table

_ORDER = tuple(Stage)
_ACTIVE = _ORDER[: _ORDER.index(Stage.STOPPING)]
_FINAL = tuple(stage for stage in Stage if stage.is_final)


def _from_stage(*moves: tuple[Stage, Move]) -> Mapping[Stage, Decision]:
    """A row: the moves at their stages, impossible before the first of them, late at all others."""
    row: dict[Stage, Decision] = dict.fromkeys(_ORDER, LATE)
    first = min(_ORDER.index(stage) for stage, _move in moves)
    row.update(dict.fromkeys(_ORDER[:first], IMPOSSIBLE))
    row.update(dict(moves))
    return row


def _in_stages(move: Move, *stages: Stage) -> Mapping[Stage, Decision]:
    """A row with one move at all these stages, impossible at the others."""
    return _from_stage(*((stage, move) for stage in stages))


_WORKING = (Stage.BUILDING, Stage.PLACING, Stage.TRAINING, Stage.PACKAGING, Stage.DEPLOYING)

_TABLE: Mapping[type[LifecycleEvent], Mapping[Stage, Decision]] = {
    Submitted: _from_stage((Stage.SUBMITTED, _submit)),
    RepositoryResolved: _from_stage((Stage.RESOLVING, _repository_resolved)),
    PlacementDecided: _from_stage((Stage.RESOLVING, _try_placement), (Stage.PLACING, _place)),
    EnvironmentLocked: _from_stage((Stage.BUILDING, _environment_locked)),
    AggregatorListening: _from_stage(
        (Stage.PLACING, cluster_moves.aggregator_listening),
        (Stage.TRAINING, cluster_moves.aggregator_listening),
    ),
    TrainingStarted: _from_stage((Stage.TRAINING, training_moves.training_started)),
    LearnerJoined: _from_stage((Stage.TRAINING, cluster_moves.learner_joined)),
    LearnerLeft: _from_stage((Stage.TRAINING, cluster_moves.learner_left)),
    LearnerFailed: _from_stage((Stage.TRAINING, cluster_moves.learner_failed)),
    NodesTakenIn: _from_stage((Stage.TRAINING, late_nodes.take_in)),
    RoundStarted: _from_stage((Stage.TRAINING, cluster_moves.round_started)),
    RoundCompleted: _from_stage((Stage.TRAINING, cluster_moves.round_completed)),
    TrainingCompleted: _from_stage((Stage.TRAINING, training_moves.training_completed)),
    ModelPackaged: _from_stage((Stage.PACKAGING, training_moves.model_packaged)),
    InferenceListening: _from_stage(
        (Stage.DEPLOYING, training_moves.inference_listening),
        (Stage.COMPLETED, training_moves.inference_moved),
    ),
    ServiceProgressed: _in_stages(service_moves.progressed, *_WORKING),
    ServiceTold: _in_stages(service_moves.told, *_WORKING, Stage.COMPLETED),
    ServiceChanged: _in_stages(service_moves.changed, *_WORKING, Stage.STOPPING, *_FINAL),
    StepFailed: _in_stages(_step_failed, Stage.RESOLVING, *_WORKING),
    ServicesEnded: _in_stages(_services_ended, *_WORKING, Stage.STOPPING, *_FINAL),
    StopRequested: _from_stage(
        *((stage, _request_stop) for stage in _ACTIVE), (Stage.COMPLETED, _request_stop_of_inference)
    ),
    DeleteRequested: _in_stages(_request_deletion, *Stage),
    Aborted: _in_stages(abort, *_ACTIVE, Stage.STOPPING),
}
