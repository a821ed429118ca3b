"""Learners that are slow, stuck or killed while they load their code and data."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from flops.errors import ErrorCode
from flops.testing.training_stage import AGGREGATOR, PROJECT, TrainingStage

VICTIM = f"learner-{PROJECT}-1"
LOAD = "self.training, self.held_out = DataManager().get_data()"
IN_PYTHON = "while True: pass"
ALONE = "import re; re.match('(a+)+$', 'a' * 60 + 'b')"  # lets no other thread run


def told(stage: TrainingStage) -> list[str]:
    return [event["message"] for event in stage.events(AGGREGATOR, "progress")]


def loading(stage: TrainingStage, what: str, name: str = "loading") -> Path:
    """A repository that does something while it loads its data."""
    what = what.replace("FLAG", f"import pathlib; pathlib.Path({str(stage.root / 'flag')!r}).touch()")
    return stage.repo(name, changes={LOAD: f"{LOAD}\n        {what}"})


@pytest.mark.parametrize("loop", [IN_PYTHON, ALONE], ids=["in-python", "alone"])
def test_the_training_goes_on_without_a_learner_that_loads_for_ever(
    stage: TrainingStage, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    monkeypatch.setattr("flops.trainer.gathering._GRACE_S", 0.5)
    config = stage.config(min_fit_clients=1, min_evaluate_clients=1, load_timeout_s=2.0)
    training = stage.train_in_thread(stage.aggregator_context(config, stage.repo()))
    stage.start_learner(0, stage.repo(), load_timeout_s=2.0)
    stuck = stage.start_learner(1, loading(stage, loop), load_timeout_s=2.0)
    training.result()
    assert len(stage.rounds()) == 3
    assert any(f"{VICTIM} on node-1 is not waited for any longer" in message for message in told(stage))
    assert stuck.wait(15) != 0  # it ends by itself, also when no other thread of it can run
    if loop == IN_PYTHON:
        error = stage.await_event(VICTIM, "failed")["error"]
        assert error["code"] == ErrorCode.TIMEOUT
        assert 'File "model_manager.py", line' in error["details"]["traceback"]
        assert loop in error["details"]["traceback"]


def test_a_learner_that_loads_for_ever_fails_a_training_that_needs_it(stage: TrainingStage) -> None:
    training = stage.train_in_thread(stage.aggregator_context(stage.config(load_timeout_s=2.0), stage.repo()))
    stage.start_learner(0, stage.repo(), load_timeout_s=2.0)
    began = time.monotonic()
    stage.start_learner(1, loading(stage, IN_PYTHON), load_timeout_s=2.0)
    error = training.failure()
    assert time.monotonic() - began < 15.0
    assert error.code is ErrorCode.TOO_FEW_LEARNERS
    assert "2 learners are needed for a round" in error.message
    assert f"{VICTIM} on node-1 loaded its code and data for 2 s without a new row" in error.message
    assert f"learner-{PROJECT}-0: joined on node-0" in error.message
    assert IN_PYTHON in error.details["traceback"]


def test_a_learner_that_loads_for_long_is_waited_for_while_rows_come(stage: TrainingStage) -> None:
    """It loads for three times the limit, with rows now and then."""
    slowly = "import time\n        for _ in range(6):\n            time.sleep(1); DataManager()"
    config = stage.config(learners=1, load_timeout_s=2.0)
    training = stage.train_in_thread(stage.aggregator_context(config, stage.repo()))
    stage.start_learner(0, loading(stage, slowly), of=1, load_timeout_s=2.0)
    training.result()
    assert len(stage.rounds()) == 3


def test_a_learner_that_is_killed_while_it_loads_is_noticed_and_may_return(stage: TrainingStage) -> None:
    training = stage.train_in_thread(stage.aggregator_context(stage.config(), stage.repo()))
    stage.start_learner(0, stage.repo())
    victim = stage.start_learner(1, loading(stage, "import time; time.sleep(2); FLAG; time.sleep(60)"))
    stage.await_condition((stage.root / "flag").exists)
    killed = time.monotonic()
    victim.send_signal(signal.SIGKILL)
    gone = f"{VICTIM} on node-1 has gone while it loaded its code and data."
    stage.await_condition(lambda: gone in told(stage), gone)
    assert time.monotonic() - killed < 2.0
    stage.start_learner(1, stage.repo())
    training.result()
    assert [len(record.participants) for record in stage.rounds()] == [2, 2, 2]
