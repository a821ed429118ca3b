"""Where a learner stands, at every stage of its life."""

from __future__ import annotations

import pytest

from flops.core import events as life
from flops.core.cluster import Service, ServiceKind, ServiceSpec, ServiceState, ServiceStatus
from flops.core.ids import NodeId, ServiceId
from flops.core.learner_states import LearnerStanding, LearnerState, learner_standings
from flops.core.lifecycle import step
from flops.core.project import Failure, ProjectEvent, Stage

from .test_lifecycle import FAILURE, at, changed, completed, told

FIRST, SECOND = "learner-p1-1", "learner-p1-2"
NODES = {NodeId("n1"): "alpha", NodeId("n2"): "beta"}
CRASH = Failure(
    code="service_failed", message="It was ended by SIGSEGV.", details={"output": "loads\nSegfault!"}
)


class Training:
    """A project that trains, with what the cluster and the history say of it."""

    def __init__(self) -> None:
        training = at(Stage.TRAINING)
        self.project, self.now_s = training.project, training.now_s
        self.history: list[ProjectEvent] = []
        self.services: dict[str, Service] = {}

    def happen(self, *events: life.LifecycleEvent) -> Training:
        for event in events:
            self.now_s += 1.0
            result = step(self.project, event, self.now_s)
            self.project = result.project
            self.history += result.history
        return self

    def report(self, learner: str, state: ServiceState, detail: str = "") -> Training:
        """The cluster knows it, and tells the project."""
        spec = ServiceSpec(
            id=ServiceId(learner), project_id="p1", kind=ServiceKind.LEARNER, node_id=NodeId("n1")
        )
        status = ServiceStatus(service_id=spec.id, state=state, detail=detail)
        failure = CRASH if state is ServiceState.RESTARTING else None
        self.services[learner] = Service(spec=spec, status=status, updated_at_s=self.now_s + 1)
        return self.happen(changed(learner, state, detail=detail, failure=failure))

    @property
    def first(self) -> LearnerStanding:
        first, second = learner_standings(self.project, list(self.services.values()), self.history, NODES)
        assert (first.service, first.node, second.service, second.node) == (FIRST, "alpha", SECOND, "beta")
        return first

    @property
    def seen(self) -> tuple[LearnerState, str, bool]:
        """The first learner's state, what it does, and whether it does so since the last event."""
        return self.first.state, self.first.doing, self.first.since_s == self.now_s


def joined(learner: str = FIRST) -> life.LearnerJoined:
    return life.LearnerJoined(learner=learner, node="alpha", rows=9)


def left(reason: str = "its connection broke") -> life.LearnerLeft:
    return life.LearnerLeft(learner=FIRST, node="alpha", reason=reason)


def begun(number: int, *learners: str) -> life.RoundStarted:
    return life.RoundStarted(round=number, rounds=3, learners=learners or (FIRST, SECOND))


def raised(number: int, learner: str = FIRST) -> life.LearnerFailed:
    return life.LearnerFailed(learner=learner, node="alpha", round=number, phase="train", failure=FAILURE)


def test_nobody_stands_anywhere_before_learners_are_asked_for() -> None:
    assert learner_standings(at(Stage.PLACING).project, [], [], NODES) == ()


def test_from_its_start_to_its_end() -> None:
    training = Training()
    assert (training.first.state, training.first.doing) == (LearnerState.WAITING, "Waits for its node.")
    training.report(FIRST, ServiceState.PREPARING, "building the environment")
    assert training.seen == (LearnerState.WAITING, "building the environment", True)
    training.report(FIRST, ServiceState.RUNNING)
    assert training.seen == (LearnerState.LOADING, "Loads its code and its data.", True)
    training.happen(
        life.ServiceProgressed(service_id=ServiceId(FIRST), node="alpha", message="Loading the data (t).")
    )
    assert training.first.doing == "Loading the data (t)."
    training.happen(joined())
    assert training.seen == (LearnerState.JOINED, "Waits to take part in a round.", True)
    assert training.first.rows == 9
    training.happen(begun(1))
    assert training.seen == (LearnerState.TRAINING, "Takes part in round 1.", True)
    training.happen(completed(1))
    assert training.seen == (LearnerState.JOINED, "Waits to take part in a round.", True)
    training.happen(begun(2, SECOND))
    assert training.seen[0] is LearnerState.JOINED
    training.happen(life.StopRequested(), life.ServicesEnded(services=tuple(training.project.services)))
    assert training.project.stage is Stage.STOPPED
    assert training.seen == (LearnerState.ENDED, "", True)


def test_a_learner_that_crashes_says_why_until_it_is_back_and_after() -> None:
    training = Training().happen(joined(), begun(1))
    training.report(FIRST, ServiceState.RESTARTING).happen(left())
    assert training.first.state is LearnerState.RESTARTING
    assert training.first.doing == "Waits for its node to start it again."
    assert training.first.reason == "It was ended by SIGSEGV. Its last line: Segfault!"
    training.report(FIRST, ServiceState.RUNNING)
    assert training.first.state is LearnerState.LOADING
    training.happen(joined())
    assert training.seen[0] is LearnerState.JOINED
    assert training.first.reason_at_s < training.first.since_s  # type: ignore[operator]  # it is known


def test_a_learner_whose_node_is_gone_is_lost() -> None:
    training = Training().happen(joined()).report(FIRST, ServiceState.LOST)
    assert training.seen == (LearnerState.LOST, "Waits for its node, which is gone.", True)
    training.report(FIRST, ServiceState.RUNNING)
    assert training.first.state is LearnerState.JOINED


def test_a_learner_whose_code_raises_in_a_round_has_failed_in_it() -> None:
    training = Training().happen(joined(), begun(1), raised(1))
    assert training.seen == (LearnerState.FAILED, "Waits for the next round.", True)
    assert training.first.reason == "It raised."
    assert training.project.stage is Stage.TRAINING
    training.happen(completed(1), begun(2))
    assert training.first.state is LearnerState.TRAINING
    assert training.first.reason == "It raised."


@pytest.mark.parametrize("named", [FIRST, SECOND])
def test_all_learners_that_raised_have_failed_when_their_project_has(named: str) -> None:
    training = Training().happen(joined(FIRST), joined(SECOND), begun(1), raised(1), raised(1, SECOND))
    failure = FAILURE.model_copy(update={"details": {"learner": named, "node": "alpha"}})
    training.happen(told("aggregator-p1", failure))
    assert training.project.stage is Stage.FAILED
    assert (training.first.state, training.first.reason, training.first.doing) == (
        LearnerState.FAILED, "It raised.", ""
    )  # fmt: skip


def test_a_learner_that_failed_for_good_stays_so() -> None:
    training = Training().happen(joined()).report(FIRST, ServiceState.FAILED)
    assert training.seen == (LearnerState.FAILED, "", True)
