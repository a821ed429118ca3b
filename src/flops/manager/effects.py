"""What each effect of the lifecycle does to the outside world. Doing it again changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flops.core.cluster import ServiceSpec, ServiceState
from flops.core.effects import Effect, EffectKind
from flops.core.events import (
    LifecycleEvent,
    ModelPackaged,
    NodesTakenIn,
    PlacementDecided,
    RepositoryResolved,
    ServiceChanged,
    ServicesEnded,
)
from flops.core.ids import NodeId, ProjectId, ServiceId
from flops.core.late_nodes import late_nodes
from flops.core.placement import place_builder, place_inference, place_project
from flops.core.project import Environment, Failure, Project, Stage
from flops.core.run_end import run_end_of
from flops.core.service_moves import learners_of
from flops.errors import ErrorCode, FlopsError
from flops.manager.options import EngineOptions
from flops.manager.service_specs import (
    aggregator_spec,
    builder_spec,
    cluster_aggregator_specs,
    inference_spec,
    learner_specs,
    packager_spec,
)
from flops.ports import Blobs, MLRepos, Orchestrator, ProjectStore
from flops.tracker_port import Tracker

# What has to be done however long it takes: the outside world is to be left as if nothing had been.
NEVER_GIVEN_UP = frozenset(
    {
        EffectKind.STOP_SERVICES,
        EffectKind.DELETE_PROJECT,
        EffectKind.END_TRACKING,
        EffectKind.DELETE_TRACKING,
    }
)


class EffectRunner:
    """Does effects.

    Args:
        store: projects; read, and for a deletion removed.
        orchestrator: the cluster.
        repos: Git repositories with training code.
        blobs: bundles and locks.
        options: the engine's options.
        tracker: the record of experiments, whose runs end with their projects; None leaves them.
        paces: tells how fast nodes have trained, by name.
    """

    def __init__(
        self,
        store: ProjectStore,
        orchestrator: Orchestrator,
        repos: MLRepos,
        blobs: Blobs,
        options: EngineOptions,
        tracker: Tracker | None,
        paces: Callable[[], Mapping[str, float]],
    ) -> None:
        self._store = store
        self._orchestrator = orchestrator
        self._repos = repos
        self._blobs = blobs
        self._options = options
        self._tracker = tracker
        self._paces = paces
        self._actions: Mapping[EffectKind, Callable[[Project, Effect], LifecycleEvent | None]] = {
            EffectKind.RESOLVE_REPOSITORY: self._resolve_repository,
            EffectKind.DECIDE_PLACEMENT: self._decide_placement,
            EffectKind.START_BUILDER: self._start_builder,
            EffectKind.START_AGGREGATOR: self._start_aggregator,
            EffectKind.START_CLUSTERS: self._start_clusters,
            EffectKind.START_LEARNERS: self._start_learners,
            EffectKind.LOOK_FOR_NODES: self._look_for_nodes,
            EffectKind.ADD_LEARNER: self._add_learner,
            EffectKind.BUILD_INFERENCE: self._package_model,
            EffectKind.START_INFERENCE: self._start_inference,
            EffectKind.STOP_SERVICES: self._stop_services,
            EffectKind.DELETE_PROJECT: self._delete_project,
            EffectKind.END_TRACKING: self._end_tracking,
        }

    def run(self, effect: Effect) -> LifecycleEvent | None:
        """Do an effect; returns what came of it, None when there is nothing to tell.

        Raises:
            FlopsError: whatever is in the way.
        """
        if effect.kind is EffectKind.DELETE_TRACKING:
            self._delete_tracking(effect)
            return None
        project = self._find(effect.project_id)
        if project is None:
            return None
        is_ending = project.stage.is_final or project.stage is Stage.STOPPING
        if is_ending and effect.kind not in NEVER_GIVEN_UP:
            return None
        return self._actions[effect.kind](project, effect)

    def _find(self, project_id: ProjectId) -> Project | None:
        try:
            return self._store.get(project_id)
        except FlopsError as exc:
            if exc.code is ErrorCode.PROJECT_NOT_FOUND:
                return None
            raise

    def _resolve_repository(self, project: Project, _effect: Effect) -> LifecycleEvent:
        sla = project.sla
        needs_gpu = sla.resource_constraints.vgpus > 0
        repository = self._repos.resolve(
            sla.ml_repo_url, sla.ml_repo_ref, sla.ml_model_flavor.value, needs_gpu=needs_gpu
        )
        environment = self._store.find_environment(repository.environment_key)
        if environment is not None and not self._is_stored(environment):
            environment = None
        return RepositoryResolved(repository=repository, environment=environment)

    def _is_stored(self, environment: Environment) -> bool:
        return self._blobs.has(environment.lock) and self._blobs.has(environment.model_lock)

    def _decide_placement(self, project: Project, _effect: Effect) -> LifecycleEvent:
        nodes = self._orchestrator.nodes()
        placement = place_project(project.sla, nodes, project.needs_build, self._paces())
        chosen = {placement.aggregator, placement.builder, placement.inference, *placement.learners}
        chosen |= {cluster.aggregator for cluster in placement.clusters}
        names = {str(node.id): node.name for node in nodes if node.id in chosen}
        return PlacementDecided(placement=placement, nodes=names)

    def _start_builder(self, project: Project, _effect: Effect) -> None:
        self._start(builder_spec(project, self._options))

    def _start_aggregator(self, project: Project, _effect: Effect) -> None:
        self._start(aggregator_spec(project, self._options))

    def _start_clusters(self, project: Project, effect: Effect) -> None:
        address, attempt = effect.payload["address"], effect.payload["attempt"]
        for spec in cluster_aggregator_specs(project, address, attempt, self._options):
            self._start(spec)

    def _start_learners(self, project: Project, effect: Effect) -> None:
        address, generation = effect.payload["address"], effect.payload["generation"]
        wanted = learners_of(project, effect.payload.get("cluster", ""), generation)
        for spec in learner_specs(project, address, self._options, wanted):
            self._start(spec)

    def _look_for_nodes(self, project: Project, _effect: Effect) -> LifecycleEvent | None:
        found = late_nodes(project, self._orchestrator.nodes(), self._paces())
        return NodesTakenIn(nodes=found) if found else None

    def _add_learner(self, project: Project, effect: Effect) -> LifecycleEvent | None:
        learner = ServiceId(effect.payload["learner"])
        clusters = project.training.clusters if project.training else ()
        own = next((cluster.address for cluster in clusters if learner in cluster.learners), None)
        address = project.aggregator_address if own is None else own
        for spec in learner_specs(project, address, self._options, {learner}):
            try:
                self._start(spec)
            except FlopsError as exc:
                if exc.code is not ErrorCode.NODE_NOT_FOUND:
                    raise
                failure = Failure.model_validate(exc.to_dict())  # removed since it was taken in
                state, node = ServiceState.FAILED, effect.payload["node"]
                return ServiceChanged(service_id=learner, node=node, state=state, failure=failure)
        return None

    def _package_model(self, project: Project, _effect: Effect) -> LifecycleEvent | None:
        bundle = project.model.bundle if project.model else None
        if bundle is None or not self._blobs.has(bundle):
            raise FlopsError(
                ErrorCode.MODEL_EXPORT_FAILED,
                f"The trained model of project {project.id} was not stored: its bundle is missing.",
                hint="Look at the aggregator's log: `flops project logs`.",
            )
        if project.environment is None or not self._blobs.has(project.environment.model_lock):
            raise FlopsError(
                ErrorCode.ENVIRONMENT_BUILD_FAILED,
                f"The lock of the environment that serves project {project.id}'s model is missing.",
            )
        if not project.runs_images:
            return ModelPackaged()
        self._start(packager_spec(project, place_builder(self._orchestrator.nodes()), self._options))
        return None

    def _start_inference(self, project: Project, _effect: Effect) -> None:
        preferred: NodeId | None = project.placement.inference if project.placement else None
        node_id = place_inference(project.sla, self._orchestrator.nodes(), preferred=preferred)
        self._start(inference_spec(project, node_id, self._options))

    def _start(self, spec: ServiceSpec) -> None:
        self._orchestrator.start_service(spec)
        if self._find(ProjectId(spec.project_id)) is None:  # deleted meanwhile, with what it had then
            self._orchestrator.remove_service(spec.id)

    def _stop_services(self, project: Project, effect: Effect) -> LifecycleEvent | None:
        asked = [ServiceId(service) for service in effect.payload["services"]]
        for service_id in asked:
            self._orchestrator.stop_service(service_id)
        known = {service.spec.id: service for service in self._orchestrator.services(project.id)}
        ended = tuple(s for s in asked if s not in known or known[s].status.state.is_final)
        return ServicesEnded(services=ended) if ended else None

    def _delete_project(self, project: Project, _effect: Effect) -> None:
        for service in self._orchestrator.services(project.id):
            self._orchestrator.remove_service(service.spec.id)
        self._store.delete(project.id)

    def _end_tracking(self, project: Project, _effect: Effect) -> None:
        if self._tracker is not None and not project.is_deletion_requested:
            self._tracker.end_runs(project.id, run_end_of(project))

    def _delete_tracking(self, effect: Effect) -> None:
        if self._tracker is not None:
            self._tracker.delete(ProjectId(effect.payload["project_id"]))
