"""Who is asked, and how often, in a phase of a round: with real connections and played learners."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from flops.testing.played_learner import PlayedLearner, echo
from flops.trainer.links import LearnerServer
from flops.trainer.round_runner import RoundRunner
from flops.trainer.strategy import RoundStrategy
from flops.wire.services import AggregatorConfig
from flops.wire.training import EVALUATE, TRAIN, Array, Message

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


def runner_on(server: LearnerServer) -> RoundRunner:
    return RoundRunner(
        server,
        RoundStrategy(CONFIG.strategy),
        CONFIG,
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
