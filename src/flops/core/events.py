"""What happens to a project: the input of `flops.core.lifecycle.step`.

`seq` is that of the cluster event which an event was translated from, 0 for the manager's own events. An
event of the cluster that is not above the project's `cluster_seq` has been taken in before.
"""

from __future__ import annotations

import re

from pydantic import Field

from flops.core.cluster import ServiceState
from flops.core.effects import EffectKind
from flops.core.ids import NodeId, ServiceId
from flops.core.model import Value
from flops.core.project import Environment, Failure, Images, Placement, Repository, Round, TrainedModel


class LifecycleEvent(Value):
    """Base of all events."""

    seq: int = 0

    @property
    def name(self) -> str:
        """The event's name in snake_case, as it stands in the history."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()


class Submitted(LifecycleEvent):
    """The project was accepted and stored."""


class RepositoryResolved(LifecycleEvent):
    """The reference is pinned, the contract holds; `environment` when one with the same key is known."""

    repository: Repository
    environment: Environment | None = None


class PlacementDecided(LifecycleEvent):
    """Nodes can satisfy the project: while resolving a dry run, while placing the choice."""

    placement: Placement
    nodes: dict[str, str] = Field(default_factory=dict)  # node id -> name, of the nodes in the placement


class EnvironmentLocked(LifecycleEvent):
    """The builder is done; `images` when the project runs from images."""

    environment: Environment
    images: Images | None = None


class AggregatorListening(LifecycleEvent):
    """The aggregator is ready for learners; told again after a restart, maybe with another address."""

    service_id: ServiceId
    address: str


class TrainingStarted(LifecycleEvent):
    """The training's run is open in the tracking server."""

    tracking_url: str = ""


class LearnerJoined(LifecycleEvent):
    """A learner has connected to the aggregator and loaded its data."""

    learner: str
    node: str
    rows: int = 0


class LearnerLeft(LifecycleEvent):
    """A learner's connection to the aggregator has ended."""

    learner: str
    node: str
    reason: str
    failure: Failure | None = None


class LearnerFailed(LifecycleEvent):
    """A learner's code has failed in a round; the learner stays."""

    learner: str
    node: str
    round: int
    phase: str
    failure: Failure


class RoundStarted(LifecycleEvent):
    """A round begins; told again when a restarted aggregator repeats it.

    `aggregator` tells it: in a hierarchical training a cluster's, or the root's, whose rounds are cycles.
    """

    round: int
    rounds: int
    learners: tuple[str, ...] = ()
    aggregator: str = ""


class RoundCompleted(LifecycleEvent):
    """A round has ended and its result is durable; `aggregator` as in `RoundStarted`."""

    rounds: int
    record: Round
    aggregator: str = ""


class LateNode(Value):
    """A node that a training takes in; `cluster` is its cluster's name in a hierarchical training."""

    id: NodeId
    name: str
    cluster: str = ""


class NodesTakenIn(LifecycleEvent):
    """Nodes have come, or have come by data, that the training has room for."""

    nodes: tuple[LateNode, ...]


class TrainingCompleted(LifecycleEvent):
    """The best model is tracked and registered."""

    model: TrainedModel


class ModelPackaged(LifecycleEvent):
    """What serves the model is stored: the model's bundle, and the lock of its environment or its image."""

    image: str = ""  # ``name@sha256:…`` when the project runs from images


class InferenceListening(LifecycleEvent):
    """The inference service answers."""

    service_id: ServiceId
    url: str


class ServiceProgressed(LifecycleEvent):
    """A service says what it does now."""

    service_id: ServiceId
    node: str
    message: str


class ServiceTold(LifecycleEvent):
    """A service told the reason of its end, before it ended."""

    service_id: ServiceId
    node: str
    failure: Failure


class ServiceChanged(LifecycleEvent):
    """A service's state has changed."""

    service_id: ServiceId
    node: str
    state: ServiceState
    detail: str = ""
    exit_code: int | None = None
    failure: Failure | None = None


class StepFailed(LifecycleEvent):
    """An effect can not be done."""

    kind: EffectKind
    failure: Failure


class ServicesEnded(LifecycleEvent):
    """These services run no longer, or their nodes are gone: nothing more will be heard of them."""

    services: tuple[ServiceId, ...]


class StopRequested(LifecycleEvent):
    """The user wants the project stopped."""


class DeleteRequested(LifecycleEvent):
    """The user wants the project removed with everything that belongs to it."""


class Aborted(LifecycleEvent):
    """The manager cannot go on with the project, by a defect of its own."""

    failure: Failure
