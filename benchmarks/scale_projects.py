"""Measures what projects cost the control plane when many run at once.

Run from the root of the repository: ``.venv/bin/python benchmarks/scale_projects.py``, or ``make
bench-scale_projects``. Manager, cluster orchestrator and their databases are real, in this process; a node
that is played does at once what it is asked to: it builds, starts an aggregator and two learners, tells of
three rounds, and serves the model. All projects are submitted together. Told is the processor time of this
process by project, from the first submission until the last model is served.
"""

from __future__ import annotations

import queue
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
from harness import Figure, Report, arguments, cpu_s
from plot import Line, draw, exponent

from flops.adapters.sql_cluster_store import SqlClusterStore
from flops.adapters.sql_store import SqlProjectStore
from flops.adapters.system_clock import SystemClock
from flops.core.cluster import (
    IMAGE_BUILDER_ADDON,
    LEARNER_ADDON,
    ServiceKind,
    ServiceSpec,
    ServiceState,
    ServiceStatus,
)
from flops.core.ids import ProjectId, ServiceId, make_service_id
from flops.core.project import Participant, Round, Stage, TrainedModel
from flops.orchestrator.cluster import ClusterOrchestrator, NodeSession
from flops.testing.projects import PlayedCluster, node_with, sla_with
from flops.wire.node import (
    ActorEventReport,
    FromCluster,
    FromNode,
    Hello,
    ServiceChanged,
    StartService,
    StopService,
)

LEARNERS, ROUNDS = 2, 3
PATIENCE_S = 600.0
PICTURE = Path(__file__).parents[1] / "docs" / "plots" / "projects.svg"


class QuickNode:
    """A node whose services do at once what is expected of them.

    Args:
        cluster: engine and stores of the projects.
        orchestrator: the cluster that it joins.
    """

    def __init__(self, cluster: PlayedCluster, orchestrator: ClusterOrchestrator) -> None:
        self._cluster = cluster
        self._orchestrator = orchestrator
        self._commands: queue.SimpleQueue[FromCluster | None] = queue.SimpleQueue()
        self._lines: Counter[str] = Counter()
        self._started: Counter[str] = Counter()  # learners by project
        node = node_with("quick", addons=(LEARNER_ADDON, IMAGE_BUILDER_ADDON), memory_mb=0)
        hello = Hello(
            node_id=node.id, name=node.name, facts=node.facts, addons=node.addons, data_tags=node.data_tags
        )
        self._session: NodeSession = orchestrator.connect(hello, self)
        self._thread = threading.Thread(target=self._obey, name="quick-node", daemon=True)
        self._thread.start()

    def send(self, message: FromCluster) -> None:
        """Take a command."""
        self._commands.put(message)

    def close(self, _reason: str = "") -> None:
        """End the thread."""
        self._commands.put(None)

    def _obey(self) -> None:
        while (command := self._commands.get()) is not None:
            if isinstance(command, StartService):
                self._run(command.spec)
            elif isinstance(command, StopService):
                self._report(ServiceId(command.service_id), ServiceState.STOPPED)

    def _run(self, spec: ServiceSpec) -> None:
        self._report(spec.id, ServiceState.RUNNING)
        project_id = ProjectId(spec.project_id)
        match spec.kind:
            case ServiceKind.BUILDER:
                environment = self._cluster.environment(project_id).model_dump(mode="json")
                self._tell(spec.id, "environment_locked", environment=environment)
                self._report(spec.id, ServiceState.COMPLETED)
            case ServiceKind.AGGREGATOR | ServiceKind.INFERENCE:
                self._tell(spec.id, "listening", address="127.0.0.1:5000")
            case ServiceKind.LEARNER:
                self._started[project_id] += 1
                if self._started[project_id] == LEARNERS:
                    self._train(project_id)

    def _train(self, project_id: ProjectId) -> None:
        aggregator = make_service_id(ServiceKind.AGGREGATOR.value, project_id)
        learners = [make_service_id(ServiceKind.LEARNER.value, project_id, n + 1) for n in range(LEARNERS)]
        for learner in learners:
            self._tell(aggregator, "learner_joined", learner=learner, node="quick", rows=50)
        parts = tuple(Participant(learner=learner, node="quick", rows=50, fit_s=1.0) for learner in learners)
        for number in range(1, ROUNDS + 1):
            self._tell(aggregator, "round_started", round=number, rounds=ROUNDS, learners=learners)
            record = Round(number=number, accuracy=0.9, loss=0.1, participants=parts)
            told = record.model_dump(mode="json")
            self._tell(aggregator, "round_completed", rounds=ROUNDS, record=told)
        model = TrainedModel(
            experiment_id="1",
            run_id="r",
            model_uri="models:/m/1",
            name=f"flops-{project_id}",
            version="1",
            round=1,
            bundle=self._cluster.blobs.put(b"model"),
        )
        self._tell(aggregator, "training_completed", model=model.model_dump(mode="json"))
        self._report(aggregator, ServiceState.COMPLETED)

    def _report(self, service_id: ServiceId, state: ServiceState) -> None:
        self._say(ServiceChanged(status=ServiceStatus(service_id=service_id, state=state)))

    def _tell(self, service_id: ServiceId, kind: str, **fields: object) -> None:
        self._lines[service_id] += 1
        event = {"kind": kind, "time_s": 0.0, **fields}
        self._say(ActorEventReport(service_id=service_id, line=self._lines[service_id], event=event))

    def _say(self, message: FromNode) -> None:
        self._orchestrator.receive(self._session, message)


def measure(count: int) -> tuple[float, float]:
    """Seconds of processor time for a project, and projects in a second, when so many run at once."""
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as folder:
        orchestrator = ClusterOrchestrator(SqlClusterStore(Path(folder) / "cluster.db"), SystemClock())
        store = SqlProjectStore(Path(folder) / "projects.db")
        cluster = PlayedCluster(store=store, orchestrator=orchestrator)
        node = QuickNode(cluster, orchestrator)
        cluster.engine.start()
        try:
            process, began_s = psutil.Process(), time.monotonic()
            before_s = cpu_s(process)
            _complete(cluster, [cluster.engine.submit(sla_with()).id for _ in range(count)])
            return (cpu_s(process) - before_s) / count, count / (time.monotonic() - began_s)
        finally:
            cluster.engine.close()
            node.close()


def _complete(cluster: PlayedCluster, projects: Sequence[ProjectId]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    for project_id in projects:
        while (project := cluster.engine.get(project_id)).stage is not Stage.COMPLETED:
            if project.stage.is_final or time.monotonic() > deadline_s:
                raise SystemExit(f"{project.stage.value}: {project.doing}\n{cluster.story(project_id)}")
            time.sleep(0.02)


def main() -> None:
    """Print the table, and draw the plot."""
    options = arguments(__doc__)
    counts, runs = ([10, 30, 100, 300], 3) if not options.smoke else ([3], 1)
    report = Report("scale_projects", ("projects at once", "processor for one, s", "projects in a second"))
    line = Line("control plane", counts, [])
    for count in counts:
        pairs = [measure(count) for _ in range(runs)]
        cpu, rate = (Figure.of(values) for values in zip(*pairs, strict=True))
        line.ys.append(cpu.median)
        report.add([str(count), cpu.text(), rate.text()], projects=float(count), cpu_s=cpu, rate=rate)
    if len(counts) < 2:
        report.print()
        return
    draw(PICTURE, "Projects at once", "projects at once", "processor for one, s", [line])
    report.print(f"What one takes grows as projects^{exponent(line):.2f}.")


if __name__ == "__main__":
    main()
