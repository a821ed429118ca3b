"""Configuration of each kind of service, made by the manager and read by the service's process."""

from __future__ import annotations

from pydantic import Field

from flops.core.model import Value
from flops.core.platforms import Platform
from flops.core.project import Environment, TrainedModel
from flops.core.sla import EarlyStopping, MockDataConfiguration, Strategy, TargetMetric, UpdatePrecision

TRACKING_PATH = "/mlflow"  # of the MLflow server on the port of the manager, and of the cluster


class ImageOrder(Value):
    """Images that a builder is to make and push: of aggregator and learner, or of the trained model.

    A `registry` is ``host:port``, "" for that of the cluster; `base` is an image, "" for one of Debian's
    packages; one without a host is in the cluster's registry.
    """

    project_id: str
    registry: str = ""
    base: str = ""
    platforms: tuple[Platform, ...]
    source: str  # the ML repository
    commit: str
    model: TrainedModel | None = None  # the model to package; the bundle is its folder then


class BuilderConfig(Value):
    """Lock the environment of the bundle's repository, unless it is known, and make images if asked to."""

    flavor: str
    environment_key: str
    needs_gpu: bool = False
    environment: Environment | None = None  # when it is locked already
    images: ImageOrder | None = None


class ParentAggregator(Value):
    """The aggregator above one: it is dialled as learners dial theirs."""

    address: str  # "host:port"
    token: str


class AggregatorConfig(Value):
    """Train: rounds, strategy, and where to track.

    Aggregators form a tree. One with a parent is a learner to it: it trains `rounds` rounds with its own
    learners whenever it is asked to train, and neither tracks nor exports. One that `has_clusters` has
    aggregators as learners, and its rounds are the cycles.
    """

    project_id: str
    customer_id: str
    flavor: str
    rounds: int
    min_available_clients: int
    min_fit_clients: int
    min_evaluate_clients: int
    strategy: Strategy = Strategy()
    update_precision: UpdatePrecision = UpdatePrecision.FULL
    round_timeout_s: float = 3600.0
    load_timeout_s: float = 600.0  # of its learners
    target_metric: TargetMetric | None = None
    early_stopping: EarlyStopping | None = None
    seed: int | None = None
    learner_token: str  # learners show it when they connect
    tracking_uri: str  # MLflow server; `TRACKING_PATH` where the cluster's port leads to it
    tracking_public_uri: str = ""  # where people see it; `tracking_uri` if not given
    model_name: str  # in the model registry
    tags: dict[str, str] = Field(default_factory=dict)  # of the run: repository, commit, data tags
    parent: ParentAggregator | None = None
    cluster: str = ""  # the name of the cluster it aggregates, if it has a parent
    has_clusters: bool = False


class LearnerConfig(Value):
    """Learn: which aggregator, which data, which part of it."""

    project_id: str
    aggregator: str  # "host:port"
    learner_token: str
    data_tags: tuple[str, ...]
    part: int = 0  # this learner's part of the node's data, 0 <= part < parts
    parts: int = 1
    seed: int | None = None
    load_timeout_s: float = 600.0  # longest loading of code and data without a new row


class InferenceConfig(Value):
    """Serve the bundle's model."""

    project_id: str
    model_name: str
    model_version: str
    port: int = 8080  # the first one tried; any free port when it is taken
    is_port_fixed: bool = False  # no other port; shared with the service that it is to replace


class MockProviderConfig(Value):
    """Push some partitions of a dataset to this node's own ML data server, as devices would."""

    mock_data_id: str
    configuration: MockDataConfiguration
    partitions: tuple[int, ...]  # which of `number_of_partitions` this provider pushes
    dataset_blob: str | None = None  # a local file of the user, sent along as a blob
