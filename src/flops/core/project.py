"""A project: what was asked for, where it stands, and what happened so far."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from flops.core.ids import Digest, EnvironmentKey, NodeId, ProjectId, ServiceId
from flops.core.model import Value
from flops.core.sla import Packaging, ProjectSla


class Stage(StrEnum):
    """Stages as users see them."""

    SUBMITTED = "submitted"
    RESOLVING = "resolving"  # the repository: commit, contract, dependencies
    BUILDING = "building"  # the environment; skipped when its lock is known
    PLACING = "placing"  # choosing nodes, starting aggregator and learners
    TRAINING = "training"
    PACKAGING = "packaging"  # building what serves the model, if asked
    DEPLOYING = "deploying"  # starting the inference service, if asked
    STOPPING = "stopping"
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def is_final(self) -> bool:
        """Whether the project has ended."""
        return self in {Stage.COMPLETED, Stage.FAILED, Stage.STOPPED}


class Failure(Value):
    """Why a project failed; `FlopsError.to_dict()`, and where to look."""

    code: str
    message: str
    hint: str = ""
    details: dict[str, Any] = Field(default_factory=dict)  # traceback, node, round, service_id


class Repository(Value):
    """The resolved ML repository."""

    commit: str  # full hash
    bundle: Digest  # tar.gz blob of the tree at the commit
    dependency_file: str  # its name in the repository
    environment_key: EnvironmentKey  # decides whether a build is needed


class Environment(Value):
    """A resolved, locked environment; the locks are blobs."""

    key: EnvironmentKey
    lock: Digest  # of the project's environment: the user's requirements, numpy, pyarrow
    model_lock: Digest  # of the environment that saves and serves models: the same pins and MLflow
    python: str = "3.11"  # the interpreter's major.minor
    notes: tuple[str, ...] = ()  # which pins were relaxed and why, what was left out


class Images(Value):
    """The OCI images of a project, as ``name@sha256:…``.

    A name without a host is in the registry of the cluster, which each node reaches by its own address.
    """

    aggregator: str
    learner: str
    inference: str = ""  # of the trained model, once it is packaged
    base: str = ""  # of the repository's Dockerfile, which the others are put on


class ClusterPlacement(Value):
    """Which nodes of a cluster run its aggregator and its learners in a hierarchical training."""

    name: str
    aggregator: NodeId
    learners: tuple[NodeId, ...]


class Placement(Value):
    """Which node runs what. A node may stand more than once among the learners."""

    aggregator: NodeId
    learners: tuple[NodeId, ...]
    builder: NodeId | None = None  # None when nothing has to be built
    inference: NodeId | None = None  # None when not asked for
    clusters: tuple[ClusterPlacement, ...] = ()  # of a hierarchical training; `learners` has all of theirs
    left_out: dict[str, str] = Field(default_factory=dict)  # clusters that take no part: name -> why


class Participant(Value):
    """One learner's part in a round, or one cluster's part in a cycle of a hierarchical training."""

    learner: str  # service id; of a cluster that of its aggregator
    node: str  # node name
    rows: int = 0
    fit_s: float = 0.0
    evaluate_s: float = 0.0
    accuracy: float | None = None
    loss: float | None = None
    cluster: str = ""  # the cluster's name
    rounds: tuple[Round, ...] = ()  # of the cluster within this cycle, with its own learners


class Round(Value):
    """A finished round: the aggregated model's numbers over all learners' held-out rows.

    In a hierarchical training, a round of the root aggregator is a cycle.
    """

    number: int
    accuracy: float | None = None
    loss: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    participants: tuple[Participant, ...] = ()
    left_out: tuple[str, ...] = ()  # learners that took part in fit's invitation but not in its result
    duration_s: float = 0.0


class ClusterState(Value):
    """Where a cluster stands in a hierarchical training."""

    name: str
    aggregator: ServiceId
    learners: tuple[ServiceId, ...]  # those of the present generation
    generation: int = 1  # of the learners; grows when they are started anew for another address
    address: str = ""  # of its aggregator; "" before it listens
    is_joined: bool = False  # to the root aggregator
    is_given_up: bool = False  # it will not come back by itself
    round_now: int = 0  # counted over all cycles
    rounds_done: int = 0


class Training(Value):
    """Progress of the training; a round is a cycle when it is hierarchical."""

    rounds_total: int
    round_now: int = 0  # the round in progress; equals rounds_total when done
    history: tuple[Round, ...] = ()
    learners: tuple[str, ...] = ()  # service ids that are joined right now
    best_round: int | None = None
    clusters: tuple[ClusterState, ...] = ()  # of a hierarchical training, in the order of its placement


class TrainedModel(Value):
    """The best model, as tracked and registered."""

    experiment_id: str
    run_id: str
    model_uri: str
    name: str  # in the model registry
    version: str
    round: int
    accuracy: float | None = None
    loss: float | None = None
    bundle: Digest | None = None  # tar.gz blob of the MLflow model folder


class StageSpan(Value):
    """When a stage was entered; the next span's start is its end."""

    stage: Stage
    entered_at_s: float


class Project(Value):
    """A project, whole. `version` grows with every change."""

    id: ProjectId
    sla: ProjectSla
    stage: Stage = Stage.SUBMITTED
    doing: str = ""  # what it does or waits for right now, one sentence
    doing_since_s: float = 0.0  # when `doing` became what it is; 0 in records that did not keep it yet
    version: int = 0
    created_at_s: float = 0.0
    updated_at_s: float = 0.0
    spans: tuple[StageSpan, ...] = ()
    repository: Repository | None = None
    environment: Environment | None = None
    images: Images | None = None  # with `Packaging.IMAGE` only
    placement: Placement | None = None
    services: tuple[ServiceId, ...] = ()  # started for this project and not yet known to be gone
    aggregator_address: str = ""
    training: Training | None = None
    model: TrainedModel | None = None
    inference_url: str = ""
    tracking_url: str = ""
    failure: Failure | None = None
    is_deletion_requested: bool = False
    lost_services: tuple[ServiceId, ...] = ()  # of `services`, those whose node is gone right now
    service_failures: dict[str, Failure] = Field(default_factory=dict)  # the last ones; forgotten by a join
    failed_learners: tuple[ServiceId, ...] = ()  # that will not come back by themselves
    learner_generation: int = 0  # grows when learners are started anew for another aggregator address
    history_length: int = 0  # `seq` of the last line of the history
    cluster_seq: int = 0  # `seq` of the last cluster event that changed the project

    @property
    def runs_images(self) -> bool:
        """Whether its services run from images."""
        return self.sla.packaging is Packaging.IMAGE

    @property
    def needs_build(self) -> bool:
        """Whether what its services run from has yet to be built."""
        return self.environment is None or (self.runs_images and self.images is None)


class ProjectEvent(Value):
    """One line of a project's history, as users watch it; `seq` counts up from 1 per project."""

    project_id: ProjectId
    seq: int
    time_s: float
    kind: str  # the lifecycle event's name in snake_case, such as "round_completed"
    message: str  # one sentence for people
    data: dict[str, Any] = Field(default_factory=dict)


class MockData(Value):
    """A mock data provider's work: which services push to which nodes, and how far they are."""

    id: str
    sla: dict[str, Any]
    state: str = "running"  # running, completed, failed
    services: tuple[ServiceId, ...] = ()
    nodes: tuple[str, ...] = ()
    rows: int = 0  # pushed so far
    failure: Failure | None = None
    created_at_s: float = 0.0
    node_ids: tuple[NodeId, ...] = ()  # of `nodes`, in the same order; `services` likewise
    ended: tuple[ServiceId, ...] = ()  # of `services`, those that have ended
    dataset_blob: str | None = None  # a local file of the user, sent along
    cluster_seq: int = 0  # `seq` of the last cluster event that was taken in
