"""What users ask for: the project SLA and the mock-data SLA, with every key, default and range."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from flops.core.model import StrictValue
from flops.core.platforms import Platform
from flops.core.strategies import strategy_problem
from flops.errors import ErrorCode, FlopsError

TAG_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
DataTagName = Annotated[str, Field(pattern=TAG_PATTERN)]
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000)]


class ModelFlavor(StrEnum):
    """MLflow flavors a model can have."""

    SKLEARN = "sklearn"
    PYTORCH = "pytorch"
    TENSORFLOW = "tensorflow"
    KERAS = "keras"
    XGBOOST = "xgboost"


class Packaging(StrEnum):
    """What services of a project run from: a locked virtual environment on the node, or an OCI image."""

    ENVIRONMENT = "environment"
    IMAGE = "image"


class TrainingMode(StrEnum):
    """Classic: one aggregator. Hierarchical: a root aggregator and one per cluster."""

    CLASSIC = "classic"
    HIERARCHICAL = "hierarchical"


class PostTrainingStep(StrEnum):
    """What happens with the best model after training."""

    BUILD_IMAGE = "build_image_for_trained_model"
    DEPLOY_IMAGE = "deploy_trained_model_image"


class StrategyName(StrEnum):
    """Aggregation strategies, by Flower's names."""

    FED_AVG = "FedAvg"
    FED_AVG_M = "FedAvgM"
    FED_PROX = "FedProx"
    FED_ADAGRAD = "FedAdagrad"
    FED_ADAM = "FedAdam"
    FED_YOGI = "FedYogi"
    FED_MEDIAN = "FedMedian"
    FED_TRIMMED_AVG = "FedTrimmedAvg"
    KRUM = "Krum"
    QFED_AVG = "QFedAvg"
    FED_XGB_BAGGING = "FedXgbBagging"


class Strategy(StrictValue):
    """An aggregation strategy and its parameters, as Flower names them."""

    name: StrategyName = StrategyName.FED_AVG
    parameters: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _parameters_fit(self) -> Strategy:
        problem = strategy_problem(self.name, self.parameters)
        if problem is not None:
            raise ValueError(problem)
        return self


class UpdatePrecision(StrEnum):
    """In which precision learners send what they have trained."""

    FULL = "full"  # the parameters, in their own type
    HALF = "half"  # what was changed, in half precision


class EarlyStopping(StrictValue):
    """End the training when the metric has not improved for `patience` rounds."""

    patience: PositiveInt = 3
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class TargetMetric(StrictValue):
    """End the training as soon as the metric reaches the value."""

    name: Annotated[str, Field(pattern="^(accuracy|loss)$")] = "accuracy"
    value: float


class TrainingConfiguration(StrictValue):
    """How to train: the ancestor's keys, then the optional new ones."""

    mode: TrainingMode = TrainingMode.CLASSIC
    data_tags: Annotated[tuple[DataTagName, ...], Field(min_length=1, max_length=64)]
    training_cycles: PositiveInt = 1
    training_rounds: PositiveInt = 3
    min_available_clients: PositiveInt = 1
    min_fit_clients: PositiveInt = 1
    min_evaluate_clients: PositiveInt = 1
    max_clients: PositiveInt | None = None  # up to which later nodes are taken in; None: no node is
    strategy: Strategy = Strategy()
    round_timeout_s: Annotated[float, Field(gt=0, le=7 * 86_400)] = 3_600.0
    update_precision: UpdatePrecision = UpdatePrecision.FULL
    min_clusters: PositiveInt = 1  # hierarchical: of which a cycle needs answers
    cluster_strategy: Strategy | None = None  # hierarchical: of the clusters' aggregators; None: `strategy`
    target_metric: TargetMetric | None = None
    early_stopping: EarlyStopping | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None

    @model_validator(mode="after")
    def _fit_within_available(self) -> TrainingConfiguration:
        for key in ("min_fit_clients", "min_evaluate_clients"):
            if getattr(self, key) > self.min_available_clients:
                raise ValueError(
                    f"{key} is {getattr(self, key)}, but only min_available_clients = "
                    f"{self.min_available_clients} learners take part"
                )
        if self.max_clients is not None and self.max_clients < self.min_available_clients:
            raise ValueError(
                f"max_clients is {self.max_clients}, but min_available_clients asks for "
                f"{self.min_available_clients} learners from the beginning"
            )
        return self

    @model_validator(mode="after")
    def _clusters_are_of_hierarchies(self) -> TrainingConfiguration:
        if self.mode is TrainingMode.HIERARCHICAL:
            return self
        for key in ("min_clusters", "cluster_strategy"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for mode hierarchical only")
        return self

    @property
    def is_hierarchical(self) -> bool:
        """Whether clusters have aggregators of their own."""
        return self.mode is TrainingMode.HIERARCHICAL

    @property
    def strategy_in_clusters(self) -> Strategy:
        """The strategy of the clusters' aggregators."""
        return self.cluster_strategy or self.strategy


class ResourceConstraints(StrictValue):
    """Limits of each learner and aggregator: MB of memory, CPUs, MB of storage (0: unlimited).

    `vgpus` are of learners only, and decide whether environments have CUDA.
    """

    memory: Annotated[int, Field(ge=1, le=16_000_000)] = 100
    vcpus: Annotated[float, Field(gt=0, le=4_096)] = 1
    storage: Annotated[int, Field(ge=0)] = 0
    vgpus: Annotated[int, Field(ge=0, le=64)] = 0


class ProjectSla(StrictValue):
    """A project's SLA: which code, which data, how to train, what to do with the model."""

    customer_id: Annotated[str, Field(alias="customerID", min_length=1, max_length=64)] = "Admin"
    verbose: bool = False
    ml_repo_url: Annotated[str, Field(min_length=1, max_length=2_048)]
    ml_repo_ref: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    ml_model_flavor: ModelFlavor
    use_devel_base_images: bool = False
    supported_platforms: Annotated[tuple[Platform, ...], Field(min_length=1)] = (Platform.AMD64,)
    model_name: Annotated[str, Field(pattern=TAG_PATTERN)] | None = None
    packaging: Packaging | None = None  # None: the control plane's default
    training_configuration: TrainingConfiguration
    post_training_steps: tuple[PostTrainingStep, ...] = ()
    resource_constraints: ResourceConstraints = ResourceConstraints()

    @model_validator(mode="after")
    def _strategy_fits_flavor(self) -> ProjectSla:
        training = self.training_configuration
        bags_trees = training.strategy.name is StrategyName.FED_XGB_BAGGING
        if bags_trees != (training.strategy_in_clusters.name is StrategyName.FED_XGB_BAGGING):
            raise ValueError("strategy and cluster_strategy are both FedXgbBagging, or none of them is")
        if self.ml_model_flavor is ModelFlavor.XGBOOST and not bags_trees:
            raise ValueError(
                "ml_model_flavor xgboost needs training_configuration.strategy.name FedXgbBagging: "
                "the bytes of trees have no mean"
            )
        if bags_trees and self.ml_model_flavor is not ModelFlavor.XGBOOST:
            raise ValueError("the strategy FedXgbBagging is for ml_model_flavor xgboost only")
        return self

    @model_validator(mode="after")
    def _deploy_needs_build(self) -> ProjectSla:
        steps = self.post_training_steps
        if PostTrainingStep.DEPLOY_IMAGE in steps and PostTrainingStep.BUILD_IMAGE not in steps:
            raise ValueError(
                "post_training_steps has deploy_trained_model_image without build_image_for_trained_model"
            )
        return self


class PartitionerName(StrEnum):
    """How a dataset is split over partitions."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    SHARD = "shard"
    NATURAL = "natural"


class Partitioner(StrictValue):
    """A partitioner and its parameters.

    `alpha` is Dirichlet's concentration (small is uneven), `column` the label or group column.
    """

    name: PartitionerName = PartitionerName.IID
    column: str | None = None
    alpha: Annotated[float, Field(gt=0)] = 0.5
    shards_per_partition: PositiveInt = 2


class MockDataConfiguration(StrictValue):
    """Which dataset stands in for devices, and how it is split."""

    dataset_name: Annotated[str, Field(min_length=1)] = "mnist"
    number_of_partitions: PositiveInt = 1
    data_tag: DataTagName
    split: str = "train"
    partitioner: Partitioner = Partitioner()
    number_of_nodes: PositiveInt | None = None  # learner nodes that receive partitions; None: all
    max_rows: PositiveInt | None = None  # take only the first rows of the dataset
    seed: int = 42


class MockDataSla(StrictValue):
    """A mock data provider's SLA."""

    customer_id: Annotated[str, Field(alias="customerID", min_length=1, max_length=64)] = "Admin"
    mock_data_configuration: MockDataConfiguration


def parse_project_sla(raw: Mapping[str, Any]) -> ProjectSla:
    """Validate a project SLA.

    Raises:
        FlopsError: ``sla_invalid``, naming every wrong key with its value and the allowed range.
    """
    try:
        return ProjectSla.model_validate(raw)
    except ValidationError as exc:
        raise _sla_error("project SLA", exc) from exc


def parse_mock_data_sla(raw: Mapping[str, Any]) -> MockDataSla:
    """Validate a mock-data SLA.

    Raises:
        FlopsError: ``sla_invalid``, naming every wrong key with its value and the allowed range.
    """
    try:
        return MockDataSla.model_validate(raw)
    except ValidationError as exc:
        raise _sla_error("mock-data SLA", exc) from exc


def _sla_error(what: str, exc: ValidationError) -> FlopsError:
    problems = [_describe(dict(error)) for error in exc.errors(include_url=False)]
    sentence = "; ".join(f"{p['key']}: {p['problem']}" if p["key"] else p["problem"] for p in problems)
    return FlopsError(
        ErrorCode.SLA_INVALID, f"The {what} is invalid: {sentence}.", details={"problems": problems}
    )


def _describe(error: dict[str, Any]) -> dict[str, Any]:
    key = ".".join(str(part) for part in error["loc"])
    problem = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        problem = "unknown key"
    elif error["type"] == "missing":
        problem = "required key is missing"
    elif not isinstance(error["input"], Mapping):
        problem = f"{problem}, got {error['input']!r}"
    return {"key": key, "problem": problem, "value": repr(error["input"])[:200]}
