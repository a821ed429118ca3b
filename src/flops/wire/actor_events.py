"""Events that services tell about themselves (`flops.actor.EventLog.tell`), as their readers parse them.

``kind`` is the first argument of `tell`, the other fields are its keywords.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from flops.core.model import Value
from flops.core.project import Environment, Images, Round, TrainedModel


class Progress(Value):
    """Any service: what it does now, one sentence for people."""

    kind: Literal["progress"] = "progress"
    time_s: float
    message: str


class Listening(Value):
    """Aggregator, inference: ready for others, at ``host:port``."""

    kind: Literal["listening"] = "listening"
    time_s: float
    address: str


class Failed(Value):
    """Any service: the reason of its end, told before it exits; `FlopsError.to_dict()`."""

    kind: Literal["failed"] = "failed"
    time_s: float
    error: dict[str, Any]


class EnvironmentLocked(Value):
    """Builder: the environments are locked, and the images pushed when some were asked for."""

    kind: Literal["environment_locked"] = "environment_locked"
    time_s: float
    environment: Environment
    images: Images | None = None


class ModelImagePushed(Value):
    """Builder: the image that serves the trained model is in the registry, as ``name@sha256:…``."""

    kind: Literal["model_image_pushed"] = "model_image_pushed"
    time_s: float
    image: str


class LearnerJoined(Value):
    """Aggregator: a learner has connected and loaded its data."""

    kind: Literal["learner_joined"] = "learner_joined"
    time_s: float
    learner: str
    node: str
    rows: int = 0


class LearnerLeft(Value):
    """Aggregator: a learner's connection has ended."""

    kind: Literal["learner_left"] = "learner_left"
    time_s: float
    learner: str
    node: str
    reason: str
    error: dict[str, Any] | None = None


class LearnerFailed(Value):
    """Aggregator: a learner answered with a failure; it stays, and the round may go on without it."""

    kind: Literal["learner_failed"] = "learner_failed"
    time_s: float
    learner: str
    node: str
    round: int
    phase: str
    error: dict[str, Any]


class TrainingStarted(Value):
    """Aggregator: the experiment is open; told again after a restart."""

    kind: Literal["training_started"] = "training_started"
    time_s: float
    experiment_id: str
    run_id: str
    tracking_url: str = ""


class RoundStarted(Value):
    """Aggregator: a round begins with these learners (service ids)."""

    kind: Literal["round_started"] = "round_started"
    time_s: float
    round: int
    rounds: int
    learners: tuple[str, ...] = ()


class RoundCompleted(Value):
    """Aggregator: a round has ended and its result is durable."""

    kind: Literal["round_completed"] = "round_completed"
    time_s: float
    rounds: int
    record: Round


class TrainingCompleted(Value):
    """Aggregator: all rounds are done, the best model is tracked and registered."""

    kind: Literal["training_completed"] = "training_completed"
    time_s: float
    model: TrainedModel


class DataPushed(Value):
    """Mock data provider: a partition is stored on the node."""

    kind: Literal["data_pushed"] = "data_pushed"
    time_s: float
    data_tag: str
    partition: int
    rows: int


ActorEvent = Annotated[
    Progress
    | Listening
    | Failed
    | EnvironmentLocked
    | ModelImagePushed
    | LearnerJoined
    | LearnerLeft
    | LearnerFailed
    | TrainingStarted
    | RoundStarted
    | RoundCompleted
    | TrainingCompleted
    | DataPushed,
    Field(discriminator="kind"),
]

_ADAPTER: TypeAdapter[ActorEvent] = TypeAdapter(ActorEvent)


def parse_actor_event(raw: dict[str, Any]) -> ActorEvent:
    """Parse an event told by a service.

    Raises:
        pydantic.ValidationError: when it is none of the above.
    """
    return _ADAPTER.validate_python(raw)
