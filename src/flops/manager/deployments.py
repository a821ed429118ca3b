"""Deployed models: starts the service of a version, lets it take over when it answers, stops the one before.

A record is stored before anything is done for it, and says which services are to run. So a kill at any moment
leaves nothing half done: `resume` brings the cluster to what the records say.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from flops.core import deployment as moves
from flops.core.cluster import ClusterEvent, Node, Service, ServiceKind, ServiceState, ServiceStatus
from flops.core.deployment import Deployment, Launch
from flops.core.events import InferenceListening, ServiceChanged, ServiceProgressed, ServiceTold
from flops.core.ids import ProjectId, ServiceId, make_service_id
from flops.core.placement import place_inference
from flops.core.project import Failure, Project
from flops.deployment_ports import ManagerStore
from flops.errors import ErrorCode, FlopsError
from flops.manager.options import EngineOptions
from flops.manager.service_specs import launch_spec
from flops.manager.translation import translate
from flops.ports import Blobs, Clock, Orchestrator

_log = logging.getLogger(__name__)

_LASTING = {ErrorCode.NODE_NOT_FOUND, ErrorCode.PROJECT_NOT_FOUND}  # why a service can never be started
_PORTS_TRIED = 20  # from the first one on, while nobody has asked for a certain one


class ModelDeployments:
    """Deploys models. Thread-safe.

    Args:
        store: keeps the records, and has the projects whose models are deployed.
        orchestrator: runs the services.
        blobs: hold the models.
        clock: stamps the records.
        options: the engine's options.

    Attributes:
        lock: held while records change; who removes projects holds it meanwhile.
    """

    def __init__(
        self,
        store: ManagerStore,
        orchestrator: Orchestrator,
        blobs: Blobs,
        clock: Clock,
        options: EngineOptions,
    ) -> None:
        self._store = store
        self._orchestrator = orchestrator
        self._blobs = blobs
        self._clock = clock
        self._options = options
        self._is_settled = True  # the cluster was asked for all that the records say
        self.lock = threading.RLock()

    # What users ask

    def deploy(
        self,
        name: str,
        *,
        version: str | None = None,
        node: str | None = None,
        port: int | None = None,
        reason: str = "deployed",
    ) -> Deployment:
        """Have a version served at the model's address; what serves now goes on until it answers.

        Args:
            name: of the model.
            version: the newest when None.
            node: name or id; when None the one that has the model's address, or any that can take it.
            port: when None that of the model's address, or the first free one.
            reason: stands in the history, a few words.

        Raises:
            FlopsError: ``model_not_found``, ``node_not_found``, ``placement_impossible``, ``port_occupied``.
        """
        with self.lock:
            project = self._project_of(name, version)
            found = self._find(name)
            record = found or Deployment(name=name, created_at_s=self._clock.now_s())
            place = self._place(project, record, node)
            chosen, may_move = self._port_on(place, record, port)
            launch = Launch(
                service_id=moves.launch_id(project.id, record.launches + 1),
                version=_version_of(project),
                project_id=project.id,
                node_id=place.id,
                node=place.name,
                port=chosen,
                may_move=may_move,
                reason=reason,
            )
            if record.starting is not None and _is_same(record.starting, launch):
                return record
            if record.serving is not None and _is_same(record.serving, launch):
                return self._save(record, moves.withdrawn(record, self._clock.now_s()))
            return self._save(record, moves.begun(record, launch, self._clock.now_s()))

    def rollback(self, name: str) -> Deployment:
        """Have the version served that was deployed before the present one.

        Raises:
            FlopsError: ``not_deployed``; ``rollback_impossible`` when no other version was deployed before,
                or its project is gone; else as `deploy`.
        """
        with self.lock:
            record = self.get(name)
            if record.serving is None and record.failure is None:
                raise _not_deployed(name)
            before = moves.version_before(record)
            if before is None:
                message = f"No other version of model {name!r} was deployed before."
                raise FlopsError(ErrorCode.ROLLBACK_IMPOSSIBLE, message)
            present = record.history[-1].version
            try:
                return self.deploy(name, version=before.version, reason=f"rolled back from version {present}")
            except FlopsError as exc:
                if exc.code is not ErrorCode.MODEL_NOT_FOUND:
                    raise
                message = f"Version {before.version} of model {name!r} is gone with its project."
                raise FlopsError(ErrorCode.ROLLBACK_IMPOSSIBLE, message) from exc

    def undeploy(self, name: str) -> Deployment:
        """Stop what serves a model, and what is to; the address is kept for the next version.

        Raises:
            FlopsError: ``not_deployed``, ``model_not_found``.
        """
        with self.lock:
            record = self.get(name)
            if not record.launched:
                raise _not_deployed(name)
            return self._save(record, moves.undeployed(record, self._clock.now_s()))

    def get(self, name: str) -> Deployment:
        """The record of a model.

        Raises:
            FlopsError: ``not_deployed`` when the model was never deployed, ``model_not_found``.
        """
        record = self._find(name)
        if record is None:
            self._project_of(name, None)
            raise _not_deployed(name)
        return record

    def all(self) -> list[Deployment]:
        """All records, by name."""
        return self._store.deployments()

    def refuse_deletion(self, project_id: ProjectId) -> None:
        """Nothing, unless a model of the project is deployed. To be called under `lock`.

        Raises:
            FlopsError: ``model_deployed``.
        """
        for record in self._store.deployments():
            for launch in record.launched:
                if launch.project_id == project_id:
                    raise FlopsError(
                        ErrorCode.MODEL_DEPLOYED,
                        f"Project {project_id} cannot be deleted: version {launch.version} of model "
                        f"{record.name!r}, which it trained, is deployed on {launch.node}.",
                    )

    # What happens

    def resume(self) -> None:
        """Start what a kill of the manager kept from being started, and stop what is not wanted any more."""
        with self.lock:
            records = self._store.deployments()
            wanted = {launch.service_id for record in records for launch in record.launched}
            for service in self._orchestrator.services():
                if is_launch(service.spec.id, service.spec.project_id) and service.spec.id not in wanted:
                    _stop(self._orchestrator, service)
            for record in records:
                for launch in record.launched:
                    self._start(record, launch)
            self._is_settled = True

    def take_in(self, event: ClusterEvent, node: str) -> None:
        """Bring a record up to date; an event of something that is not wanted any more changes nothing.

        Raises:
            FlopsError: something cannot be stored right now; the event is to come again.
        """
        with self.lock:
            if not self._is_settled:
                self.resume()
            service_id = ServiceId(event.service_id)
            for record in self._store.deployments():
                if service_id in {launch.service_id for launch in record.launched}:
                    self._save(record, self._after(record, service_id, event, node))

    def _after(self, record: Deployment, service_id: ServiceId, event: ClusterEvent, node: str) -> Deployment:
        now_s = self._clock.now_s()
        match translate(event, node):
            case InferenceListening(url=url):
                return moves.answered(record, service_id, url, now_s)
            case ServiceProgressed(message=message):
                return moves.progressed(record, service_id, message, now_s)
            case ServiceTold(failure=failure):
                moved = self._moved_on(record, service_id, failure)
                return moved or moves.told(record, service_id, failure, now_s)
            case ServiceChanged() as change:
                record = moves.progressed(record, service_id, _preparation(change), now_s)
                failure = change.failure or _unexplained(change)
                moved = self._moved_on(record, service_id, failure)
                restarts = ServiceStatus.model_validate(event.payload).restarts
                return moved or moves.changed(record, service_id, change.state, failure, restarts, now_s)
            case _:
                return record

    def _moved_on(self, record: Deployment, service_id: ServiceId, failure: Failure) -> Deployment | None:
        """The record with the next port, when that is all that keeps the starting version from serving."""
        launch = record.starting
        if launch is None or launch.service_id != service_id or failure.code != ErrorCode.PORT_OCCUPIED:
            return None
        port = self._free_port(launch.node_id, record.name, first=launch.port + 1)
        if not launch.may_move or port > self._options.inference_port + _PORTS_TRIED:
            return None
        return moves.moved_on(record, port, self._clock.now_s())

    def _save(self, before: Deployment, after: Deployment) -> Deployment:
        """Store a changed record, then have done what follows from it."""
        if after == before:
            return before
        self._store.put_deployment(after)
        self._is_settled = False
        if after.doing != before.doing:
            _log.info("model %s: %s", after.name, after.doing)
        kept = {launch.service_id for launch in after.launched}
        for launch in before.launched:
            if launch.service_id not in kept:
                self._orchestrator.stop_service(launch.service_id)
        known = {launch.service_id for launch in before.launched}
        for launch in after.launched:
            if launch.service_id not in known:
                after = self._start(after, launch)
        self._is_settled = True
        return after

    def _start(self, record: Deployment, launch: Launch) -> Deployment:
        """Have a launch's service run, if it is not known yet."""
        try:
            project = self._store.get(launch.project_id)
            self._orchestrator.start_service(launch_spec(project, launch))
        except FlopsError as exc:
            if exc.code not in _LASTING:
                raise
            failure = Failure.model_validate(exc.to_dict())
            now_s = self._clock.now_s()
            after = moves.changed(record, launch.service_id, ServiceState.FAILED, failure, 0, now_s)
            return self._save(record, after)
        return record

    # What is there

    def _find(self, name: str) -> Deployment | None:
        return next((record for record in self._store.deployments() if record.name == name), None)

    def _project_of(self, name: str, version: str | None) -> Project:
        """The project that trained a version, the newest when None."""
        models = [(p.model, p) for p in self._store.all() if p.model is not None]
        versions = {model.version: project for model, project in models if model.name == name}
        if not versions:
            known = ", ".join(sorted({model.name for model, _ in models})) or "none has been trained yet"
            raise FlopsError(ErrorCode.MODEL_NOT_FOUND, f"There is no model {name!r}; there are: {known}.")
        ordered = sorted(versions, key=_rank)
        wanted = ordered[-1] if version is None else version
        project = versions.get(wanted)
        if project is None or project.is_deletion_requested:
            raise FlopsError(
                ErrorCode.MODEL_NOT_FOUND,
                f"Model {name!r} has no version {wanted}; it has: {', '.join(ordered)}.",
            )
        bundle = project.model.bundle if project.model is not None else None
        if bundle is None or project.environment is None or not self._blobs.has(bundle):
            raise FlopsError(
                ErrorCode.MODEL_NOT_FOUND,
                f"Version {wanted} of model {name!r} cannot be served: its files are not stored.",
                hint="Train it anew: `flops project create`.",
            )
        return project

    def _place(self, project: Project, record: Deployment, wanted: str | None) -> Node:
        nodes = self._orchestrator.nodes()
        address = record.node_id if any(node.id == record.node_id for node in nodes) else ""  # or was removed
        asked = wanted or address
        candidates = [node for node in nodes if asked in {"", node.id, node.name}]
        if wanted is not None and not candidates:
            known = ", ".join(node.name for node in nodes) or "none has joined yet"
            raise FlopsError(ErrorCode.NODE_NOT_FOUND, f"There is no node {wanted!r}; there are: {known}.")
        try:
            node_id = place_inference(project.sla, candidates)
        except FlopsError as exc:
            if wanted is not None or not asked:
                raise
            raise FlopsError(
                exc.code,
                f"Model {record.name!r} has its address on {record.node}, which cannot take it now: "
                f"{exc.message}",
                hint="Wait for the node, or name another one with --node; the address changes then.",
                details=exc.details,
            ) from exc
        return next(node for node in candidates if node.id == node_id)

    def _port_on(self, node: Node, record: Deployment, wanted: int | None) -> tuple[int, bool]:
        """The port to serve at, and whether another one will do as well."""
        has_address = record.port > 0 and record.node_id == node.id
        if wanted is None and not has_address:
            return self._free_port(node.id, record.name, first=self._options.inference_port), True
        port = wanted or record.port
        for other in self._others(record.name):
            if any(launch.port == port and launch.node_id == node.id for launch in other.launched):
                message = f"Port {port} of {node.name} has model {other.name!r}."
                raise FlopsError(ErrorCode.PORT_OCCUPIED, message, hint="Choose another port with --port.")
        return port, False

    def _free_port(self, node_id: str, name: str, *, first: int) -> int:
        """The first port from `first` on that no other model has on a node."""
        taken = {record.port for record in self._others(name) if record.node_id == node_id}
        taken |= {x.port for record in self._others(name) for x in record.launched if x.node_id == node_id}
        return next(port for port in range(first, 65_536) if port not in taken)

    def _others(self, name: str) -> Sequence[Deployment]:
        return [record for record in self._store.deployments() if record.name != name]


def is_launch(service_id: str, project_id: str) -> bool:
    """Whether a service is a deployed model's, rather than its project's own inference service."""
    kind = ServiceKind.INFERENCE.value
    return service_id.startswith(f"{kind}-") and service_id != make_service_id(kind, project_id)


def _stop(orchestrator: Orchestrator, service: Service) -> None:
    if service.should_run and not service.status.state.is_final:
        orchestrator.stop_service(service.spec.id)


def _is_same(running: Launch, wanted: Launch) -> bool:
    """Whether what runs does what is wanted: the same version, at that address."""
    is_there = running.node_id == wanted.node_id and (running.port == wanted.port or wanted.may_move)
    return running.version == wanted.version and is_there


def _version_of(project: Project) -> str:
    return project.model.version if project.model is not None else ""


def _rank(version: str) -> tuple[int, str]:
    """Versions of MLflow's registry are numbers, written as text."""
    return (int(version) if version.isdecimal() else 0, version)


def _preparation(change: ServiceChanged) -> str:
    return change.detail if change.state is ServiceState.PREPARING else ""


def _unexplained(change: ServiceChanged) -> Failure:
    code = "" if change.exit_code is None else f" (exit code {change.exit_code})"
    message = f"The inference service on {change.node} ended unexpectedly{code}. {change.detail}".strip()
    return Failure.model_validate(FlopsError(ErrorCode.SERVICE_FAILED, message).to_dict())


def _not_deployed(name: str) -> FlopsError:
    return FlopsError(ErrorCode.NOT_DEPLOYED, f"Model {name!r} is not deployed.")
