"""What the services of a project do to it. Parts of `flops.core.lifecycle`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flops.core.change import Change
from flops.core.cluster import ServiceKind, ServiceState
from flops.core.endings import end_if_nothing_runs, end_tracking, fail, stop_services
from flops.core.events import ServiceChanged, ServiceProgressed, ServiceTold
from flops.core.ids import ServiceId, make_service_id
from flops.core.project import ClusterState, Failure, Project, Stage, Training
from flops.errors import CATALOGUE, ErrorCode

# The service whose failure is the project's, per stage.
_DECISIVE = {
    Stage.BUILDING: "builder",
    Stage.PLACING: "aggregator",
    Stage.TRAINING: "aggregator",
    Stage.PACKAGING: "builder",  # only of a project that runs from images
    Stage.DEPLOYING: "inference",
}
# Told failures that may pass: whether the node's restarts help is seen by the service's final state.
_TRANSIENT = {ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT}
# Told failures of a learner that a restart does not mend.
_PERMANENT_FOR_LEARNERS = {
    ErrorCode.USER_CODE_FAILED,
    ErrorCode.NO_MATCHING_DATA,
    ErrorCode.REPO_CONTRACT_BROKEN,
}
# Failures of a round that the ends of its learners explain.
_FOR_WANT_OF_LEARNERS = {ErrorCode.TOO_FEW_LEARNERS, ErrorCode.ROUND_FAILED}


def service_id(kind: str, project: Project) -> ServiceId:
    """The id of a project's only service of a kind."""
    return make_service_id(kind, project.id)


def packager_id(project: Project) -> ServiceId:
    """The builder that makes the image of a project's trained model."""
    return make_service_id(ServiceKind.BUILDER.value, project.id, 2)


def learner_ids(project: Project) -> tuple[ServiceId, ...]:
    """The learners of the project's present generation, in the order of its placement."""
    if project.training is not None and project.training.clusters:
        return tuple(learner for cluster in project.training.clusters for learner in cluster.learners)
    count = len(project.placement.learners) if project.placement else 0
    generation = project.learner_generation
    return tuple(
        make_service_id(ServiceKind.LEARNER.value, project.id, number + 1, generation)
        for number in range(count)
    )


def learners_of(project: Project, cluster: str, generation: int) -> tuple[ServiceId, ...]:
    """The learners of a cluster, or of the whole project for ""; none if they are of another generation."""
    if not cluster:
        return learner_ids(project) if project.learner_generation == generation else ()
    clusters = project.training.clusters if project.training is not None else ()
    found = (c.learners for c in clusters if c.name == cluster and c.generation == generation)
    return next(found, ())


def cluster_of(project: Project, aggregator: str) -> ClusterState | None:
    """The cluster with this aggregator, in a hierarchical training."""
    clusters = project.training.clusters if project.training is not None else ()
    return next((cluster for cluster in clusters if cluster.aggregator == aggregator), None)


def with_cluster(training: Training, cluster: ClusterState, **fields: Any) -> Training:
    """The training with some fields of a cluster changed."""
    clusters = tuple(c.model_copy(update=fields) if c.name == cluster.name else c for c in training.clusters)
    return training.model_copy(update={"clusters": clusters})


def forget(change: Change, services: Iterable[ServiceId]) -> None:
    """Take services off the project: they have ended."""
    gone = set(services)
    project = change.project
    change.set(
        services=tuple(service for service in project.services if service not in gone),
        lost_services=tuple(service for service in project.lost_services if service not in gone),
    )
    aggregator = service_id(ServiceKind.AGGREGATOR.value, project)
    if project.stage is Stage.FAILED and aggregator in gone & set(project.services):
        end_tracking(change)  # it may have opened the run after the failure was told


def progressed(change: Change, event: ServiceProgressed) -> None:
    """A service says what it does now."""
    _show(change, event.service_id, event.node, event.message)


def told(change: Change, event: ServiceTold) -> None:
    """A service gave the reason of its end before it ended."""
    failure = _located(event.failure, event.service_id, event.node)
    _remember(change, event.service_id, failure)
    if _is_decisive(event.service_id, change.project) and failure.code not in _TRANSIENT:
        fail(change, _with_ends_of_learners(failure, change.project))
        return
    change.note(
        f"The {_name(event.service_id)} on {event.node} reports a failure: {failure.message}",
        service=event.service_id,
        node=event.node,
        failure=failure.model_dump(mode="json"),
    )
    if failure.code in _PERMANENT_FOR_LEARNERS:
        _lose_learner(change, event.service_id, failure)
    cluster = cluster_of(change.project, event.service_id)
    if cluster is not None and failure.code not in _TRANSIENT:
        _give_up_cluster(change, cluster, failure)


def changed(change: Change, event: ServiceChanged) -> None:
    """A service's state has changed; what is not of this project any more is ignored."""
    if event.service_id not in change.project.services:
        return
    if event.state is ServiceState.LOST:
        _lost(change, event)
        return
    _returned(change, event)
    match event.state:
        case ServiceState.PREPARING:
            _show(change, event.service_id, event.node, event.detail)
        case ServiceState.RESTARTING:
            _restarting(change, event)
        case ServiceState.FAILED:
            _failed(change, event)
        case ServiceState.COMPLETED | ServiceState.STOPPED:
            _ended(change, event)
        case _:
            pass
    end_if_nothing_runs(change)


def _lost(change: Change, event: ServiceChanged) -> None:
    lost = change.project.lost_services
    if event.service_id in lost:
        return
    change.set(lost_services=(*lost, event.service_id))
    change.note(
        f"The {_name(event.service_id)} on {event.node} is lost: the node is gone. "
        "It goes on when the node is back.",
        kind="service_lost",
        service=event.service_id,
        node=event.node,
    )
    if _is_decisive(event.service_id, change.project):
        change.set(doing=f"Waits for {event.node}, which has the {_name(event.service_id)} and is gone.")
    end_if_nothing_runs(change)


def _returned(change: Change, event: ServiceChanged) -> None:
    lost = change.project.lost_services
    if event.service_id not in lost:
        return
    change.set(lost_services=tuple(service for service in lost if service != event.service_id))
    if event.state.is_final:
        return
    change.note(
        f"{event.node} is back; its {_name(event.service_id)} is {event.state.value}.",
        kind="service_returned",
        service=event.service_id,
        node=event.node,
    )
    if _is_decisive(event.service_id, change.project):
        change.set(doing=f"{event.node} is back; its {_name(event.service_id)} is {event.state.value}.")


def _restarting(change: Change, event: ServiceChanged) -> None:
    what = f"The {_name(event.service_id)} on {event.node}"
    if event.failure is not None:
        _remember(change, event.service_id, _located(event.failure, event.service_id, event.node))
    change.note(
        f"{what} ended unexpectedly{_exit(event)} and is started again. {event.detail}".strip(),
        kind="service_restarting",
        service=event.service_id,
        node=event.node,
        **({"failure": event.failure.model_dump(mode="json")} if event.failure is not None else {}),
    )


def _failed(change: Change, event: ServiceChanged) -> None:
    known = change.project.service_failures.get(event.service_id)
    failure = _located(event.failure or known or _unexplained(event), event.service_id, event.node)
    forget(change, [event.service_id])
    _remember(change, event.service_id, failure)
    stage = change.project.stage
    kind = _kind(event.service_id)
    if _is_decisive(event.service_id, change.project):
        fail(change, failure)
        return
    change.note(
        f"The {_name(event.service_id)} on {event.node} failed for good: {failure.message}",
        kind="service_failed",
        service=event.service_id,
        node=event.node,
        failure=failure.model_dump(mode="json"),
    )
    if kind == ServiceKind.LEARNER.value:
        _lose_learner(change, event.service_id, failure)
    elif (cluster := cluster_of(change.project, event.service_id)) is not None:
        _give_up_cluster(change, cluster, failure)
    elif kind == ServiceKind.INFERENCE.value and stage is Stage.COMPLETED:
        change.set(inference_url="", doing=f"Completed; the inference service ended: {failure.message}")


def _ended(change: Change, event: ServiceChanged) -> None:
    """A service ended in peace. Its result is told before its end: a decisive one has ended without any.

    The project would wait in its stage for a service that is gone.
    """
    kind = _kind(event.service_id)
    if _is_decisive(event.service_id, change.project):
        _failed(change, event)
        return
    forget(change, [event.service_id])
    if kind == ServiceKind.INFERENCE.value and change.project.inference_url:
        change.set(inference_url="", doing="Completed; the inference service has ended.")
        change.note(
            f"The inference service on {event.node} has ended; the model is not served any more.",
            kind="service_ended",
            service=event.service_id,
            node=event.node,
        )


def _lose_learner(change: Change, learner: ServiceId, failure: Failure) -> None:
    """Count a learner out. The project fails when too few are left for the training ever to go on.

    The first round needs min_available_clients, later ones min_fit_clients. While enough are left, the
    aggregator decides how the training goes on.
    """
    project = change.project
    present = learner_ids(project)
    if learner not in present or learner in project.failed_learners or project.stage is not Stage.TRAINING:
        return
    change.set(failed_learners=(*project.failed_learners, learner))
    configuration, training = project.sla.training_configuration, project.training
    if training is None or len(training.history) >= training.rounds_total:
        return
    cluster = next((c for c in training.clusters if learner in c.learners), None)
    left = len(set(cluster.learners if cluster else present) - set(change.project.failed_learners))
    has_begun = (cluster or training).round_now > 0
    if left >= (configuration.min_fit_clients if has_begun else configuration.min_available_clients):
        return
    if cluster is not None:
        _give_up_cluster(change, cluster, failure)
    else:
        fail(change, failure)


def _give_up_cluster(change: Change, cluster: ClusterState, failure: Failure) -> None:
    """Leave a cluster out for good. The project fails when fewer than min_clusters are left."""
    training = change.project.training
    if training is None or cluster.is_given_up or change.project.stage is not Stage.TRAINING:
        return
    training = with_cluster(training, cluster, is_given_up=True, is_joined=False)
    joined = tuple(learner for learner in training.learners if learner not in cluster.learners)
    change.set(training=training.model_copy(update={"learners": joined}))
    if (
        sum(not c.is_given_up for c in training.clusters)
        < change.project.sla.training_configuration.min_clusters
    ):
        fail(change, failure)
        return
    change.note(
        f"The cluster {cluster.name} is left out of the training: {failure.message}",
        kind="cluster_left_out",
        cluster=cluster.name,
        failure=failure.model_dump(mode="json"),
    )
    own = {cluster.aggregator, *cluster.learners}
    stop_services(change, (service for service in change.project.services if service in own))


def _show(change: Change, service: ServiceId, node: str, message: str) -> None:
    """Show what a service does; nothing happens when that is known."""
    if not message or change.project.stage.is_final or change.project.stage is Stage.STOPPING:
        return
    line = f"The {_name(service)} on {node}: {message}"
    if line == change.project.doing:
        return
    if _is_decisive(service, change.project):
        change.set(doing=line)
    change.note(line, kind="service_progressed", service=service, node=node)


def _remember(change: Change, service: ServiceId, failure: Failure) -> None:
    change.set(service_failures={**change.project.service_failures, service: failure})


def _with_ends_of_learners(failure: Failure, project: Project) -> Failure:
    """A failure for want of learners, with why they ended; the aggregator saw connections end only."""
    if failure.code not in _FOR_WANT_OF_LEARNERS:
        return failure
    ends = {learner: project.service_failures.get(learner) for learner in learner_ids(project)}
    told = [
        f"{learner}: {end.message}"
        for learner, end in ends.items()
        if end is not None and end.message.rstrip(".") not in failure.message
    ]
    return failure.model_copy(update={"message": " ".join([failure.message, *told])})


def _located(failure: Failure, service: ServiceId, node: str) -> Failure:
    details = {"service_id": service, "node": node, **failure.details}
    return failure.model_copy(update={"details": details})


def _unexplained(event: ServiceChanged) -> Failure:
    how = f"ended unexpectedly{_exit(event)}"
    if event.state is not ServiceState.FAILED:
        how = "ended without telling a result"
    return Failure(
        code=ErrorCode.SERVICE_FAILED.value,
        message=f"The {_name(event.service_id)} on {event.node} {how}. {event.detail}".strip(),
        hint=CATALOGUE[ErrorCode.SERVICE_FAILED].hint,
    )


def _exit(event: ServiceChanged) -> str:
    return "" if event.exit_code is None else f" (exit code {event.exit_code})"


def _is_decisive(service: ServiceId, project: Project) -> bool:
    """Whether the service's failure is the project's."""
    return _kind(service) == _DECISIVE.get(project.stage) and cluster_of(project, service) is None


def _kind(service: ServiceId) -> str:
    return service.split("-", 1)[0]


def _name(service: ServiceId) -> str:
    """What people call the service."""
    kind = _kind(service)
    if kind == ServiceKind.AGGREGATOR.value and "-" in service.removeprefix(f"{kind}-"):
        return "cluster's aggregator"
    return "inference service" if kind == ServiceKind.INFERENCE.value else kind
