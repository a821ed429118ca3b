"""What the services of a project do to it. Parts of `flops.core.lifecycle`."""

from __future__ import annotations

from collections.abc import Iterable

from flops.core.change import Change
from flops.core.cluster import ServiceKind, ServiceState
from flops.core.endings import end_if_nothing_runs, end_tracking, fail
from flops.core.events import ServiceChanged, ServiceProgressed, ServiceTold
from flops.core.ids import ServiceId, make_service_id
from flops.core.project import Failure, Project, Stage
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
    count = len(project.placement.learners) if project.placement else 0
    generation = project.learner_generation
    return tuple(
        make_service_id(ServiceKind.LEARNER.value, project.id, number + 1, generation)
        for number in range(count)
    )


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
    kind = _kind(event.service_id)
    if kind == _DECISIVE.get(change.project.stage) and failure.code not in _TRANSIENT:
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
    kind = _kind(event.service_id)
    change.note(
        f"The {_name(event.service_id)} on {event.node} is lost: the node is gone. "
        "It goes on when the node is back.",
        kind="service_lost",
        service=event.service_id,
        node=event.node,
    )
    if kind == _DECISIVE.get(change.project.stage):
        change.set(doing=f"Waits for {event.node}, which has the {_name(event.service_id)} and is gone.")
    end_if_nothing_runs(change)


def _returned(change: Change, event: ServiceChanged) -> None:
    lost = change.project.lost_services
    if event.service_id not in lost:
        return
    change.set(lost_services=tuple(service for service in lost if service != event.service_id))
    kind = _kind(event.service_id)
    if event.state.is_final:
        return
    change.note(
        f"{event.node} is back; its {_name(event.service_id)} is {event.state.value}.",
        kind="service_returned",
        service=event.service_id,
        node=event.node,
    )
    if kind == _DECISIVE.get(change.project.stage):
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
    if kind == _DECISIVE.get(stage):
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
    elif kind == ServiceKind.INFERENCE.value and stage is Stage.COMPLETED:
        change.set(inference_url="", doing=f"Completed; the inference service ended: {failure.message}")


def _ended(change: Change, event: ServiceChanged) -> None:
    """A service ended in peace. Its result is told before its end: a decisive one has ended without any.

    The project would wait in its stage for a service that is gone.
    """
    kind, stage = _kind(event.service_id), change.project.stage
    if kind == _DECISIVE.get(stage):
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
    left = len(set(present) - set(change.project.failed_learners))
    configuration, training = project.sla.training_configuration, project.training
    if training is None or len(training.history) >= training.rounds_total:
        return
    has_begun = training.round_now > 0
    if left < (configuration.min_fit_clients if has_begun else configuration.min_available_clients):
        fail(change, failure)


def _show(change: Change, service: ServiceId, node: str, message: str) -> None:
    """Show what a service does; nothing happens when that is known."""
    if not message or change.project.stage.is_final or change.project.stage is Stage.STOPPING:
        return
    kind = _kind(service)
    line = f"The {_name(service)} on {node}: {message}"
    if line == change.project.doing:
        return
    if kind == _DECISIVE.get(change.project.stage):
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


def _kind(service: ServiceId) -> str:
    return service.split("-", 1)[0]


def _name(service: ServiceId) -> str:
    """What people call the service."""
    kind = _kind(service)
    return "inference service" if kind == ServiceKind.INFERENCE.value else kind
