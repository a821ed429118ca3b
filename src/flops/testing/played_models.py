"""Projects that have trained versions of one model, on a cluster that the test plays, and its deployment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flops.core.cluster import ServiceKind, ServiceState
from flops.core.deployment import Deployment
from flops.core.ids import ProjectId, ServiceId
from flops.core.project import Stage
from flops.core.sla import parse_project_sla
from flops.errors import ErrorCode, FlopsError
from flops.testing.projects import PlayedCluster, raw_sla
from flops.testing.waiting import until

MODEL = "digits"


class PlayedModels:
    """A cluster on which projects have trained versions of one model, and no version is deployed yet.

    Args:
        cluster: a started one.
        versions: how many projects have trained; each of them registered a version, from 1 on.
    """

    def __init__(self, cluster: PlayedCluster, versions: int = 2) -> None:
        self.cluster = cluster
        self.projects = [self.train(str(number + 1)) for number in range(versions)]

    def train(self, version: str, name: str | None = MODEL) -> ProjectId:
        """Play a project whole, that registers a version of a model."""
        cluster = self.cluster
        sla = {**raw_sla(), "model_name": name, "post_training_steps": []}
        project_id = cluster.engine.submit(parse_project_sla(sla)).id
        cluster.wait(project_id, lambda p: p.placement is not None)
        if cluster.engine.get(project_id).environment is None:
            cluster.build(project_id)
        cluster.listen(project_id)
        cluster.join_learners(project_id)
        cluster.train(project_id)
        cluster.finish_training(project_id, version)
        cluster.wait(project_id, lambda p: p.stage is Stage.COMPLETED and not p.services)
        return project_id

    def deploy(self, **wanted: Any) -> Deployment:
        """Have the model deployed."""
        return self.cluster.engine.deployments.deploy(MODEL, **wanted)

    @property
    def record(self) -> Deployment:
        """Where the model stands."""
        return self.cluster.engine.deployments.get(MODEL)

    def answer(self, deployment: Deployment) -> ServiceId:
        """Let the starting version answer, and wait until that is known."""
        launch = deployment.starting
        assert launch is not None
        service_id = self.cluster.wait_for_service(launch.service_id)
        self.cluster.orchestrator.report(service_id, ServiceState.RUNNING)
        self.tell_listening(service_id, launch.port)
        self.until(lambda d: d.serving is not None and d.serving.service_id == service_id)
        return service_id

    def tell_listening(self, service_id: ServiceId, port: int) -> None:
        """Play a service that listens."""
        self.cluster.orchestrator.tell(service_id, "listening", address=f"10.0.0.1:{port}")

    def fail(self, service_id: ServiceId, code: ErrorCode, message: str = "It is broken.") -> None:
        """Play a service that tells why it ends, and is started again by its node."""
        error = FlopsError(code, message).to_dict()
        self.cluster.orchestrator.tell(service_id, "failed", error=error)
        self.cluster.orchestrator.report(service_id, ServiceState.RESTARTING, error=error, restarts=1)

    def until(self, is_true: Callable[[Deployment], bool]) -> Deployment:
        """Wait until something holds for the model's record; returns that."""
        until(lambda: is_true(self.record), f"the deployment, now {self.record!r}")
        return self.record

    def state_of(self, service_id: str) -> ServiceState:
        """Where a service stands."""
        services = self.cluster.orchestrator.services()
        return next(s.status.state for s in services if s.spec.id == service_id)

    def running(self) -> set[str]:
        """The inference services that run, or are to."""
        services = self.cluster.orchestrator.services()
        return {
            s.spec.id
            for s in services
            if s.spec.kind is ServiceKind.INFERENCE and not s.status.state.is_final
        }
