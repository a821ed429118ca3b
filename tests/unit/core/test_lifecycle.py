"""The rules of a project's life, event by event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flops.core import events as life
from flops.core.cluster import ServiceState
from flops.core.effects import EffectKind
from flops.core.ids import Digest, EnvironmentKey, NodeId, ProjectId, ServiceId
from flops.core.lifecycle import IMPOSSIBLE, LATE, IllegalTransitionError, decide, new_project, step
from flops.core.project import (
    Environment,
    Failure,
    Images,
    Placement,
    Project,
    Repository,
    Round,
    Stage,
    TrainedModel,
)
from flops.core.sla import Packaging
from flops.testing.projects import sla_with

ALL_EVENTS = life.LifecycleEvent.__subclasses__()
FAILURE = Failure(code="user_code_failed", message="It raised.", hint="h", details={"traceback": "line 7"})
REPOSITORY = Repository(
    commit="c" * 40,
    bundle=Digest("b" * 64),
    dependency_file="requirements.txt",
    environment_key=EnvironmentKey("k"),
)
ENVIRONMENT = Environment(key=EnvironmentKey("k"), lock=Digest("l"), model_lock=Digest("m"))
PLACEMENT = Placement(
    aggregator=NodeId("n1"),
    learners=(NodeId("n1"), NodeId("n2")),
    builder=NodeId("n1"),
    inference=NodeId("n1"),
)
PLACED = life.PlacementDecided(placement=PLACEMENT, nodes={"n1": "alpha", "n2": "beta"})
MODEL = TrainedModel(
    experiment_id="1", run_id="r", model_uri="u", name="flops-p1", version="1", round=2, bundle=Digest("b")
)


class Life:
    """A project, and everything its steps asked for."""

    def __init__(self, **training: Any) -> None:
        self.project = new_project(ProjectId("p1"), sla_with(**training), 1.0)
        self.effects: list[Any] = []
        self.lines: list[str] = []
        self.now_s = 1.0

    def happen(self, *events: life.LifecycleEvent) -> Life:
        for event in events:
            self.now_s += 1.0
            result = step(self.project, event, self.now_s)
            self.project = result.project
            self.effects += result.effects
            self.lines += [line.message for line in result.history]
        return self

    def kinds(self) -> list[EffectKind]:
        return [effect.kind for effect in self.effects]

    def stopped(self) -> set[str]:
        stops = [e.payload["services"] for e in self.effects if e.kind is EffectKind.STOP_SERVICES]
        return {service for services in stops for service in services}


def listening(address: str = "h:1", seq: int = 0) -> life.AggregatorListening:
    return life.AggregatorListening(service_id=ServiceId("aggregator-p1"), address=address, seq=seq)


def completed(number: int, **fields: Any) -> life.RoundCompleted:
    return life.RoundCompleted(rounds=3, record=Round(number=number, **fields))


def changed(service: str, state: ServiceState, **fields: Any) -> life.ServiceChanged:
    return life.ServiceChanged(service_id=ServiceId(service), node="alpha", state=state, **fields)


def told(service: str, failure: Failure = FAILURE) -> life.ServiceTold:
    return life.ServiceTold(service_id=ServiceId(service), node="alpha", failure=failure)


TO: dict[Stage, tuple[life.LifecycleEvent, ...]] = {}
TO[Stage.SUBMITTED] = ()
TO[Stage.RESOLVING] = (life.Submitted(),)
TO[Stage.BUILDING] = (*TO[Stage.RESOLVING], life.RepositoryResolved(repository=REPOSITORY), PLACED)
TO[Stage.PLACING] = (*TO[Stage.BUILDING], life.EnvironmentLocked(environment=ENVIRONMENT), PLACED)
TO[Stage.TRAINING] = (*TO[Stage.PLACING], listening())
TO[Stage.PACKAGING] = (*TO[Stage.TRAINING], life.TrainingCompleted(model=MODEL))
TO[Stage.DEPLOYING] = (*TO[Stage.PACKAGING], life.ModelPackaged())
TO[Stage.COMPLETED] = (
    *TO[Stage.DEPLOYING],
    life.InferenceListening(service_id=ServiceId("inference-p1"), url="http://h:8080"),
)
TO[Stage.STOPPING] = (*TO[Stage.TRAINING], life.StopRequested())
TO[Stage.STOPPED] = (life.Submitted(), life.StopRequested())
TO[Stage.FAILED] = (life.Submitted(), life.StepFailed(kind=EffectKind.RESOLVE_REPOSITORY, failure=FAILURE))


def at(stage: Stage, **training: Any) -> Life:
    """A project in a stage."""
    reached = Life(**training).happen(*TO[stage])
    assert reached.project.stage is stage
    return reached


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("event", ALL_EVENTS)
def test_every_pair_of_event_and_stage_is_decided(stage: Stage, event: type[life.LifecycleEvent]) -> None:
    decision = decide(stage, event)
    assert callable(decision) or decision in {LATE, IMPOSSIBLE}


def test_an_impossible_event_raises_with_the_story() -> None:
    project = at(Stage.BUILDING).project
    with pytest.raises(IllegalTransitionError, match=r"submitted .* → resolving .* → building"):
        step(project, completed(1), 9.0)


@pytest.mark.parametrize("stage", [s for s in Stage if s not in {Stage.STOPPED, Stage.FAILED}])
def test_a_second_delivery_changes_nothing(stage: Stage) -> None:
    repeated = at(stage)
    before = repeated.project
    for event in TO[stage]:
        result = step(before, event, 99.0)
        assert (result.project, result.effects, result.history) == (before, (), ()), event


@pytest.mark.parametrize("stage", list(Stage))
def test_an_event_of_the_cluster_is_taken_in_once(stage: Stage) -> None:
    project = at(stage).project.model_copy(update={"cluster_seq": 7})
    for seq in (6, 7):
        assert not step(project, changed("aggregator-p1", ServiceState.LOST, seq=seq), 99.0).is_changed
        assert not step(project, completed(9).model_copy(update={"seq": seq}), 99.0).is_changed


def test_the_whole_way_with_a_build() -> None:
    whole = at(Stage.COMPLETED)
    assert whole.kinds() == [
        EffectKind.RESOLVE_REPOSITORY,
        EffectKind.DECIDE_PLACEMENT,
        EffectKind.START_BUILDER,
        EffectKind.DECIDE_PLACEMENT,
        EffectKind.START_AGGREGATOR,
        EffectKind.START_LEARNERS,
        EffectKind.STOP_SERVICES,
        EffectKind.BUILD_INFERENCE,
        EffectKind.START_INFERENCE,
    ]
    assert len({effect.key for effect in whole.effects}) == len(whole.effects)
    assert [span.stage for span in whole.project.spans] == [*list(Stage)[:7], Stage.COMPLETED]
    assert whole.stopped() == {"builder-p1", "aggregator-p1", "learner-p1-1", "learner-p1-2"}
    assert whole.project.inference_url == "http://h:8080"


def test_a_known_environment_needs_no_build() -> None:
    quick = Life().happen(
        life.Submitted(), life.RepositoryResolved(repository=REPOSITORY, environment=ENVIRONMENT), PLACED
    )
    assert quick.project.stage is Stage.PLACING
    assert EffectKind.START_BUILDER not in quick.kinds()


@pytest.mark.parametrize(
    ("steps", "last"),
    [
        ([], Stage.COMPLETED),
        (["build_image_for_trained_model"], Stage.PACKAGING),
    ],
)
def test_post_training_steps_are_done_only_when_asked_for(steps: list[str], last: Stage) -> None:
    trained = at(Stage.TRAINING)
    sla = trained.project.sla.model_validate(
        {**trained.project.sla.model_dump(by_alias=True), "post_training_steps": steps}
    )
    trained.project = trained.project.model_copy(update={"sla": sla})
    trained.happen(life.TrainingCompleted(model=MODEL))
    assert trained.project.stage is last
    if last is Stage.PACKAGING:
        assert trained.happen(life.ModelPackaged()).project.stage is Stage.COMPLETED
    assert EffectKind.START_INFERENCE not in trained.kinds()


def test_a_project_that_runs_images_is_built_even_if_its_environment_is_known() -> None:
    project = at(Stage.SUBMITTED)
    sla = project.project.sla.model_copy(update={"packaging": Packaging.IMAGE})
    project.project = project.project.model_copy(update={"sla": sla})
    project.happen(
        life.Submitted(),
        life.RepositoryResolved(repository=REPOSITORY, environment=ENVIRONMENT),
        PLACED,
    )
    assert project.project.stage is Stage.BUILDING
    images = Images(aggregator="a@sha256:1", learner="l@sha256:2")
    project.happen(life.EnvironmentLocked(environment=ENVIRONMENT, images=images), PLACED, listening())
    project.happen(life.TrainingCompleted(model=MODEL))
    assert project.project.stage is Stage.PACKAGING
    assert "builder-p1-2" in project.project.services
    project.happen(life.ModelPackaged(image="m@sha256:3"))
    assert project.project.images == images.model_copy(update={"inference": "m@sha256:3"})
    assert "builder-p1-2" in project.stopped()
    assert project.project.stage is Stage.DEPLOYING


def test_a_failed_build_of_the_models_image_is_the_projects_failure() -> None:
    project = at(Stage.PACKAGING)
    project.happen(told("builder-p1-2"))
    assert project.project.stage is Stage.FAILED


def test_placement_is_decided_anew_after_the_build() -> None:
    other = Placement(aggregator=NodeId("n3"), learners=(NodeId("n3"), NodeId("n3")))
    placed = at(Stage.BUILDING).happen(
        life.EnvironmentLocked(environment=ENVIRONMENT), life.PlacementDecided(placement=other)
    )
    assert placed.project.placement == other


def test_learners_on_one_node_are_counted() -> None:
    other = Placement(aggregator=NodeId("n1"), learners=(NodeId("n1"), NodeId("n2"), NodeId("n1")))
    placed = at(Stage.BUILDING).happen(
        life.EnvironmentLocked(environment=ENVIRONMENT),
        life.PlacementDecided(placement=other, nodes={"n1": "alpha", "n2": "beta"}),
    )
    assert placed.lines[-1] == "Placed: the aggregator on alpha, learners on alpha (2), beta."


def test_rounds_are_recorded_once_and_in_order() -> None:
    training = at(Stage.TRAINING).happen(
        life.RoundStarted(round=1, rounds=3, learners=("a", "b")),
        completed(1, accuracy=0.5, loss=1.0),
        life.RoundStarted(round=2, rounds=3, learners=("a", "b")),
        completed(2, accuracy=0.9, loss=2.0),
        life.RoundStarted(round=2, rounds=3, learners=("a", "b")),
        completed(1, accuracy=0.1),
        completed(3, accuracy=0.9, loss=3.0),
    )
    progress = training.project.training
    assert progress is not None
    assert [record.number for record in progress.history] == [1, 2, 3]
    assert (progress.round_now, progress.best_round) == (3, 2)
    assert "exports" in training.project.doing.lower()


def test_numbers_that_are_none_are_kept_out() -> None:
    training = at(Stage.TRAINING).happen(completed(1, metrics={"a": 1.0, "b": float("nan")}))
    progress = training.project.training
    assert progress is not None
    assert progress.history[0].metrics == {"a": 1.0}
    assert Project.model_validate_json(training.project.model_dump_json(by_alias=True)) == training.project


def test_learners_join_and_leave() -> None:
    training = at(Stage.TRAINING)
    join = life.LearnerJoined(learner="learner-p1-1", node="alpha", rows=9)
    leave = life.LearnerLeft(learner="learner-p1-1", node="alpha", reason="its connection broke")
    assert "1 of 2" in training.happen(join).project.doing
    training.happen(join, leave, leave)
    assert training.project.training is not None
    assert training.project.training.learners == ()
    assert sum("has joined" in line for line in training.lines) == 1
    assert sum("has left" in line for line in training.lines) == 1


def test_a_round_that_lacks_learners_says_what_it_waits_for_and_since_when() -> None:
    training = at(Stage.TRAINING, min_fit_clients=2)
    joins = [life.LearnerJoined(learner=f"learner-p1-{n}", node="alpha", rows=9) for n in (1, 2)]
    leaves = [life.LearnerLeft(learner=f"learner-p1-{n}", node="alpha", reason="gone") for n in (1, 2)]
    assert "1 of 2 have joined" in training.happen(*joins, leaves[0]).project.doing
    training.happen(joins[0], life.RoundStarted(round=1, rounds=3, learners=("learner-p1-1", "learner-p1-2")))
    assert training.project.doing == "Trains round 1 of 3 with 2 learners."
    training.happen(leaves[0])
    waits = "Waits in round 1 of 3 for learners: 1 of the 2 needed have joined."
    assert (training.project.doing, training.project.doing_since_s) == (waits, training.now_s)
    assert "0 of the 2" in training.happen(leaves[1]).project.doing
    assert training.happen(joins[0]).project.doing == waits
    assert training.happen(joins[1]).project.doing == "Trains round 1 of 3 with 2 learners."
    training.happen(completed(1), leaves[0])
    assert training.project.doing.startswith("Round 1 of 3: ")


@pytest.mark.parametrize(
    ("stage", "service"),
    [
        (Stage.BUILDING, "builder-p1"),
        (Stage.PLACING, "aggregator-p1"),
        (Stage.TRAINING, "aggregator-p1"),
        (Stage.DEPLOYING, "inference-p1"),
    ],
)
@pytest.mark.parametrize(
    "fail",
    [
        lambda service: told(service),
        lambda service: changed(service, ServiceState.FAILED, failure=FAILURE),
    ],
    ids=["told", "reported"],
)
def test_a_decisive_service_fails_its_project(
    stage: Stage, service: str, fail: Callable[[str], life.LifecycleEvent]
) -> None:
    failed = at(stage).happen(fail(service))
    assert failed.project.stage is Stage.FAILED
    assert failed.project.failure is not None
    assert failed.project.failure.code == "user_code_failed"
    assert failed.project.failure.details == {"traceback": "line 7", "node": "alpha", "service_id": service}
    assert set(failed.project.services) <= failed.stopped()


def test_a_failure_that_may_pass_is_left_to_the_nodes_restarts() -> None:
    passing = Failure(code="unreachable", message="The blobs are away.")
    waiting = at(Stage.TRAINING).happen(told("aggregator-p1", passing))
    assert waiting.project.stage is Stage.TRAINING
    waiting.happen(changed("aggregator-p1", ServiceState.RESTARTING, exit_code=7))
    assert waiting.project.stage is Stage.TRAINING
    waiting.happen(changed("aggregator-p1", ServiceState.FAILED, exit_code=7))
    assert waiting.project.failure is not None
    assert waiting.project.failure.code == "unreachable"


def test_a_service_that_ends_without_a_word_is_explained() -> None:
    failed = at(Stage.TRAINING).happen(changed("aggregator-p1", ServiceState.FAILED, exit_code=-9))
    assert failed.project.failure is not None
    assert failed.project.failure.code == "service_failed"
    assert "aggregator on alpha" in failed.project.failure.message
    assert "exit code -9" in failed.project.failure.message


@pytest.mark.parametrize(
    ("stage", "service", "name"),
    [
        (Stage.BUILDING, "builder-p1", "builder"),
        (Stage.PLACING, "aggregator-p1", "aggregator"),
        (Stage.TRAINING, "aggregator-p1", "aggregator"),
        (Stage.DEPLOYING, "inference-p1", "inference service"),
    ],
)
def test_a_decisive_service_that_ends_without_a_result_fails_its_project(
    stage: Stage, service: str, name: str
) -> None:
    failed = at(stage).happen(changed(service, ServiceState.COMPLETED, exit_code=0))
    assert failed.project.stage is Stage.FAILED
    assert failed.project.failure is not None
    assert failed.project.failure.code == "service_failed"
    assert f"The {name} on alpha ended without telling a result." in failed.project.failure.message
    assert set(failed.project.services) <= failed.stopped()


def test_a_learner_that_fails_is_the_aggregators_business_while_enough_are_left() -> None:
    training = at(Stage.TRAINING, min_fit_clients=1).happen(life.RoundStarted(round=1, rounds=3))
    training.happen(changed("learner-p1-1", ServiceState.FAILED, failure=FAILURE))
    assert training.project.stage is Stage.TRAINING
    training.happen(changed("learner-p1-2", ServiceState.FAILED, failure=FAILURE))
    assert training.project.stage is Stage.FAILED
    assert training.project.failure is not None
    assert training.project.failure.details["traceback"] == "line 7"
    assert training.project.failure.details["node"] == "alpha"


def test_a_project_fails_when_too_few_learners_are_left_for_the_first_round() -> None:
    training = at(Stage.TRAINING, min_fit_clients=1)
    assert training.happen(told("learner-p1-1")).project.stage is Stage.FAILED


def test_a_project_fails_when_too_few_learners_are_left_to_fit() -> None:
    training = at(Stage.TRAINING, min_fit_clients=2).happen(life.RoundStarted(round=1, rounds=3))
    assert training.happen(told("learner-p1-1")).project.stage is Stage.FAILED


def test_a_learner_that_crashes_and_returns_is_counted_in_again() -> None:
    crash = Failure(code="internal", message="crash")
    training = at(Stage.TRAINING, min_fit_clients=2)
    training.happen(told("learner-p1-1", crash), changed("learner-p1-1", ServiceState.RESTARTING))
    training.happen(life.LearnerJoined(learner="learner-p1-1", node="alpha", rows=1))
    assert training.project.stage is Stage.TRAINING
    assert training.project.failed_learners == ()


@pytest.mark.parametrize("has_returned", [False, True])
def test_a_round_that_fails_for_want_of_learners_tells_why_they_ended(has_returned: bool) -> None:
    training = at(Stage.TRAINING, min_fit_clients=2).happen(life.RoundStarted(round=1, rounds=3))
    memory = Failure(code="out_of_memory", message="learner-p1-1 needed more memory than it may use.")
    training.happen(changed("learner-p1-1", ServiceState.RESTARTING, failure=memory))
    if has_returned:
        training.happen(life.LearnerLeft(learner="learner-p1-1", node="alpha", reason="its connection ended"))
        training.happen(life.LearnerJoined(learner="learner-p1-1", node="alpha", rows=1))
    failure = Failure(code="too_few_learners", message="Round 1: 0 of 1 (learner-p1-1: it left).")
    failed = training.happen(told("aggregator-p1", failure)).project.failure
    assert failed is not None
    assert ("needed more memory" in failed.message) is not has_returned


def test_learners_that_fail_after_the_last_round_change_nothing() -> None:
    done = at(Stage.TRAINING).happen(completed(1), completed(2), completed(3))
    done.happen(changed("learner-p1-1", ServiceState.FAILED), changed("learner-p1-2", ServiceState.FAILED))
    assert done.project.stage is Stage.TRAINING


def test_a_lost_service_is_waited_for() -> None:
    training = at(Stage.TRAINING).happen(changed("aggregator-p1", ServiceState.LOST))
    assert training.project.stage is Stage.TRAINING
    assert "Waits for alpha" in training.project.doing
    training.happen(changed("aggregator-p1", ServiceState.RUNNING))
    assert training.project.lost_services == ()
    assert "is back" in training.project.doing


def test_an_aggregator_at_another_address_gets_new_learners() -> None:
    training = at(Stage.TRAINING).happen(listening("h:2"), listening("h:2"))
    starts = [e.payload for e in training.effects if e.kind is EffectKind.START_LEARNERS]
    assert starts == [{"address": "h:1", "generation": 1}, {"address": "h:2", "generation": 2}]
    assert training.stopped() == {"learner-p1-1", "learner-p1-2"}
    assert {"learner-p1-1-r2", "learner-p1-2-r2"} <= set(training.project.services)
    training.happen(changed("learner-p1-1", ServiceState.FAILED))
    assert training.project.stage is Stage.TRAINING


@pytest.mark.parametrize(
    "stage", [s for s in Stage if not s.is_final and s not in {Stage.STOPPING, Stage.SUBMITTED}]
)
def test_a_stop_ends_everything_at_any_stage(stage: Stage) -> None:
    stopping = at(stage)
    services = stopping.project.services
    stopping.happen(life.StopRequested())
    assert stopping.project.stage is (Stage.STOPPING if services else Stage.STOPPED)
    assert set(services) <= stopping.stopped()
    stopping.happen(*(changed(service, ServiceState.STOPPED) for service in services))
    assert stopping.project.stage is Stage.STOPPED
    assert stopping.project.services == ()


def test_a_lost_service_does_not_hold_up_a_stop() -> None:
    stopping = at(Stage.TRAINING).happen(
        changed("aggregator-p1", ServiceState.LOST),
        life.StopRequested(),
        life.ServicesEnded(services=(ServiceId("builder-p1"), ServiceId("learner-p1-1"))),
        changed("learner-p1-2", ServiceState.LOST),
    )
    assert stopping.project.stage is Stage.STOPPED


def test_stopping_a_completed_project_takes_its_model_down() -> None:
    done = at(Stage.COMPLETED).happen(life.StopRequested(), life.StopRequested())
    assert (done.project.stage, done.project.inference_url) == (Stage.COMPLETED, "")
    assert "inference-p1" in done.stopped()
    assert done.kinds().count(EffectKind.STOP_SERVICES) == 2


def test_a_completed_project_tells_when_its_model_is_served_no_more() -> None:
    done = at(Stage.COMPLETED).happen(changed("inference-p1", ServiceState.FAILED, failure=FAILURE))
    assert (done.project.stage, done.project.inference_url) == (Stage.COMPLETED, "")


def test_a_server_that_ends_in_peace_serves_no_more() -> None:
    done = at(Stage.COMPLETED).happen(changed("inference-p1", ServiceState.COMPLETED, exit_code=0))
    assert (done.project.stage, done.project.inference_url) == (Stage.COMPLETED, "")
    assert done.lines[-1] == "The inference service on alpha has ended; the model is not served any more."


def test_an_inference_service_may_move() -> None:
    done = at(Stage.COMPLETED)
    moved = life.InferenceListening(service_id=ServiceId("inference-p1"), url="http://h:9", seq=5)
    assert done.happen(moved).project.inference_url == "http://h:9"


@pytest.mark.parametrize("stage", [s for s in Stage if s is not Stage.SUBMITTED])
def test_a_deletion_removes_the_project_when_nothing_runs_any_more(stage: Stage) -> None:
    deleted = at(stage)
    services = deleted.project.services
    deleted.happen(life.DeleteRequested(), life.DeleteRequested())
    assert set(services) <= deleted.stopped()
    deleted.happen(*(changed(service, ServiceState.STOPPED) for service in services))
    assert deleted.kinds().count(EffectKind.DELETE_PROJECT) == 1
    assert deleted.kinds()[-2:] == [EffectKind.DELETE_PROJECT, EffectKind.DELETE_TRACKING]


@pytest.mark.parametrize("kind", list(EffectKind))
def test_only_an_effect_that_is_waited_for_fails_the_project(kind: EffectKind) -> None:
    failing = {
        EffectKind.RESOLVE_REPOSITORY: TO[Stage.RESOLVING],
        EffectKind.DECIDE_PLACEMENT: TO[Stage.BUILDING][:-1],
        EffectKind.START_BUILDER: TO[Stage.BUILDING],
        EffectKind.START_AGGREGATOR: TO[Stage.PLACING],
        EffectKind.START_LEARNERS: TO[Stage.TRAINING],
        EffectKind.BUILD_INFERENCE: TO[Stage.PACKAGING],
        EffectKind.START_INFERENCE: TO[Stage.DEPLOYING],
    }
    failure = life.StepFailed(kind=kind, failure=FAILURE)
    if kind in failing:
        assert Life().happen(*failing[kind], failure).project.stage is Stage.FAILED
    for stage in (Stage.STOPPING, Stage.COMPLETED, Stage.FAILED, Stage.STOPPED):
        assert at(stage).happen(failure).project.stage is stage


def test_a_repeated_effect_that_fails_late_does_not_fail_the_project() -> None:
    late = life.StepFailed(kind=EffectKind.RESOLVE_REPOSITORY, failure=FAILURE)
    assert at(Stage.RESOLVING).happen(*TO[Stage.BUILDING][1:2], late).project.stage is Stage.RESOLVING
    assert at(Stage.TRAINING).happen(late).project.stage is Stage.TRAINING


@pytest.mark.parametrize("stage", list(Stage))
def test_a_defect_ends_a_project_that_has_not_ended(stage: Stage) -> None:
    aborted = at(stage).happen(life.Aborted(failure=FAILURE))
    assert aborted.project.stage is (stage if stage.is_final else Stage.FAILED)


def test_what_services_do_is_shown_once() -> None:
    building = at(Stage.BUILDING)
    progress = life.ServiceProgressed(
        service_id=ServiceId("builder-p1"), node="alpha", message="Resolves numpy."
    )
    building.happen(progress, progress)
    assert building.project.doing == "The builder on alpha: Resolves numpy."
    assert building.lines.count("The builder on alpha: Resolves numpy.") == 1
    building.happen(changed("builder-p1", ServiceState.PREPARING, detail="Unpacks the repository."))
    assert building.project.doing == "The builder on alpha: Unpacks the repository."


def test_credentials_in_the_url_are_not_told() -> None:
    project = new_project(ProjectId("p1"), sla_with(), 1.0)
    sla = project.sla.model_copy(update={"ml_repo_url": "https://me:pw@git.example/x"})
    result = step(project.model_copy(update={"sla": sla}), life.Submitted(), 1.0)
    assert "pw" not in result.history[0].message + result.project.doing
    assert "git.example/x" in result.history[0].message
