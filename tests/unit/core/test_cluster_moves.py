"""The rules of a hierarchical project's life: a root aggregator, clusters' aggregators, learners."""

from __future__ import annotations

from typing import Any

from flops.core import events as life
from flops.core.change import Step
from flops.core.cluster import ServiceState
from flops.core.effects import Effect, EffectKind
from flops.core.ids import Digest, EnvironmentKey, NodeId, ProjectId, ServiceId
from flops.core.lifecycle import new_project, step
from flops.core.project import (
    ClusterPlacement,
    ClusterState,
    Environment,
    Failure,
    Placement,
    ProjectEvent,
    Repository,
    Round,
    Stage,
    TrainedModel,
)
from flops.testing.projects import sla_with

REPOSITORY = Repository(
    commit="c" * 40, bundle=Digest("b"), dependency_file="conda.yml", environment_key=EnvironmentKey("k")
)
ENVIRONMENT = Environment(key=EnvironmentKey("k"), lock=Digest("l"), model_lock=Digest("m"))
N1, N2 = NodeId("n1"), NodeId("n2")
EAST = ClusterPlacement(name="east", aggregator=N1, learners=(N1, N1))
WEST = ClusterPlacement(name="west", aggregator=N2, learners=(N2, N2))
FAILURE = Failure(code="too_few_learners", message="2 learners are needed.")
MODEL = TrainedModel(experiment_id="1", run_id="r", model_uri="u", name="m", version="1", round=2)
ROOT, OF_EAST, OF_WEST = "aggregator-p1", "aggregator-p1-1", "aggregator-p1-2"


class Tree:
    """A hierarchical project with its placement decided, two cycles of three rounds."""

    def __init__(
        self, *clusters: ClusterPlacement, left_out: dict[str, str] | None = None, **training: Any
    ) -> None:
        sla = sla_with(mode="hierarchical", training_cycles=2, **training)
        self.project = new_project(ProjectId("p1"), sla, 1.0)
        self.effects: list[Effect] = []
        self.history: list[ProjectEvent] = []
        placement = Placement(
            aggregator=N1,
            learners=tuple(node for cluster in clusters for node in cluster.learners),
            clusters=clusters,
            left_out=left_out or {},
        )
        self.happen(
            life.Submitted(),
            life.RepositoryResolved(repository=REPOSITORY, environment=ENVIRONMENT),
            life.PlacementDecided(placement=placement, nodes={"n1": "alpha", "n2": "beta"}),
        )

    def happen(self, *events: life.LifecycleEvent) -> Step:
        for event in events:
            result = step(self.project, event, 2.0)
            self.project = result.project
            self.effects += result.effects
            self.history += result.history
        return result

    def listen(self, aggregator: str, address: str) -> Step:
        return self.happen(life.AggregatorListening(service_id=ServiceId(aggregator), address=address))

    def begin(self) -> Tree:
        self.listen(ROOT, "root:1")
        self.listen(OF_EAST, "east:1")
        self.listen(OF_WEST, "west:1")
        for learner in ("learner-p1-1", "learner-p1-2", "learner-p1-3", "learner-p1-4"):
            self.happen(life.LearnerJoined(learner=learner, node="alpha", rows=50))
        for aggregator in (OF_EAST, OF_WEST):
            self.happen(life.LearnerJoined(learner=aggregator, node="alpha", rows=100))
        return self

    def payloads(self, kind: EffectKind) -> list[dict[str, Any]]:
        return [effect.payload for effect in self.effects if effect.kind is kind]

    def stopped(self) -> set[str]:
        return {
            service for payload in self.payloads(EffectKind.STOP_SERVICES) for service in payload["services"]
        }

    def told(self, kind: str) -> list[str]:
        return [event.message for event in self.history if event.kind == kind]

    @property
    def clusters(self) -> tuple[ClusterState, ...]:
        assert self.project.training is not None
        return self.project.training.clusters


def test_the_root_starts_clusters_and_each_of_them_its_learners() -> None:
    tree = Tree(EAST, WEST)
    assert tree.project.services == (ROOT,)
    tree.listen(ROOT, "root:1")
    assert tree.project.services == (ROOT, OF_EAST, OF_WEST)
    assert tree.payloads(EffectKind.START_CLUSTERS) == [{"address": "root:1", "attempt": 1}]
    assert tree.payloads(EffectKind.START_LEARNERS) == []
    tree.listen(OF_WEST, "west:1")
    assert tree.project.services[3:] == ("learner-p1-3", "learner-p1-4")
    started = {"address": "west:1", "generation": 1, "cluster": "west"}
    assert tree.payloads(EffectKind.START_LEARNERS) == [started]
    assert not tree.listen(OF_WEST, "west:1").is_changed  # told again after a restart
    assert not tree.listen(ROOT, "root:1").is_changed


def test_learners_of_another_root_have_ids_that_no_cluster_has_used() -> None:
    tree = Tree(EAST, WEST).begin()
    tree.listen(OF_WEST, "west:2")
    replaced = {"learner-p1-3-r2", "learner-p1-4-r2"}
    assert replaced <= set(tree.project.services)
    tree.listen(ROOT, "root:2")
    assert tree.payloads(EffectKind.START_CLUSTERS)[-1] == {"address": "root:2", "attempt": 3}
    tree.listen(f"{OF_WEST}-r3", "west:3")
    assert {"learner-p1-3-r3", "learner-p1-4-r3"} <= set(tree.project.services)


def test_one_cluster_and_those_left_out_are_said() -> None:
    tree = Tree(EAST, left_out={"west": "It has no rows."})
    assert tree.told("one_cluster_only") == [
        "There is one cluster only, east: hierarchical training goes on with one cluster's aggregator "
        "below the root."
    ]
    assert tree.told("cluster_left_out") == ["The cluster west is left out: It has no rows."]
    assert Tree(EAST, WEST).told("one_cluster_only") == []


def test_cycles_clusters_and_rounds_are_told() -> None:
    tree = Tree(EAST, WEST).begin()
    assert tree.told("cluster_joined")[0] == "The cluster east has joined the root aggregator with 100 rows."
    tree.happen(life.RoundStarted(round=1, rounds=2, learners=(OF_EAST, OF_WEST), aggregator=ROOT))
    assert tree.told("round_started") == ["Cycle 1 of 2 begins with 2 clusters."]
    tree.happen(life.RoundStarted(round=2, rounds=3, learners=("learner-p1-1",), aggregator=OF_EAST))
    assert tree.project.doing == "Trains cycle 1 of 2: east in round 2 of 3."
    own = Round(number=2, accuracy=0.5, duration_s=1.0, metrics={"bad": float("nan")})
    done = life.RoundCompleted(rounds=3, record=own, aggregator=OF_EAST)
    tree.happen(done)
    assert tree.told("cluster_round_completed") == [
        "Cycle 1, east: round 2 of 3: 0.5000 accuracy, 0 learners, 1.00 s."
    ]
    assert not tree.happen(done).is_changed
    assert tree.project.training is not None
    assert tree.project.training.history == ()  # only cycles have the root's model
    tree.happen(life.RoundCompleted(rounds=2, record=Round(number=1, accuracy=0.6), aggregator=ROOT))
    assert tree.told("round_completed") == ["Cycle 1 of 2: 0.6000 accuracy, 0 clusters, 0.00 s."]
    tree.happen(life.TrainingCompleted(model=MODEL))
    assert tree.stopped() == {ROOT, OF_EAST, OF_WEST, *(f"learner-p1-{number}" for number in range(1, 5))}


def test_a_cluster_whose_connection_ends_is_waited_for() -> None:
    tree = Tree(EAST, WEST).begin()
    tree.happen(life.LearnerLeft(learner=OF_WEST, node="beta", reason="its connection ended"))
    assert [cluster.is_joined for cluster in tree.clusters] == [True, False]
    assert "Cycles go on without it" in tree.told("cluster_left")[0]
    tree.happen(life.LearnerJoined(learner=OF_WEST, node="beta", rows=100))
    assert [cluster.is_joined for cluster in tree.clusters] == [True, True]
    assert tree.stopped() == set()


def test_a_cluster_that_fails_for_good_is_left_out_alone() -> None:
    tree = Tree(EAST, WEST).begin()
    tree.happen(life.ServiceTold(service_id=ServiceId(OF_WEST), node="beta", failure=FAILURE))
    assert tree.project.stage is Stage.TRAINING
    assert tree.stopped() == {OF_WEST, "learner-p1-3", "learner-p1-4"}
    assert "west is left out" in tree.told("cluster_left_out")[0]
    tree.happen(life.ServiceTold(service_id=ServiceId(OF_EAST), node="alpha", failure=FAILURE))
    assert tree.project.stage is Stage.FAILED
    assert tree.project.failure is not None
    assert tree.project.failure.code == "too_few_learners"


def test_fewer_clusters_than_needed_fail_the_project() -> None:
    tree = Tree(EAST, WEST, min_clusters=2).begin()
    failed = life.ServiceChanged(
        service_id=ServiceId(OF_WEST), node="beta", state=ServiceState.FAILED, failure=FAILURE
    )
    tree.happen(failed)
    assert tree.project.stage is Stage.FAILED


def test_learners_that_fail_for_good_count_in_their_own_cluster() -> None:
    broken = FAILURE.model_copy(update={"code": "user_code_failed"})
    tree = Tree(EAST, WEST, min_fit_clients=1, min_available_clients=2).begin()
    tree.happen(life.RoundStarted(round=1, rounds=3, aggregator=OF_EAST))
    tree.happen(life.ServiceTold(service_id=ServiceId("learner-p1-1"), node="alpha", failure=broken))
    assert not any(cluster.is_given_up for cluster in tree.clusters)
    tree.happen(life.ServiceTold(service_id=ServiceId("learner-p1-2"), node="alpha", failure=broken))
    assert [cluster.is_given_up for cluster in tree.clusters] == [True, False]
    assert tree.project.stage is Stage.TRAINING


def test_learners_are_replaced_when_their_aggregator_has_another_address() -> None:
    tree = Tree(EAST, WEST).begin()
    tree.listen(OF_WEST, "west:2")
    assert tree.stopped() == {"learner-p1-3", "learner-p1-4"}
    assert tree.clusters[1].learners == ("learner-p1-3-r2", "learner-p1-4-r2")
    assert tree.payloads(EffectKind.START_LEARNERS)[-1] == {
        "address": "west:2",
        "generation": 2,
        "cluster": "west",
    }


def test_clusters_are_replaced_when_the_root_has_another_address() -> None:
    tree = Tree(EAST, WEST).begin()
    tree.listen(ROOT, "root:2")
    assert tree.stopped() == {OF_EAST, OF_WEST, *(f"learner-p1-{number}" for number in range(1, 5))}
    assert [cluster.aggregator for cluster in tree.clusters] == [f"{OF_EAST}-r2", f"{OF_WEST}-r2"]
    assert tree.payloads(EffectKind.START_CLUSTERS)[-1] == {"address": "root:2", "attempt": 2}
    tree.listen(f"{OF_EAST}-r2", "east:2")
    assert tree.project.services[-2:] == ("learner-p1-1-r2", "learner-p1-2-r2")
