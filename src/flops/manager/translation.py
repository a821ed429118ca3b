"""What the cluster reports, as events of a project's life."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flops.core import events as life
from flops.core.cluster import ClusterEvent, ServiceKind, ServiceStatus
from flops.core.ids import ServiceId
from flops.core.project import Failure
from flops.errors import FlopsError
from flops.wire import actor_events as told

_AGGREGATOR = ServiceKind.AGGREGATOR.value
_INFERENCE = ServiceKind.INFERENCE.value


def translate(event: ClusterEvent, node: str) -> life.LifecycleEvent | None:
    """Translate an event of a project's service.

    Args:
        event: a ``service`` or ``actor`` event.
        node: the name of the service's node.

    Returns:
        The lifecycle event, or None for one that says nothing about a project.

    Raises:
        pydantic.ValidationError: the payload is malformed.
    """
    if event.kind == "service":
        return _service_changed(event, node)
    if event.kind == "actor":
        actor_event = told.parse_actor_event(event.payload)
        translator = _TRANSLATORS.get(type(actor_event))
        return translator(actor_event, event, node) if translator else None
    return None


def failure_of(error: dict[str, Any]) -> Failure:
    """A failure from `FlopsError.to_dict()`; codes that are unknown here become ``internal``."""
    return Failure.model_validate(FlopsError.from_dict(error).to_dict())


def _service_changed(event: ClusterEvent, node: str) -> life.ServiceChanged:
    status = ServiceStatus.model_validate(event.payload)
    return life.ServiceChanged(
        seq=event.seq,
        service_id=status.service_id,
        node=node,
        state=status.state,
        detail=status.detail,
        exit_code=status.exit_code,
        failure=failure_of(status.error) if status.error else None,
    )


def _progress(actor: told.Progress, event: ClusterEvent, node: str) -> life.LifecycleEvent:
    return life.ServiceProgressed(
        seq=event.seq, service_id=ServiceId(event.service_id), node=node, message=actor.message
    )


def _listening(actor: told.Listening, event: ClusterEvent, _node: str) -> life.LifecycleEvent | None:
    service_id = ServiceId(event.service_id)
    if service_id.startswith(_AGGREGATOR):
        return life.AggregatorListening(seq=event.seq, service_id=service_id, address=actor.address)
    if service_id.startswith(_INFERENCE):
        url = f"http://{actor.address}"
        return life.InferenceListening(seq=event.seq, service_id=service_id, url=url)
    return None


def _failed(actor: told.Failed, event: ClusterEvent, node: str) -> life.LifecycleEvent:
    return life.ServiceTold(
        seq=event.seq, service_id=ServiceId(event.service_id), node=node, failure=failure_of(actor.error)
    )


def _locked(actor: told.EnvironmentLocked, event: ClusterEvent, _node: str) -> life.LifecycleEvent:
    return life.EnvironmentLocked(seq=event.seq, environment=actor.environment, images=actor.images)


def _image_pushed(actor: told.ModelImagePushed, event: ClusterEvent, _node: str) -> life.LifecycleEvent:
    return life.ModelPackaged(seq=event.seq, image=actor.image)


def _joined(actor: told.LearnerJoined, event: ClusterEvent, _node: str) -> life.LifecycleEvent:
    return life.LearnerJoined(seq=event.seq, learner=actor.learner, node=actor.node, rows=actor.rows)


def _left(actor: told.LearnerLeft, event: ClusterEvent, _node: str) -> life.LifecycleEvent:
    return life.LearnerLeft(
        seq=event.seq,
        learner=actor.learner,
        node=actor.node,
        reason=actor.reason,
        failure=failure_of(actor.error) if actor.error else None,
    )


def _learner_failed(actor: told.LearnerFailed, event: ClusterEvent, _node: str) -> life.LifecycleEvent:
    return life.LearnerFailed(
        seq=event.seq,
        learner=actor.learner,
        node=actor.node,
        round=actor.round,
        phase=actor.phase,
        failure=failure_of(actor.error),
    )


def _training_started(actor: told.TrainingStarted, event: ClusterEvent, _node: str) -> life.LifecycleEvent:
    return life.TrainingStarted(seq=event.seq, tracking_url=actor.tracking_url)


def _round_started(actor: told.RoundStarted, event: ClusterEvent, _node: str) -> life.LifecycleEvent:
    return life.RoundStarted(
        seq=event.seq,
        round=actor.round,
        rounds=actor.rounds,
        learners=actor.learners,
        aggregator=event.service_id,
    )


def _round_completed(actor: told.RoundCompleted, event: ClusterEvent, _node: str) -> life.LifecycleEvent:
    return life.RoundCompleted(
        seq=event.seq, rounds=actor.rounds, record=actor.record, aggregator=event.service_id
    )


def _completed(actor: told.TrainingCompleted, event: ClusterEvent, _node: str) -> life.LifecycleEvent:
    return life.TrainingCompleted(seq=event.seq, model=actor.model)


_Translator = Callable[[Any, ClusterEvent, str], life.LifecycleEvent | None]

_TRANSLATORS: dict[type, _Translator] = {
    told.Progress: _progress,
    told.Listening: _listening,
    told.Failed: _failed,
    told.EnvironmentLocked: _locked,
    told.ModelImagePushed: _image_pushed,
    told.LearnerJoined: _joined,
    told.LearnerLeft: _left,
    told.LearnerFailed: _learner_failed,
    told.TrainingStarted: _training_started,
    told.RoundStarted: _round_started,
    told.RoundCompleted: _round_completed,
    told.TrainingCompleted: _completed,
}
