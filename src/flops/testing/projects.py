"""A manager on memory adapters, with a cluster whose nodes are played by the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.memory_orchestrator import MemoryOrchestrator
from flops.adapters.memory_repos import MemoryRepos
from flops.adapters.memory_store import MemoryProjectStore
from flops.adapters.system_clock import SystemClock
from flops.core.cluster import (
    IMAGE_BUILDER_ADDON,
    LEARNER_ADDON,
    Addon,
    AddonState,
    DataTag,
    Node,
    NodeFacts,
    ServiceState,
)
from flops.core.ids import Digest, EnvironmentKey, NodeId, ProjectId, ServiceId
from flops.core.project import Environment, Participant, Project, Round, TrainedModel
from flops.core.sla import ProjectSla, parse_project_sla
from flops.deployment_ports import ManagerStore
from flops.manager.engine import Engine
from flops.manager.images import ImageShelf
from flops.manager.options import EngineOptions
from flops.ports import Blobs
from flops.retention_ports import RegisteredImage, RegisteredImages
from flops.testing.linked_orchestrator import LinkedOrchestrator
from flops.tracker_port import Tracker

REPO_URL = "https://git.example/mnist"
DEADLINE_S = 20.0


class HandClock:
    """A clock that is moved by hand, and a little by each look."""

    def __init__(self) -> None:
        self._now_s = 1_000.0

    def now_s(self) -> float:
        """The time."""
        self._now_s += 0.001
        return self._now_s


def node_with(
    name: str,
    *,
    rows: int = 100,
    tag: str = "mnist",
    addons: tuple[str, ...] = (LEARNER_ADDON,),
    cores: int = 4,
    memory_mb: int = 16_000,
    is_connected: bool = True,
    **facts: Any,
) -> Node:
    """A node as tests need it: a healthy learner with 100 rows, unless said otherwise."""
    return Node(
        id=NodeId(f"id-{name}"),
        name=name,
        facts=NodeFacts(hostname=name, cpu_cores=cores, memory_mb=memory_mb, **facts),
        addons=tuple(Addon(name=addon, state=AddonState.HEALTHY) for addon in addons),
        data_tags=(DataTag(name=tag, rows=rows, size_bytes=rows * 10),) if rows else (),
        is_connected=is_connected,
    )


def with_columns(node: Node, columns: Mapping[str, str]) -> Node:
    """The node, with these columns under each of its tags."""
    tags = tuple(tag.model_copy(update={"columns": dict(columns)}) for tag in node.data_tags)
    return node.model_copy(update={"data_tags": tags})


def raw_sla(**training: Any) -> dict[str, Any]:
    """A project SLA as JSON: two learners, three rounds; the model is served."""
    return {
        "customerID": "Admin",
        "ml_repo_url": REPO_URL,
        "ml_model_flavor": "sklearn",
        "training_configuration": {
            "data_tags": ["mnist"],
            "training_rounds": 3,
            "min_available_clients": 2,
            "min_fit_clients": 2,
            "min_evaluate_clients": 2,
            **training,
        },
        "post_training_steps": ["build_image_for_trained_model", "deploy_trained_model_image"],
    }


def sla_with(**training: Any) -> ProjectSla:
    """The SLA of `raw_sla`."""
    return parse_project_sla(raw_sla(**training))


class NoImages:
    """Implements `flops.retention_ports.RegisteredImages`: a registry to which nobody pushes."""

    def names(self) -> list[str]:
        """None."""
        return []

    def describe(self, name: str) -> RegisteredImage:
        """Nothing."""
        return RegisteredImage(name, (), "", (), {}, 0.0)

    def forget(self, name: str) -> None:
        """Nothing to do."""

    def collect_garbage(self, since_s: float, among: Collection[Digest] | None = None) -> int:
        """Nothing to give back."""
        return 0


class PlayedCluster:
    """An engine, and the nodes' side of its projects.

    Args:
        store: what survives; a new one on memory when None.
        tracker: of the engine.
        blobs: bundles and locks; in memory when None.
        orchestrator: the cluster; one in memory when None.
        nodes_obey: see `MemoryOrchestrator`.
    """

    def __init__(
        self,
        *,
        store: ManagerStore | None = None,
        tracker: Tracker | None = None,
        blobs: Blobs | None = None,
        orchestrator: LinkedOrchestrator | None = None,
        nodes_obey: bool = True,
        **options: Any,
    ) -> None:
        self.clock = HandClock()
        self.store = store if store is not None else MemoryProjectStore()
        self.blobs: Blobs = blobs if blobs is not None else MemoryBlobs()
        self.repos = MemoryRepos(self.blobs)
        self.repos.add(REPO_URL, b"tree")
        self.orchestrator = orchestrator or MemoryOrchestrator(self.clock, nodes_obey=nodes_obey)
        self.tracker = tracker
        self.options = EngineOptions(
            **{"tracking_uri": "http://mlflow.example", "secret": b"secret", **options}
        )
        self.engine = self._new_engine()

    def join_two(self) -> None:
        """Let two learner nodes join, the first of them with the image-builder addon."""
        self.orchestrator.join(node_with("alpha", addons=(LEARNER_ADDON, IMAGE_BUILDER_ADDON), cores=8))
        self.orchestrator.join(node_with("beta"))

    def restart(self) -> None:
        """Replace the engine by a new one on the same stores, as after a kill."""
        self.engine.close()
        self.engine = self._new_engine()
        self.engine.start()

    def shelf(self, images: RegisteredImages | None = None, *, max_bytes: int = 10**12) -> ImageShelf:
        """Who looks after the images in a registry, or after none."""
        lock = self.engine.deployments.lock
        images = images if images is not None else NoImages()
        return ImageShelf(
            self.store, self.orchestrator, images, SystemClock(), max_bytes=max_bytes, deploying=lock
        )

    def wait(self, project_id: ProjectId, condition: Callable[[Project], bool]) -> Project:
        """Wait until the project meets a condition; fails the test at the deadline."""
        changed = threading.Event()
        end = self.engine.subscribe(lambda _project_id: changed.set())
        deadline_s = time.monotonic() + DEADLINE_S
        try:
            while True:
                changed.clear()
                project = self.engine.get(project_id)
                if condition(project):
                    return project
                assert time.monotonic() < deadline_s, f"{project!r}\n{self.story(project_id)}"
                changed.wait(1.0)
        finally:
            end()

    def wait_for_service(self, service_id: str) -> ServiceId:
        """Wait until the cluster was asked to run a service."""
        pause = threading.Event()
        for _ in range(int(DEADLINE_S / 0.005)):
            if any(service.spec.id == service_id for service in self.orchestrator.services()):
                return ServiceId(service_id)
            pause.wait(0.005)
        raise AssertionError(f"{service_id} was not started: {self.orchestrator.services()}")

    def story(self, project_id: ProjectId) -> str:
        """The history as text."""
        return "\n".join(f"{e.seq} {e.kind}: {e.message}" for e in self.engine.history(project_id))

    # What services do

    def build(self, project_id: ProjectId) -> None:
        """Play the builder."""
        builder = self.wait_for_service(f"builder-{project_id}")
        self.orchestrator.report(builder, ServiceState.RUNNING)
        self.orchestrator.tell(builder, "progress", message="Resolves the requirements.")
        self.orchestrator.tell(
            builder, "environment_locked", environment=self.environment(project_id).model_dump(mode="json")
        )
        self.orchestrator.report(builder, ServiceState.COMPLETED, exit_code=0)

    def environment(self, project_id: ProjectId) -> Environment:
        """The environment that the builder makes."""
        repository = self.engine.get(project_id).repository
        key = repository.environment_key if repository else EnvironmentKey("none")
        return Environment(
            key=key, lock=self.blobs.put(b"numpy==2.0.0"), model_lock=self.blobs.put(b"mlflow==3.0.0")
        )

    def listen(self, project_id: ProjectId, address: str = "127.0.0.1:5000") -> ServiceId:
        """Play the aggregator's start."""
        aggregator = self.wait_for_service(f"aggregator-{project_id}")
        self.orchestrator.report(aggregator, ServiceState.RUNNING)
        self.orchestrator.tell(aggregator, "listening", address=address)
        return aggregator

    def join_learners(self, project_id: ProjectId, count: int = 2, suffix: str = "") -> list[ServiceId]:
        """Play the learners' start, as the learners and the aggregator tell it."""
        learners = [
            self.wait_for_service(f"learner-{project_id}-{number + 1}{suffix}") for number in range(count)
        ]
        for learner in learners:
            self.orchestrator.report(learner, ServiceState.RUNNING)
            self.orchestrator.tell(
                ServiceId(f"aggregator-{project_id}"),
                "learner_joined",
                learner=learner,
                node="alpha",
                rows=50,
            )
        return learners

    def train(self, project_id: ProjectId, *, rounds: int = 3, first: int = 1) -> None:
        """Play the rounds from `first` on."""
        aggregator = ServiceId(f"aggregator-{project_id}")
        for number in range(first, rounds + 1):
            self.orchestrator.tell(aggregator, "round_started", round=number, rounds=rounds, learners=["a"])
            record = Round(
                number=number,
                accuracy=0.7 + number / 100,
                loss=1.0 / number,
                participants=(Participant(learner="a", node="alpha", rows=50),),
                duration_s=0.4,
            )
            self.orchestrator.tell(
                aggregator, "round_completed", rounds=rounds, record=record.model_dump(mode="json")
            )

    def finish_training(self, project_id: ProjectId, version: str = "1") -> None:
        """Play the aggregator's end; it registers the model as this version."""
        model = TrainedModel(
            experiment_id="1",
            run_id="run",
            model_uri="models:/m/1",
            name=self.engine.get(project_id).sla.model_name or f"flops-{project_id}",
            version=version,
            round=3,
            accuracy=0.73,
            loss=0.33,
            bundle=self.blobs.put(b"model"),
        )
        aggregator = ServiceId(f"aggregator-{project_id}")
        self.orchestrator.tell(aggregator, "training_completed", model=model.model_dump(mode="json"))
        self.orchestrator.report(aggregator, ServiceState.COMPLETED, exit_code=0)

    def serve(self, project_id: ProjectId, address: str = "127.0.0.1:8080") -> ServiceId:
        """Play the inference service."""
        inference = self.wait_for_service(f"inference-{project_id}")
        self.orchestrator.report(inference, ServiceState.RUNNING)
        self.orchestrator.tell(inference, "listening", address=address)
        return inference

    def play_to_the_end(self, project_id: ProjectId) -> None:
        """Play everything from the builder, if there is one, to the inference service."""
        self.wait(project_id, lambda p: p.placement is not None or p.stage.is_final)
        if self.engine.get(project_id).environment is None:
            self.build(project_id)
        self.listen(project_id)
        self.join_learners(project_id)
        self.train(project_id)
        self.finish_training(project_id)
        self.serve(project_id)

    def _new_engine(self) -> Engine:
        return Engine(
            self.store, self.orchestrator, self.repos, self.blobs, self.clock, self.options, self.tracker
        )


@contextmanager
def played_cluster(**arguments: Any) -> Iterator[PlayedCluster]:
    """A started engine with two nodes; closed at the end."""
    cluster = PlayedCluster(**arguments)
    cluster.join_two()
    cluster.engine.start()
    try:
        yield cluster
    finally:
        cluster.engine.close()
