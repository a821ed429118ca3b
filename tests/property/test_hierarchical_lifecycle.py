"""What holds for every hierarchical project, whatever its aggregators, clusters and learners do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flops.core import events as life
from flops.core.cluster import ServiceState
from flops.core.effects import EffectKind
from flops.core.ids import Digest, EnvironmentKey, NodeId, ProjectId, ServiceId
from flops.core.lifecycle import new_project, step
from flops.core.project import (
    ClusterPlacement,
    Environment,
    Failure,
    Placement,
    Project,
    Repository,
    Round,
    Stage,
)
from flops.testing.projects import sla_with

NODE = NodeId("n1")
CLUSTERS = tuple(
    ClusterPlacement(name=name, aggregator=NODE, learners=(NODE, NODE)) for name in ("east", "west")
)
BEGINNING = (
    life.Submitted(),
    life.RepositoryResolved(
        repository=Repository(
            commit="c" * 40, bundle=Digest("b"), dependency_file="f", environment_key=EnvironmentKey("k")
        ),
        environment=Environment(key=EnvironmentKey("k"), lock=Digest("l"), model_lock=Digest("m")),
    ),
    life.PlacementDecided(
        placement=Placement(aggregator=NODE, learners=(NODE,) * 4, clusters=CLUSTERS), nodes={"n1": "alpha"}
    ),
    life.AggregatorListening(service_id=ServiceId("aggregator-p1"), address="root:1"),
)
LATE = st.builds(
    life.LateNode,
    id=st.sampled_from([NodeId(f"n{number}") for number in range(2, 6)]),
    name=st.just("late"),
    cluster=st.sampled_from(["", "east", "west"]),
)
AGGREGATORS = st.sampled_from(["aggregator-p1", "aggregator-p1-1", "aggregator-p1-2", "aggregator-p1-2-r2"])
LEARNERS = st.sampled_from([f"learner-p1-{number}{tail}" for number in range(1, 5) for tail in ("", "-r2")])
ANY = st.one_of(AGGREGATORS, LEARNERS)
NUMBERS = st.integers(min_value=1, max_value=6)
FAILURES = st.builds(
    Failure,
    code=st.sampled_from(["user_code_failed", "unreachable", "too_few_learners"]),
    message=st.just("No."),
)
EVENTS = st.one_of(
    st.builds(life.AggregatorListening, service_id=AGGREGATORS, address=st.sampled_from(["h:1", "h:2"])),
    st.builds(life.LearnerJoined, learner=ANY, node=st.just("alpha")),
    st.builds(life.LearnerLeft, learner=ANY, node=st.just("alpha"), reason=st.just("away")),
    st.builds(
        life.LearnerFailed,
        learner=ANY,
        node=st.just("alpha"),
        round=NUMBERS,
        phase=st.just("train"),
        failure=FAILURES,
    ),
    st.builds(life.RoundStarted, round=NUMBERS, rounds=st.just(3), aggregator=AGGREGATORS),
    st.builds(
        life.RoundCompleted,
        rounds=st.just(3),
        record=st.builds(Round, number=NUMBERS),
        aggregator=AGGREGATORS,
    ),
    st.builds(life.NodesTakenIn, nodes=st.lists(LATE, min_size=1, max_size=3).map(tuple)),
    st.builds(life.ServiceTold, service_id=ANY, node=st.just("alpha"), failure=FAILURES),
    st.builds(
        life.ServiceChanged,
        service_id=ANY,
        node=st.just("alpha"),
        state=st.sampled_from(list(ServiceState)),
        failure=st.none() | FAILURES,
    ),
)


@given(events=st.lists(EVENTS, max_size=40), needed=st.integers(min_value=1, max_value=2))
def test_whatever_happens_the_project_stays_whole(events: list[life.LifecycleEvent], needed: int) -> None:
    sla = sla_with(mode="hierarchical", training_cycles=2, min_clusters=needed, max_clients=3)
    project = new_project(ProjectId("p1"), sla, 1.0)
    for event in BEGINNING:
        project = step(project, event, 1.0).project
    used = set(project.services)
    for number, event in enumerate(events, start=1):
        delivered = event.model_copy(update={"seq": number})
        result = step(project, delivered, 2.0)
        started = set(result.project.services) - set(project.services)
        assert not started & used, "an id is used twice"
        used |= started
        project = result.project
        assert not step(project, delivered, 3.0).is_changed or not result.is_changed
        for effect in result.effects:
            if effect.kind is EffectKind.START_LEARNERS:
                cluster = effect.payload["cluster"]
                assert cluster in {c.name for c in CLUSTERS}
        assert_whole(project, needed)


def assert_whole(project: Project, needed: int) -> None:
    training = project.training
    assert training is not None
    assert [cluster.name for cluster in training.clusters] == ["east", "west"]
    assert project.placement is not None
    for cluster, placed in zip(training.clusters, project.placement.clusters, strict=True):
        assert len(cluster.learners) == len(placed.learners) >= 2
        assert len(set(cluster.learners) - set(project.failed_learners)) <= 3
    together = [node for placed in project.placement.clusters for node in placed.learners]
    assert list(project.placement.learners) == together
    present = {learner for cluster in training.clusters for learner in cluster.learners}
    assert len(present) == len(together)
    assert len(project.services) == len(set(project.services))
    left = [cluster for cluster in training.clusters if not cluster.is_given_up]
    if project.stage is Stage.TRAINING:
        assert len(left) >= needed
        assert "aggregator-p1" in project.services
        assert set(project.failed_learners) <= present
    assert Project.model_validate_json(project.model_dump_json(by_alias=True)) == project
