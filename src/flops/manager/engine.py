"""The project engine: takes in what users ask and the cluster reports, and has done what follows from it.

Each change of a project, its history, its effects and the position in the cluster's log are one transaction.
Effects run afterwards, and again after a restart, until they are done.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable

from flops import __version__
from flops.command import StoppedError, stopped_when
from flops.core.cluster import AddonState, ClusterEvent, Node, Service, ServiceKind, find_node
from flops.core.effects import Effect, EffectKind
from flops.core.events import (
    Aborted,
    DeleteRequested,
    EnvironmentLocked,
    LifecycleEvent,
    RoundCompleted,
    StepFailed,
    StopRequested,
    Submitted,
)
from flops.core.health import ExaminedNode, examine_nodes
from flops.core.ids import ProjectId, ServiceId
from flops.core.late_nodes import takes_in_nodes
from flops.core.lifecycle import IllegalTransitionError, Step, new_project, step
from flops.core.mock_progress import RUNNING
from flops.core.node_paces import NodePaces
from flops.core.output import Output
from flops.core.plan import ProjectPlan, plan_project
from flops.core.project import Failure, MockData, Project, ProjectEvent, Stage
from flops.core.sla import MockDataSla, ProjectSla
from flops.deployment_ports import ManagerStore
from flops.errors import ErrorCode, FlopsError
from flops.log import log_context
from flops.manager.deployments import ModelDeployments, is_launch
from flops.manager.effects import NEVER_GIVEN_UP, EffectRunner
from flops.manager.event_pump import EventPump
from flops.manager.executor import EffectExecutor
from flops.manager.mock_data import MockDataProviders
from flops.manager.options import EngineOptions
from flops.manager.translation import translate
from flops.ports import Blobs, Clock, MLRepos, Orchestrator
from flops.tracker_port import Tracker

_log = logging.getLogger(__name__)

_TRANSIENT = {ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT, ErrorCode.DISK_FULL}
_MAX_PAUSE_S = 10.0
_LOOK_EVERY_S = 2.0  # for nodes that a training may take in; they tell what they have as often


class Engine:
    """Runs all projects. Thread-safe.

    Args:
        store: what survives a restart.
        orchestrator: the cluster.
        repos: Git repositories with training code.
        blobs: bundles and locks.
        clock: stamps what happens.
        options: see `EngineOptions`.
        tracker: the record of experiments, whose runs end with their projects; None leaves them.

    Attributes:
        deployments: models that are served at an address of their own.
    """

    def __init__(
        self,
        store: ManagerStore,
        orchestrator: Orchestrator,
        repos: MLRepos,
        blobs: Blobs,
        clock: Clock,
        options: EngineOptions,
        tracker: Tracker | None = None,
    ) -> None:
        self._store = store
        self._orchestrator = orchestrator
        self._clock = clock
        self._options = options
        self._lock = threading.RLock()
        self._listeners: list[Callable[[ProjectId], None]] = []
        self._recovered: set[str] = set()
        self._paces = NodePaces()  # told by the rounds that projects keep
        self._runner = EffectRunner(store, orchestrator, repos, blobs, options, tracker, self.node_paces)
        self._executor = EffectExecutor(self._perform, options.workers)
        self._mock_data = MockDataProviders(store, orchestrator, blobs, clock)
        self.deployments = ModelDeployments(store, orchestrator, blobs, clock, options)
        self._pump = EventPump(store, orchestrator, self._take_in)
        self.is_closed = False

    def start(self) -> None:
        """Go on where the last process stopped: run what is pending, then take in what happened since."""
        self._remove_orphans()
        for project in reversed(self._store.all()):
            for record in project.training.history if project.training else ():
                self._paces.take_in(record)
        pending = self._store.pending_effects()
        self._recovered = {effect.key for effect in pending}
        self._executor.submit(pending)
        self._mock_data.resume()
        self.deployments.resume()
        self._executor.start()
        self._pump.start()

    def close(self) -> None:
        """Stop the engine's threads; everything goes on after the next `start`."""
        self.is_closed = True
        self._pump.close()
        self._executor.close()
        self._tell(ProjectId(""))

    # What users ask

    def submit(self, sla: ProjectSla) -> Project:
        """Accept a project."""
        sla = self._with_packaging(sla)  # settled now: another default later changes no project
        now_s = self._clock.now_s()
        project_id = ProjectId(secrets.token_hex(6))
        first = step(new_project(project_id, sla, now_s), Submitted(), now_s)
        self._store.add(first.project, first.history, first.effects)
        self._executor.submit(first.effects)
        self._tell(project_id)
        return first.project

    def plan(self, sla: ProjectSla) -> ProjectPlan:
        """What placement would decide about a project now; nothing is started or stored."""
        knows = bool(self._store.environments())
        return plan_project(
            self._with_packaging(sla), self.nodes(), self.node_paces(), knows_environments=knows
        )

    def stop(self, project_id: ProjectId) -> Project:
        """Have a project stopped; nothing happens to one that has ended, but a served model is taken down.

        Raises:
            FlopsError: ``project_not_found``.
        """
        return self._apply(project_id, StopRequested())

    def delete(self, project_id: ProjectId) -> Project:
        """Have a project stopped and removed with all that belongs to it.

        Raises:
            FlopsError: ``project_not_found``; ``model_deployed`` while its model is.
        """
        with self.deployments.lock:
            self.deployments.refuse_deletion(project_id)
            return self._apply(project_id, DeleteRequested())

    def create_mock_data(self, sla: MockDataSla, dataset_blob: str | None = None) -> MockData:
        """Have mock data pushed to learner nodes.

        Raises:
            FlopsError: ``placement_impossible``; ``not_found`` when the dataset's blob is not stored.
        """
        return self._mock_data.create(sla, dataset_blob)

    def reset(self, *, is_forced: bool = False) -> None:
        """Forget all projects, mock data, deployed models and environments, and remove their services.

        Raises:
            FlopsError: ``conflict`` while any of them runs, unless forced.
        """
        with self.deployments.lock, self._lock:
            busy = [f"project {p.id} ({p.stage.value})" for p in self._store.all() if not p.stage.is_final]
            busy += [f"mock data {m.id}" for m in self._store.list_mock_data() if m.state == RUNNING]
            busy += [f"model {d.name} ({d.state})" for d in self._store.deployments() if d.launched]
            if busy and not is_forced:
                raise FlopsError(
                    ErrorCode.CONFLICT,
                    f"The database cannot be reset while these run: {', '.join(busy)}.",
                    hint="Wait for them, stop them, or force the reset (?force=true), which stops them.",
                )
            projects = [project.id for project in self._store.all()]
            self._store.reset()
        self._remove_orphans()
        for project_id in projects:
            self._tell(project_id)

    def clear_registry(self) -> int:
        """Forget all cached environments: the next project builds its own; returns how many there were."""
        return self._store.forget_environments()

    # What users look at

    def get(self, project_id: ProjectId) -> Project:
        """A project.

        Raises:
            FlopsError: ``project_not_found``.
        """
        return self._store.get(project_id)

    def projects(self) -> list[Project]:
        """All projects, newest first."""
        return self._store.all()

    def history(self, project_id: ProjectId, *, after: int = 0) -> list[ProjectEvent]:
        """A project's history above `after`; empty for an unknown one."""
        return self._store.history(project_id, after=after)

    def mock_data(self) -> list[MockData]:
        """All mock data records, newest first."""
        return self._store.list_mock_data()

    def nodes(self) -> list[Node]:
        """All nodes of the cluster."""
        return self._orchestrator.nodes()

    def node_paces(self) -> dict[str, float]:
        """How fast nodes have trained, by name; see `NodePaces`."""
        with self._lock:
            return self._paces.all()

    def examined_nodes(self) -> list[ExaminedNode]:
        """All nodes of the cluster, each with its health."""
        return examine_nodes(self.nodes(), self.services(), self._clock.now_s(), __version__)

    def remove_node(self, name: str, *, is_forced: bool = False) -> Node:
        """Forget a node that is gone for good, by its name or id; returns what was known of it.

        Raises:
            FlopsError: ``node_not_found``; ``conflict`` when it is connected, or several nodes have the name,
                or, unless forced, it has services that have not ended.
        """
        node = find_node(self.nodes(), name)
        self._orchestrator.remove_node(node.id, is_forced=is_forced)
        return node

    def services(self, project_id: str | None = None) -> list[Service]:
        """All services of the cluster, or those of one project."""
        return self._orchestrator.services(project_id)

    def service_logs(self, service_id: ServiceId, *, after: int | None, tail_bytes: int) -> Output:
        """What follows a place in a service's output, or its end; `tail_bytes` at most.

        Raises:
            FlopsError: ``service_not_found``, ``node_lost``, ``timeout``, ``forbidden`` by the node.
        """
        return self._orchestrator.service_logs(service_id, after=after, tail_bytes=tail_bytes)

    def subscribe(self, wake: Callable[[ProjectId], None]) -> Callable[[], None]:
        """Have `wake` called, from any thread, when a project changed; also, with "", at the engine's end.

        Returns:
            A function that ends the subscription.
        """
        with self._lock:
            self._listeners.append(wake)

        def end() -> None:
            with self._lock:
                if wake in self._listeners:
                    self._listeners.remove(wake)

        return end

    # What happens

    def _take_in(self, event: ClusterEvent, node: str) -> None:
        """Take in an event of a service; the position in the log moves with the project."""
        project_id = ProjectId(event.project_id)
        with log_context(project_id=project_id, service_id=event.service_id):
            if is_launch(event.service_id, event.project_id):
                self.deployments.take_in(event, node)
                return
            try:
                translated = translate(event, node)
            except ValueError:
                _log.exception("event %d of the cluster is malformed and was left out", event.seq)
                return
            if event.service_id.startswith(ServiceKind.MOCK_DATA_PROVIDER.value):
                self._mock_data.take_in(event)
            elif translated is not None:
                self._apply_safely(project_id, translated, cursor=event.seq)

    def _perform(self, effect: Effect, attempts: int, waited_s: float) -> float | None:
        """Do an effect; returns in how many seconds to do it again, None when it is done with."""
        with log_context(project_id=effect.project_id):
            try:
                with stopped_when(lambda: self._is_needless(effect)):
                    event = self._runner.run(effect)
            except StoppedError:
                if self.is_closed:
                    return _MAX_PAUSE_S  # it runs again after the next start
                event = None
            except FlopsError as exc:
                if self._is_worth_another(effect, exc, waited_s):
                    _log.warning("%s of project %s: %s", effect.kind.value, effect.project_id, exc)
                    return min(0.2 * 2.0 ** min(attempts, 10), _MAX_PAUSE_S)
                failure = Failure.model_validate(exc.to_dict())
                event = StepFailed(kind=effect.kind, failure=failure)
            except Exception as exc:  # noqa: BLE001 (whatever it is, it is this project's failure only)
                _log.exception("effect %s raised", effect.key)
                if effect.kind in NEVER_GIVEN_UP:
                    return _MAX_PAUSE_S
                event = Aborted(failure=_internal(f"{effect.kind.value} raised {type(exc).__name__}: {exc}"))
            if event is not None:
                self._apply_safely(effect.project_id, event)
            if effect.kind is EffectKind.LOOK_FOR_NODES and self._goes_on_looking(effect.project_id):
                return _LOOK_EVERY_S
            self._finish(effect)
            return None

    def _finish(self, effect: Effect) -> None:
        self._store.finish_effect(effect.key)
        if not effect.project_id:  # no deletion of a project will take it along
            self._store.forget_finished_effects(effect.project_id)
        if effect.kind is EffectKind.DELETE_PROJECT:
            self._tell(effect.project_id)

    def _is_needless(self, effect: Effect) -> bool:
        """Whether nobody waits for what an effect brings: its project ends, or this engine does."""
        if effect.kind in NEVER_GIVEN_UP:
            return False
        try:
            stage = self._store.get(effect.project_id).stage
        except FlopsError:
            return True
        return self.is_closed or stage.is_final or stage is Stage.STOPPING

    def _goes_on_looking(self, project_id: ProjectId) -> bool:
        try:
            return takes_in_nodes(self._store.get(project_id))
        except FlopsError:
            return False

    def _is_worth_another(self, effect: Effect, exc: FlopsError, waited_s: float) -> bool:
        if effect.kind in NEVER_GIVEN_UP:
            return True
        if exc.code is ErrorCode.PLACEMENT_IMPOSSIBLE:
            # Nodes reconnect within seconds after the control plane's restart or a break of the network, and
            # their addons start, or are started again after a kill, within seconds.
            is_first_look = effect.kind is EffectKind.DECIDE_PLACEMENT and effect.key not in self._recovered
            is_resolving = self._store.get(effect.project_id).stage is Stage.RESOLVING
            if is_first_look and is_resolving and not self._is_a_node_about_to_return():
                return False
            return waited_s < self._options.reconnect_grace_s
        return exc.code in _TRANSIENT and waited_s < self._options.retry_for_s

    def _is_a_node_about_to_return(self) -> bool:
        since_s = self._clock.now_s() - self._options.reconnect_grace_s
        return any(
            any(addon.state is not AddonState.HEALTHY for addon in node.addons)
            if node.is_connected
            else node.last_seen_s > since_s
            for node in self._orchestrator.nodes()
        )

    def _apply_safely(
        self, project_id: ProjectId, event: LifecycleEvent, *, cursor: int | None = None
    ) -> None:
        """Apply an event; a defect it uncovers ends this project, and no other."""
        try:
            self._apply(project_id, event, cursor=cursor)
        except FlopsError as exc:
            if exc.code is not ErrorCode.PROJECT_NOT_FOUND:  # deleted meanwhile
                raise
        except Exception as exc:  # noqa: BLE001 (logged whole; other projects go on)
            story = [f"{line.seq} {line.kind}: {line.message}" for line in self._recent(project_id)]
            _log.exception("project %s cannot take in %s; it came so far: %s", project_id, event.name, story)
            reason = str(exc) if isinstance(exc, IllegalTransitionError) else f"{type(exc).__name__}: {exc}"
            self._apply(project_id, Aborted(failure=_internal(reason)), cursor=cursor)

    def _apply(self, project_id: ProjectId, event: LifecycleEvent, *, cursor: int | None = None) -> Project:
        with self._lock:
            result = step(self._store.get(project_id), event, self._clock.now_s())
            if not result.is_changed:
                return result.project
            if isinstance(event, EnvironmentLocked):
                self._store.put_environment(event.environment)
            self._store.save(result.project, result.history, result.effects, cursor=cursor)
            if isinstance(event, RoundCompleted):
                self._paces.take_in(event.record)
            self._executor.submit(result.effects)
        self._log_step(result)
        self._tell(project_id)
        return result.project

    def _with_packaging(self, sla: ProjectSla) -> ProjectSla:
        return sla if sla.packaging else sla.model_copy(update={"packaging": self._options.packaging})

    def _recent(self, project_id: ProjectId) -> list[ProjectEvent]:
        return self._store.history(project_id)[-10:]

    def _log_step(self, result: Step) -> None:
        for line in result.history:
            _log.info("project %s: %s", result.project.id, line.message)

    def _tell(self, project_id: ProjectId) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for wake in listeners:
            wake(project_id)

    def _remove_orphans(self) -> None:
        """Remove services that belong to nothing: a reset or deletion was cut short by a kill."""
        known = {str(project.id) for project in self._store.all()}
        known |= {mock_data.id for mock_data in self._store.list_mock_data()}
        for service in self._orchestrator.services():
            if service.spec.project_id not in known:
                self._orchestrator.remove_service(service.spec.id)


def _internal(reason: str) -> Failure:
    error = FlopsError(ErrorCode.INTERNAL, f"The manager cannot go on with this project: {reason}")
    return Failure.model_validate(error.to_dict())
