"""The services of projects and mock data providers, as they are asked of the cluster. Pure.

The same project gives the same specs with the same ids, so an effect that runs again starts nothing twice.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Collection, Sequence

from flops.core.cluster import ServiceKind, ServiceSpec
from flops.core.deployment import Launch
from flops.core.ids import Digest, NodeId, ServiceId, make_service_id
from flops.core.placement import aggregator_resources, learner_resources
from flops.core.project import Environment, MockData, Placement, Project, Repository, TrainedModel
from flops.core.service_moves import learner_ids, packager_id
from flops.core.sla import MockDataSla
from flops.errors import ErrorCode, FlopsError
from flops.manager.options import EngineOptions
from flops.wire.services import (
    AggregatorConfig,
    BuilderConfig,
    ImageOrder,
    InferenceConfig,
    LearnerConfig,
    MockProviderConfig,
    ParentAggregator,
)

_RESTARTS = 5  # after crashes; a service that tells why it fails is not helped by more
_LOAD_RETRIES = 3  # of a model that has never been served


def builder_spec(project: Project, options: EngineOptions) -> ServiceSpec:
    """The builder of a project's environment, and of its images if it runs from images."""
    repository, placement = _repository(project), _placement(project)
    if placement.builder is None:
        raise _missing(project, "a node for its builder")
    images = None
    if project.runs_images:
        images = _image_order(project, options, None)
    service_id = make_service_id(ServiceKind.BUILDER.value, project.id)
    return _builder(project, service_id, placement.builder, repository.bundle, images)


def packager_spec(project: Project, node_id: NodeId, options: EngineOptions) -> ServiceSpec:
    """The builder of the image that serves a project's best model."""
    model = _model(project)
    order = _image_order(project, options, model)
    return _builder(project, packager_id(project), node_id, model.bundle, order)


def _image_order(project: Project, options: EngineOptions, model: TrainedModel | None) -> ImageOrder:
    return ImageOrder(
        project_id=project.id,
        registry=options.registry,
        base=(project.images.base if project.images is not None else "") or options.base_image,
        platforms=project.sla.supported_platforms,
        source=_without_credentials(project.sla.ml_repo_url),
        commit=_repository(project).commit,
        model=model,
    )


def _builder(
    project: Project, service_id: ServiceId, node_id: NodeId, bundle: Digest | None, images: ImageOrder | None
) -> ServiceSpec:
    config = BuilderConfig(
        flavor=project.sla.ml_model_flavor.value,
        environment_key=_repository(project).environment_key,
        needs_gpu=project.sla.resource_constraints.vgpus > 0,
        environment=project.environment,
        images=images,
    )
    return ServiceSpec(
        id=service_id,
        project_id=project.id,
        kind=ServiceKind.BUILDER,
        node_id=node_id,
        config=config.model_dump(mode="json"),
        bundle=bundle,
        max_restarts=1,
    )


def aggregator_spec(project: Project, options: EngineOptions) -> ServiceSpec:
    """The aggregator of a project, in a hierarchical training the root."""
    repository, environment = _repository(project), _environment(project)
    config = _aggregator_config(project, options)
    if project.sla.training_configuration.is_hierarchical:
        config = config.model_copy(update=_of_root(project, options))
    return ServiceSpec(
        id=make_service_id(ServiceKind.AGGREGATOR.value, project.id),
        project_id=project.id,
        kind=ServiceKind.AGGREGATOR,
        node_id=_placement(project).aggregator,
        config=config.model_dump(mode="json"),
        bundle=repository.bundle,
        environment=environment.lock,
        model_environment=environment.model_lock,
        image=project.images.aggregator if project.images else "",
        resources=aggregator_resources(project.sla.resource_constraints),
        max_restarts=_RESTARTS,
    )


def cluster_aggregator_specs(
    project: Project, address: str, attempt: int, options: EngineOptions
) -> list[ServiceSpec]:
    """The clusters' aggregators of a hierarchical training, below the root at an address.

    They make and export no model: they need no environment of the project.
    """
    training = project.sla.training_configuration
    parent = ParentAggregator(address=address, token=_cluster_token(project, options.secret))
    specs = []
    for number, cluster in enumerate(_placement(project).clusters, start=1):
        config = _aggregator_config(project, options).model_copy(
            update={
                "strategy": training.strategy_in_clusters,
                "target_metric": None,
                "early_stopping": None,
                "parent": parent,
                "cluster": cluster.name,
            }
        )
        specs.append(
            ServiceSpec(
                id=make_service_id(ServiceKind.AGGREGATOR.value, project.id, number, attempt),
                project_id=project.id,
                kind=ServiceKind.AGGREGATOR,
                node_id=cluster.aggregator,
                config=config.model_dump(mode="json"),
                image=project.images.aggregator if project.images else "",
                resources=aggregator_resources(project.sla.resource_constraints),
                max_restarts=_RESTARTS,
            )
        )
    return specs


def _of_root(project: Project, options: EngineOptions) -> dict[str, object]:
    """What the root's configuration has otherwise: its learners are the clusters, its rounds the cycles."""
    training = project.sla.training_configuration
    rounds_s = 2 * training.training_rounds * training.round_timeout_s  # each trains, and evaluates
    return {
        "rounds": training.training_cycles,
        "min_available_clients": len(_placement(project).clusters),
        "min_fit_clients": training.min_clusters,
        "min_evaluate_clients": training.min_clusters,
        "round_timeout_s": rounds_s + training.round_timeout_s,
        "learner_token": _cluster_token(project, options.secret),
        "has_clusters": True,
    }


def _aggregator_config(project: Project, options: EngineOptions) -> AggregatorConfig:
    repository, training = _repository(project), project.sla.training_configuration
    return AggregatorConfig(
        project_id=project.id,
        customer_id=project.sla.customer_id,
        flavor=project.sla.ml_model_flavor.value,
        rounds=training.training_rounds,
        min_available_clients=training.min_available_clients,
        min_fit_clients=training.min_fit_clients,
        min_evaluate_clients=training.min_evaluate_clients,
        strategy=training.strategy,
        update_precision=training.update_precision,
        round_timeout_s=training.round_timeout_s,
        load_timeout_s=options.load_timeout_s,
        target_metric=training.target_metric,
        early_stopping=training.early_stopping,
        seed=training.seed,
        learner_token=learner_token(project, options.secret),
        tracking_uri=options.tracking_uri,
        tracking_public_uri=options.tracking_public_uri,
        model_name=project.sla.model_name or f"flops-{project.id}",
        tags={
            "flops.project_id": project.id,
            "flops.customer_id": project.sla.customer_id,
            "flops.ml_repo_url": _without_credentials(project.sla.ml_repo_url),
            "flops.ml_repo_commit": repository.commit,
            "flops.data_tags": ",".join(training.data_tags),
        },
    )


def learner_specs(
    project: Project, address: str, options: EngineOptions, wanted: Collection[ServiceId]
) -> list[ServiceSpec]:
    """Learners of a project for the aggregator at an address; those on one node share its data.

    Those of `wanted` that were replaced meanwhile are left out.
    """
    repository, environment = _repository(project), _environment(project)
    nodes = _placement(project).learners
    parts, seen = Counter(nodes), Counter[NodeId]()
    constraints = project.sla.resource_constraints
    specs = []
    for service_id, node_id in zip(learner_ids(project), nodes, strict=True):
        config = LearnerConfig(
            project_id=project.id,
            aggregator=address,
            learner_token=learner_token(project, options.secret),
            data_tags=project.sla.training_configuration.data_tags,
            part=seen[node_id],
            parts=parts[node_id],
            seed=project.sla.training_configuration.seed,
            load_timeout_s=options.load_timeout_s,
        )
        seen[node_id] += 1
        if service_id not in wanted:
            continue
        specs.append(
            ServiceSpec(
                id=service_id,
                project_id=project.id,
                kind=ServiceKind.LEARNER,
                node_id=node_id,
                config=config.model_dump(mode="json"),
                bundle=repository.bundle,
                environment=environment.lock,
                image=project.images.learner if project.images else "",
                resources=learner_resources(constraints).model_copy(update={"vgpus": constraints.vgpus}),
                max_restarts=_RESTARTS,
            )
        )
    return specs


def inference_spec(project: Project, node_id: NodeId, options: EngineOptions) -> ServiceSpec:
    """The inference service of a project's best model, as its post-training step asks for it."""
    service_id = make_service_id(ServiceKind.INFERENCE.value, project.id)
    return _inference_spec(project, service_id, node_id, options.inference_port, is_port_fixed=False)


def launch_spec(project: Project, launch: Launch) -> ServiceSpec:
    """The inference service of a deployed model's version, which this project trained."""
    return _inference_spec(project, launch.service_id, launch.node_id, launch.port, is_port_fixed=True)


def _inference_spec(
    project: Project, service_id: ServiceId, node_id: NodeId, port: int, *, is_port_fixed: bool
) -> ServiceSpec:
    model = _model(project)
    config = InferenceConfig(
        project_id=project.id,
        model_name=model.name,
        model_version=model.version,
        port=port,
        is_port_fixed=is_port_fixed,
    )
    return ServiceSpec(
        id=service_id,
        project_id=project.id,
        kind=ServiceKind.INFERENCE,
        node_id=node_id,
        config=config.model_dump(mode="json"),
        bundle=model.bundle,
        model_environment=_environment(project).model_lock,
        image=project.images.inference if project.images else "",
        resources=learner_resources(project.sla.resource_constraints),
        max_restarts=1_000,  # it serves until somebody stops it
        max_unheard_restarts=_LOAD_RETRIES,
    )


def assign_partitions(nodes: Sequence[NodeId], partitions: int) -> dict[NodeId, tuple[int, ...]]:
    """Deal partitions out to nodes in turn; a node that gets none is left out."""
    return {
        node_id: tuple(range(index, partitions, len(nodes)))
        for index, node_id in enumerate(nodes)
        if index < partitions
    }


def mock_provider_specs(mock_data: MockData) -> list[ServiceSpec]:
    """The services of a mock data provider, one per node."""
    configuration = MockDataSla.model_validate(mock_data.sla).mock_data_configuration
    shares = assign_partitions(mock_data.node_ids, configuration.number_of_partitions)
    specs = []
    for service_id, node_id in zip(mock_data.services, mock_data.node_ids, strict=True):
        config = MockProviderConfig(
            mock_data_id=mock_data.id,
            configuration=configuration,
            partitions=shares[node_id],
            dataset_blob=mock_data.dataset_blob,
        )
        specs.append(
            ServiceSpec(
                id=service_id,
                project_id=mock_data.id,
                kind=ServiceKind.MOCK_DATA_PROVIDER,
                node_id=node_id,
                config=config.model_dump(mode="json"),
                max_restarts=1,
            )
        )
    return specs


def learner_token(project: Project, secret: bytes) -> str:
    """What learners show to their aggregator; derived, so that it is stored nowhere and never shown."""
    return hmac.new(secret, f"learner:{project.id}".encode(), hashlib.sha256).hexdigest()


def _cluster_token(project: Project, secret: bytes) -> str:
    """What the clusters' aggregators show to the root; no learner has it."""
    return hmac.new(secret, f"cluster:{project.id}".encode(), hashlib.sha256).hexdigest()


def _without_credentials(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}://{rest.rsplit('@', 1)[-1]}" if separator else url


def _repository(project: Project) -> Repository:
    if project.repository is None:
        raise _missing(project, "its repository")
    return project.repository


def _environment(project: Project) -> Environment:
    if project.environment is None:
        raise _missing(project, "its environment")
    return project.environment


def _placement(project: Project) -> Placement:
    if project.placement is None:
        raise _missing(project, "its placement")
    return project.placement


def _model(project: Project) -> TrainedModel:
    if project.model is None:
        raise _missing(project, "its model")
    return project.model


def _missing(project: Project, what: str) -> FlopsError:
    return FlopsError(
        ErrorCode.INTERNAL, f"Project {project.id} is {project.stage.value}, but {what} is unknown."
    )
