"""What holds for every project, whatever happens to it, in whatever order, however often."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flops.core import events as life
from flops.core.change import Step
from flops.core.cluster import ServiceState
from flops.core.effects import Effect, EffectKind
from flops.core.ids import Digest, EnvironmentKey, NodeId, ProjectId, ServiceId
from flops.core.lifecycle import IllegalTransitionError, new_project, step
from flops.core.project import (
    Environment,
    Failure,
    Images,
    Placement,
    Project,
    ProjectEvent,
    Repository,
    Round,
    Stage,
    TrainedModel,
)
from flops.core.sla import Packaging
from flops.testing.projects import sla_with

REPOSITORY = Repository(
    commit="c" * 40, bundle=Digest("b"), dependency_file="conda.yml", environment_key=EnvironmentKey("k")
)
ENVIRONMENT = Environment(key=EnvironmentKey("k"), lock=Digest("l"), model_lock=Digest("m"))
PLACEMENT = Placement(
    aggregator=NodeId("n1"),
    learners=(NodeId("n1"), NodeId("n2")),
    builder=NodeId("n1"),
    inference=NodeId("n1"),
)
IMAGES = Images(aggregator="flops/p1@sha256:aa", learner="flops/p1@sha256:bb")
MODEL = TrainedModel(experiment_id="1", run_id="r", model_uri="u", name="m", version="1", round=1)
CODES = st.sampled_from(["user_code_failed", "internal", "unreachable", "no_matching_data", "out_of_memory"])
FAILURES = st.builds(Failure, code=CODES, message=st.just("It failed."))
SERVICES = st.sampled_from(
    [
        ServiceId(f"{name}")
        for name in (
            "builder-p1",
            "builder-p1-2",
            "aggregator-p1",
            "learner-p1-1",
            "learner-p1-2",
            "learner-p1-1-r2",
            "learner-p1-2-r2",
            "inference-p1",
        )
    ]
)
LEARNERS = st.sampled_from(["learner-p1-1", "learner-p1-2"])
NODE = st.just("alpha")
NODE_IDS = st.sampled_from([NodeId("n2"), NodeId("n3"), NodeId("n4")])
ADDRESSES = st.sampled_from(["h:1", "h:2"])
ROUNDS = st.integers(min_value=1, max_value=4)
NUMBERS = st.none() | st.floats(min_value=0, max_value=1)

OF_SERVICES = st.one_of(
    st.builds(life.EnvironmentLocked, environment=st.just(ENVIRONMENT), images=st.none() | st.just(IMAGES)),
    st.builds(life.AggregatorListening, service_id=st.just(ServiceId("aggregator-p1")), address=ADDRESSES),
    st.builds(life.TrainingStarted, tracking_url=st.sampled_from(["", "http://u"])),
    st.builds(life.LearnerJoined, learner=LEARNERS, node=NODE),
    st.builds(life.LearnerLeft, learner=LEARNERS, node=NODE, reason=st.just("away")),
    st.builds(
        life.LearnerFailed,
        learner=LEARNERS,
        node=NODE,
        round=ROUNDS,
        phase=st.just("train"),
        failure=FAILURES,
    ),
    st.builds(life.RoundStarted, round=ROUNDS, rounds=st.just(3)),
    st.builds(
        life.RoundCompleted,
        rounds=st.just(3),
        record=st.builds(Round, number=ROUNDS, accuracy=NUMBERS, loss=NUMBERS),
    ),
    st.builds(life.TrainingCompleted, model=st.just(MODEL)),
    st.builds(
        life.InferenceListening, service_id=st.just(ServiceId("inference-p1")), url=st.just("http://h:8080")
    ),
    st.builds(life.ServiceProgressed, service_id=SERVICES, node=NODE, message=st.just("Works.")),
    st.builds(life.ServiceTold, service_id=SERVICES, node=NODE, failure=FAILURES),
    st.builds(
        life.ServiceChanged,
        service_id=SERVICES,
        node=NODE,
        state=st.sampled_from(list(ServiceState)),
        failure=st.none() | FAILURES,
    ),
)
OF_THE_MANAGER = st.one_of(
    st.builds(life.Submitted),
    st.builds(
        life.RepositoryResolved, repository=st.just(REPOSITORY), environment=st.none() | st.just(ENVIRONMENT)
    ),
    st.builds(life.PlacementDecided, placement=st.just(PLACEMENT)),
    st.builds(
        life.NodesTakenIn,
        nodes=st.lists(st.builds(life.LateNode, id=NODE_IDS, name=st.just("late")), max_size=3).map(tuple),
    ),
    st.builds(life.ModelPackaged, image=st.sampled_from(["", "flops/p1@sha256:cc"])),
    st.builds(life.StepFailed, kind=st.sampled_from(list(EffectKind)), failure=FAILURES),
    st.builds(life.ServicesEnded, services=st.lists(SERVICES, max_size=3).map(tuple)),
)
OF_USERS = st.one_of(st.builds(life.StopRequested), st.builds(life.DeleteRequested))

# Whose result a project waits for, per stage.
DECISIVE = {
    Stage.BUILDING: "builder-p1",
    Stage.PLACING: "aggregator-p1",
    Stage.TRAINING: "aggregator-p1",
    Stage.DEPLOYING: "inference-p1",
}

# What brings a project on, so that runs reach every stage.
NEXT: dict[Stage, life.LifecycleEvent] = {
    Stage.RESOLVING: life.PlacementDecided(placement=PLACEMENT),
    Stage.BUILDING: life.EnvironmentLocked(environment=ENVIRONMENT, images=IMAGES),
    Stage.TRAINING: life.TrainingCompleted(model=MODEL),
    Stage.PACKAGING: life.ModelPackaged(),
    Stage.DEPLOYING: life.InferenceListening(service_id=ServiceId("inference-p1"), url="http://h:8080"),
}


class LifeMachine(RuleBasedStateMachine):
    """A project to which anything may happen."""

    def __init__(self) -> None:
        super().__init__()
        self.project = new_project(ProjectId("p1"), sla_with(min_fit_clients=1), 1.0)
        self.before = self.project
        self.history: list[ProjectEvent] = []
        self.effects: list[Effect] = []
        self.seq = 0
        self.past: list[life.LifecycleEvent] = []
        self.requested: set[str] = set()

    @initialize(packaging=st.sampled_from(Packaging))
    def submit(self, packaging: Packaging) -> None:
        training = self.project.sla.training_configuration.model_copy(update={"max_clients": 3})
        update = {"packaging": packaging, "training_configuration": training}
        sla = self.project.sla.model_copy(update=update)
        self.project = self.before = self.project.model_copy(update={"sla": sla})
        self.happen(life.Submitted())

    @rule(event=OF_SERVICES)
    def a_service_reports(self, event: life.LifecycleEvent) -> None:
        self.report(event)

    def report(self, event: life.LifecycleEvent) -> None:
        self.seq += 1
        self.happen(event.model_copy(update={"seq": self.seq}))

    @precondition(lambda self: self.project.stage in DECISIVE and self.project.placement is not None)
    @rule(state=st.sampled_from([ServiceState.COMPLETED, ServiceState.FAILED, ServiceState.LOST]))
    def the_awaited_service_ends(self, state: ServiceState) -> None:
        service = ServiceId(DECISIVE[self.project.stage])
        self.report(life.ServiceChanged(service_id=service, node="alpha", state=state))

    @rule(event=OF_THE_MANAGER)
    def the_manager_goes_on(self, event: life.LifecycleEvent) -> None:
        if isinstance(event, life.ServicesEnded):  # what the effect of a stop finds ended already
            event = life.ServicesEnded(services=tuple(s for s in event.services if s in self.requested))
        self.happen(event)

    @rule()
    def the_expected_happens(self) -> None:
        stage = self.project.stage
        if stage is Stage.RESOLVING and self.project.repository is None:
            self.happen(life.RepositoryResolved(repository=REPOSITORY))
        elif stage is Stage.PLACING:
            event: life.LifecycleEvent = life.AggregatorListening(
                service_id=ServiceId("aggregator-p1"), address="h:1"
            )
            placed = self.project.placement is not None
            self.happen(event if placed else life.PlacementDecided(placement=PLACEMENT))
        elif stage in NEXT:
            self.happen(NEXT[stage])

    @precondition(lambda self: self.seq % 5 == 4)
    @rule(event=OF_USERS)
    def a_user_asks(self, event: life.LifecycleEvent) -> None:
        self.happen(event)

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def an_event_is_delivered_again(self, data: st.DataObject) -> None:
        cluster_events = [event for event in self.past if event.seq]
        repeated = data.draw(st.sampled_from([*cluster_events, self.past[-1]]))
        try:
            result = step(self.project, repeated, 99.0)
        except IllegalTransitionError:
            assert repeated.seq == 0
            return
        assert (result.project, result.effects, result.history) == (self.project, (), ()), repeated

    def happen(self, event: life.LifecycleEvent) -> None:
        try:
            result = step(self.project, event, float(len(self.past) + 2))
        except IllegalTransitionError:
            return
        self.check(event, result)
        self.before, self.project = self.project, result.project
        self.history += result.history
        self.effects += result.effects
        if result.is_changed:
            self.past.append(event)

    def check(self, event: life.LifecycleEvent, result: Step) -> None:
        old, new = self.project, result.project
        if not result.is_changed:
            assert (new, result.effects, result.history) == (old, (), ())
            return
        assert new.version == old.version + 1
        assert new.stage is old.stage or not old.stage.is_final, event
        assert list(Stage).index(new.stage) >= list(Stage).index(old.stage)
        for effect in result.effects:
            if effect.kind is EffectKind.STOP_SERVICES:
                self.requested |= set(effect.payload["services"])

    @invariant()
    def history_and_effects_are_gapless(self) -> None:
        assert [line.seq for line in self.history] == list(range(1, self.project.history_length + 1))
        keys = [effect.key for effect in self.effects]
        assert len(keys) == len(set(keys))

    @invariant()
    def ends_are_told_and_clean(self) -> None:
        project = self.project
        assert (project.failure is not None) == (project.stage is Stage.FAILED)
        assert project.doing or project.stage is Stage.SUBMITTED
        assert set(project.lost_services) <= set(project.services)
        if project.stage is Stage.STOPPED:
            assert project.services == ()
        if project.stage is Stage.FAILED:
            assert set(project.services) <= self.requested
        if project.stage is Stage.COMPLETED:
            assert set(project.services) <= self.requested | {"inference-p1"}
        deletions = [e for e in self.effects if e.kind is EffectKind.DELETE_PROJECT]
        assert len(deletions) == int(project.is_deletion_requested and self.is_quiet())

    @invariant()
    def nobody_waits_for_a_service_that_is_gone(self) -> None:
        project = self.project
        if project.stage in DECISIVE and project.placement is not None:
            assert DECISIVE[project.stage] in project.services

    def is_quiet(self) -> bool:
        running = set(self.project.services) - set(self.project.lost_services)
        return not running and (self.project.stage.is_final)

    @invariant()
    def can_be_stored(self) -> None:
        assert Project.model_validate_json(self.project.model_dump_json(by_alias=True)) == self.project

    @invariant()
    def no_more_nodes_are_taken_in_than_asked_for(self) -> None:
        if self.project.placement is not None:
            nodes = self.project.placement.learners
            assert len(nodes) == len(set(nodes))
            assert len(nodes) - len(self.project.failed_learners) <= 3

    @invariant()
    def rounds_are_in_order(self) -> None:
        if self.project.training is not None:
            numbers = [record.number for record in self.project.training.history]
            assert numbers == sorted(set(numbers))


TestLife = LifeMachine.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
