"""Nodes that join while a project trains, from the cluster's report to the learner that is started."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flops.adapters.memory_orchestrator import MemoryOrchestrator
from flops.core.cluster import Node
from flops.core.ids import ProjectId, ServiceId
from flops.core.project import Stage
from flops.errors import ErrorCode
from flops.testing.projects import HandClock, PlayedCluster, node_with, played_cluster, sla_with
from flops.testing.waiting import until


@pytest.fixture
def cluster() -> Iterator[PlayedCluster]:
    with played_cluster() as cluster:
        yield cluster


def train(cluster: PlayedCluster, *, max_clients: int = 3) -> ProjectId:
    """A project with two learners in its first round."""
    project_id = cluster.engine.submit(sla_with(max_clients=max_clients)).id
    cluster.build(project_id)
    aggregator = cluster.listen(project_id)
    cluster.join_learners(project_id)
    cluster.orchestrator.tell(aggregator, "round_started", round=1, rounds=3, learners=["a"])
    cluster.wait(project_id, lambda p: p.training is not None and p.training.round_now == 1)
    return project_id


def config_of(cluster: PlayedCluster, service: str) -> dict[str, object]:
    (found,) = [s.spec for s in cluster.orchestrator.services() if s.spec.id == service]
    return {key: found.config[key] for key in ("aggregator", "part", "parts")}


def test_a_node_that_joins_gets_a_learner(cluster: PlayedCluster) -> None:
    project_id = train(cluster)
    cluster.orchestrator.join(node_with("gamma"))
    learner = cluster.wait_for_service(f"learner-{project_id}-3")
    assert config_of(cluster, learner) == {"aggregator": "127.0.0.1:5000", "part": 0, "parts": 1}
    assert "gamma is taken in." in cluster.story(project_id)
    cluster.orchestrator.join(node_with("delta"))
    cluster.train(project_id)
    cluster.finish_training(project_id)
    cluster.serve(project_id)
    done = cluster.wait(project_id, lambda p: p.stage is Stage.COMPLETED and len(p.services) == 1)
    assert done.placement is not None
    assert len(done.placement.learners) == 3
    until(lambda: cluster.store.pending_effects() == [])


def test_a_restart_at_any_moment_neither_loses_nor_repeats_a_late_learner(cluster: PlayedCluster) -> None:
    project_id = train(cluster)
    cluster.restart()
    cluster.orchestrator.join(node_with("gamma"))
    cluster.wait(project_id, lambda p: p.placement is not None and len(p.placement.learners) == 3)
    cluster.restart()
    cluster.wait_for_service(f"learner-{project_id}-3")
    cluster.restart()
    kinds = [line.kind for line in cluster.engine.history(project_id)]
    assert kinds.count("node_taken_in") == 1
    learners = [s.spec.id for s in cluster.orchestrator.services() if s.spec.id.startswith("learner-")]
    assert len(learners) == 3


def test_a_stop_ends_a_late_learner_and_the_search(cluster: PlayedCluster) -> None:
    project_id = train(cluster)
    cluster.orchestrator.join(node_with("gamma"))
    cluster.wait_for_service(f"learner-{project_id}-3")
    cluster.engine.stop(project_id)
    cluster.wait(project_id, lambda p: p.stage is Stage.STOPPED)
    states = {s.status.state.is_final for s in cluster.orchestrator.services(project_id)}
    assert states == {True}
    until(lambda: cluster.store.pending_effects() == [])


class _Ghost(MemoryOrchestrator):
    """A cluster from which a node is removed between being found and being used."""

    def nodes(self) -> list[Node]:
        return [*super().nodes(), node_with("ghost")]


def test_a_node_that_is_removed_at_once_fails_its_learner_and_not_the_project() -> None:
    with played_cluster(orchestrator=_Ghost(HandClock())) as cluster:
        single = {"min_available_clients": 2, "min_fit_clients": 1, "min_evaluate_clients": 1}
        project_id = cluster.engine.submit(sla_with(max_clients=3, **single)).id
        cluster.build(project_id)
        aggregator = cluster.listen(project_id)
        cluster.join_learners(project_id)
        cluster.orchestrator.tell(aggregator, "round_started", round=1, rounds=3, learners=["a"])
        learner = ServiceId(f"learner-{project_id}-3")
        project = cluster.wait(project_id, lambda p: learner in p.failed_learners)
        assert project.stage is Stage.TRAINING
        assert learner not in project.services
        assert project.service_failures[learner].code == ErrorCode.NODE_NOT_FOUND
