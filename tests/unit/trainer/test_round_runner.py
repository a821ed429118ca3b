"""Who is asked, and how often, in a phase of a round: with real connections and played learners."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from flops.core.sla import Strategy, StrategyName
from flops.testing.played_learner import PlayedLearner, echo
from flops.trainer import links
from flops.trainer.links import LearnerServer
from flops.trainer.round_runner import RoundRunner
from flops.trainer.strategy import RoundStrategy
from flops.trainer.weighted_mean import WeightedMean
from flops.wire.services import AggregatorConfig
from flops.wire.training import EVALUATE, REPLY, TRAIN, Array, Message

PATIENCE_S = 10.0
CONFIG = AggregatorConfig(
    project_id="p1",
    customer_id="c1",
    flavor="sklearn",
    rounds=1,
    min_available_clients=2,
    min_fit_clients=2,
    min_evaluate_clients=2,
    round_timeout_s=PATIENCE_S,
    learner_token="secret",
    tracking_uri="",
    model_name="model",
)


@pytest.fixture
def server() -> Iterator[LearnerServer]:
    server = LearnerServer("127.0.0.1", 0, "secret")
    yield server
    server.stop()


def runner_on(server: LearnerServer, **changes: Any) -> RoundRunner:
    config = CONFIG.model_copy(update=changes)
    return RoundRunner(
        server,
        RoundStrategy(config.strategy),
        config,
        tell=lambda _: None,
        on_start=lambda *_: None,
        on_failure=lambda *_: None,
    )


def test_an_answer_that_comes_while_another_is_looked_at_is_not_asked_for_again(
    server: LearnerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_is_looked_at = threading.Event()

    def second(message: Message) -> Message:
        if message.type == TRAIN:
            assert first_is_looked_at.wait(PATIENCE_S)
        return echo(message)

    learners = [
        PlayedLearner(server.port, "learner-1"),
        PlayedLearner(server.port, "learner-2", respond=second),
    ]
    assert server.wait_until(lambda: len(server.joined()) == 2, PATIENCE_S)
    is_finite = np.isfinite

    def look(array: Array) -> Array:
        """The look at an answer lasts until the other learner has answered as well."""
        first_is_looked_at.set()
        assert server.wait_until(lambda: len(server.idle()) == 2, PATIENCE_S)
        return is_finite(array)  # type: ignore[no-any-return]

    monkeypatch.setattr("flops.trainer.strategy.np.isfinite", look)
    runner = runner_on(server)
    try:
        finished = runner.run(1, [np.ones(3, np.float32)])
    finally:
        for learner in learners:
            learner.close()
    assert len(finished.record.participants) == 2
    assert finished.record.duration_s < PATIENCE_S
    for learner in learners:
        assert [message.type for message in learner.instructions] == [TRAIN, EVALUATE]


def test_what_was_evaluated_is_trained_without_being_sent_again(server: LearnerServer) -> None:
    learners = [PlayedLearner(server.port, f"learner-{number}") for number in range(2)]
    assert server.wait_until(lambda: len(server.joined()) == 2, PATIENCE_S)
    runner = runner_on(server)
    try:
        parameters = runner.run(1, [np.ones(3, np.float32)]).parameters
        runner.run(2, parameters)
        runner.run(3, [np.zeros(3, np.float32)])
    finally:
        for learner in learners:
            learner.close()
    for learner in learners:
        _, evaluated, trained, _, other = (message.arrays for message in learner.instructions[:5])
        assert trained is evaluated
        np.testing.assert_array_equal(trained[0], np.ones(3))
        np.testing.assert_array_equal(other[0], np.zeros(3))


NAMES = ("learner-1", "learner-2", "learner-3", "learner-4")


def update_of(name: str) -> list[Array]:
    return [np.random.default_rng(NAMES.index(name)).normal(size=10_000).astype(np.float32)]


def expected_of(*names: str) -> bytes:
    mean = WeightedMean()
    for name in names:
        mean.add(update_of(name), 10 + NAMES.index(name))
    (found,) = mean.result() or []
    return found.tobytes()


class Crowd:
    """Learners with an update each; the first trains until it is let go on."""

    def __init__(self, server: LearnerServer, *, is_waiting: bool = True) -> None:
        self.server = server
        self.goes_on = threading.Event()
        if not is_waiting:
            self.goes_on.set()
        self.learners = {
            name: PlayedLearner(server.port, name, respond=self._respond(name)) for name in NAMES
        }
        assert server.wait_until(lambda: len(server.joined()) == len(NAMES), PATIENCE_S)

    def close(self) -> None:
        self.goes_on.set()
        for learner in self.learners.values():
            learner.close()

    def _respond(self, name: str) -> Callable[[Message], Message]:
        def respond(message: Message) -> Message:
            if message.type != TRAIN:
                return echo(message)
            if name == NAMES[0]:
                assert self.goes_on.wait(PATIENCE_S)
            header = {"rows": 10 + NAMES.index(name), "metrics": {}, "seconds": 0.01}
            return Message(REPLY, header, update_of(name))

        return respond

    def when_crowded(self, action: Callable[[], None]) -> threading.Thread:
        """Do something once answers are left with their learners, for want of memory."""

        def watch() -> None:
            if self.server.wait_until(self.server.is_crowded, PATIENCE_S):
                action()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_HELD_BYTES", 50_000)  # of updates of 40,000


@pytest.fixture
def start() -> list[Array]:
    return [np.zeros(10_000, np.float32)]


@pytest.mark.usefixtures("little_memory")
def test_updates_wait_with_their_learners_for_the_turn_of_a_slow_one(
    server: LearnerServer, start: list[Array]
) -> None:
    crowd = Crowd(server)
    held = []

    def look() -> None:
        held.append(sum(link.held_bytes > 0 for link in server.joined()))
        crowd.goes_on.set()

    watcher = crowd.when_crowded(look)
    try:
        finished = runner_on(server, min_fit_clients=4).run(1, start)
    finally:
        watcher.join()
        crowd.close()
    assert held == [1]
    assert finished.parameters[0].tobytes() == expected_of(*NAMES)
    assert [part.rows for part in finished.record.participants] == [10, 11, 12, 13]


@pytest.mark.usefixtures("little_memory")
def test_a_learner_that_leaves_does_not_keep_the_others_waiting(
    server: LearnerServer, start: list[Array]
) -> None:
    crowd = Crowd(server)

    def leave() -> None:
        crowd.goes_on.set()
        crowd.learners[NAMES[0]].close()

    crowd.learners[NAMES[0]]._respond = lambda _: None  # it never answers
    watcher = crowd.when_crowded(leave)
    try:
        finished = runner_on(server, min_fit_clients=3, round_timeout_s=60.0).run(1, start)
    finally:
        watcher.join()
        crowd.close()
    assert finished.parameters[0].tobytes() == expected_of(*NAMES[1:])
    assert finished.record.left_out == NAMES[:1]
    assert finished.record.duration_s < PATIENCE_S


@pytest.mark.usefixtures("little_memory")
def test_a_straggler_loses_its_turn_and_nobody_else_is_late(
    server: LearnerServer, start: list[Array]
) -> None:
    crowd = Crowd(server)
    try:
        finished = runner_on(server, min_fit_clients=3, round_timeout_s=2.0).run(1, start)
    finally:
        crowd.close()
    assert [part.rows for part in finished.record.participants if part.rows] == [11, 12, 13]
    mean = np.average([update_of(name)[0] for name in NAMES[1:]], axis=0, weights=[11, 12, 13])
    np.testing.assert_allclose(finished.parameters[0], mean, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("little_memory")
def test_a_strategy_that_needs_all_updates_gets_them(server: LearnerServer, start: list[Array]) -> None:
    crowd = Crowd(server, is_waiting=False)
    strategy = Strategy(name=StrategyName.FED_MEDIAN)
    try:
        finished = runner_on(server, min_fit_clients=4, strategy=strategy).run(1, start)
    finally:
        crowd.close()
    median = np.median([update_of(name)[0] for name in NAMES], axis=0)
    np.testing.assert_array_equal(finished.parameters[0], median)


@pytest.mark.usefixtures("little_memory")
def test_who_is_still_at_the_last_round_holds_up_nobody_in_the_next(
    server: LearnerServer, start: list[Array]
) -> None:
    crowd = Crowd(server)
    try:
        runner_on(server, min_fit_clients=3, round_timeout_s=2.0).run(1, start)
        others_wait = threading.Event()
        second = crowd.learners[NAMES[1]]
        answer = second._respond

        def late(message: Message) -> Message | None:
            if message.type == TRAIN and server.wait_until(server.is_crowded, PATIENCE_S):
                others_wait.set()
            return answer(message)

        second._respond = late
        finished = runner_on(server, min_fit_clients=3, round_timeout_s=60.0).run(2, start)
        assert others_wait.is_set()
    finally:
        crowd.close()
    assert finished.parameters[0].tobytes() == expected_of(*NAMES[1:])
    assert finished.record.duration_s < PATIENCE_S
