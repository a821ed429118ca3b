"""A learner's failure is told with its traceback while others still train, not at the round's end."""

from __future__ import annotations

import re
from pathlib import Path

from flops.errors import CATALOGUE, ErrorCode
from flops.testing.deployment import free_ports
from flops.testing.training_stage import AGGREGATOR, PROJECT, TrainingStage

FIT = "self.center += ("
RAISES = {FIT: f"import time; raise RuntimeError(f'raised at {{time.time():.3f}}')\n        {FIT}"}
CLOSING_S = 3.0  # how long an aggregator waits for its tracking server at the end
LOOKING_S = 5.0  # how long a learner looks for its aggregator to tell it that it failed
BOUND_S = 10.0  # for a machine that is busy with other things


def waits_for(flag: Path) -> dict[str, str]:
    """A learner that trains until a file is there."""
    return {
        FIT: "import pathlib, time\n"
        f"        while not pathlib.Path({str(flag)!r}).exists(): time.sleep(0.01)\n        {FIT}"
    }


def seconds_since_the_raise(event: dict[str, object]) -> float:
    raised_at = re.findall(r"raised at ([0-9.]+)", str(event["error"]))
    return float(str(event["time_s"])) - float(raised_at[0])


def test_while_the_others_train_on(stage: TrainingStage, tmp_path: Path) -> None:
    flag = tmp_path / "train-on"
    config = stage.config(min_fit_clients=1, min_evaluate_clients=1, rounds=1)
    patient = stage.repo("patient", changes=waits_for(flag))
    training = stage.train_in_thread(stage.aggregator_context(config, patient))
    stage.start_learner(0, patient)
    stage.start_learner(1, stage.repo("bad", changes=RAISES))
    told = stage.await_event(AGGREGATOR, "learner_failed")
    assert stage.events(AGGREGATOR, "round_completed") == []
    flag.touch()
    training.result()
    assert (told["learner"], told["node"], told["round"]) == (f"learner-{PROJECT}-1", "node-1", 1)
    assert told["error"]["code"] == ErrorCode.USER_CODE_FAILED.value
    traceback = told["error"]["details"]["traceback"]
    assert "model_manager.py" in traceback
    assert "in fit_model" in traceback
    assert seconds_since_the_raise(told) < BOUND_S
    assert len(stage.events(AGGREGATOR, "learner_failed")) == 1


def test_at_once_when_the_round_cannot_go_on_without_it(stage: TrainingStage, tmp_path: Path) -> None:
    patient = stage.repo("patient", changes=waits_for(tmp_path / "never"))
    training = stage.train_in_thread(stage.aggregator_context(stage.config(), patient))
    stage.start_learner(0, patient)
    stage.start_learner(1, stage.repo("bad", changes=RAISES))
    error = training.failure()
    assert error.code is ErrorCode.USER_CODE_FAILED
    told = stage.await_event(AGGREGATOR, "learner_failed")
    assert seconds_since_the_raise(told) < BOUND_S
    assert error.details["traceback"] == told["error"]["details"]["traceback"]


def test_before_a_run_is_closed_whose_tracking_server_is_away(stage: TrainingStage, tmp_path: Path) -> None:
    """Closing it takes seconds then; the stop that the failure brings does not interrupt it."""
    repo = stage.repo(changes=RAISES)
    (port,) = free_ports(1)
    config = stage.config(learners=1, tracking_uri=f"http://127.0.0.1:{port}")
    aggregator = stage.start_aggregator(stage.aggregator_context(config, repo), is_tracking_played=False)
    stage.start_learner(0, repo, of=1)
    failed = stage.await_event(AGGREGATOR, "failed")
    aggregator.terminate()
    assert aggregator.wait(20) == CATALOGUE[ErrorCode.USER_CODE_FAILED].exit_code
    told = stage.await_event(AGGREGATOR, "learner_failed")
    assert failed["time_s"] - told["time_s"] < CLOSING_S
    assert len(stage.events(AGGREGATOR, "failed")) == 1


def test_before_the_aggregator_is_looked_for_when_code_cannot_be_loaded(stage: TrainingStage) -> None:
    (port,) = free_ports(1)  # no aggregator is there to be told
    repo = stage.repo(model_manager="import time; raise RuntimeError(f'raised at {time.time():.3f}')\n")
    learner = stage.start_learner(0, repo, aggregator=f"127.0.0.1:{port}")
    failed = stage.await_event(f"learner-{PROJECT}-0", "failed")
    assert learner.wait(20) == CATALOGUE[ErrorCode.USER_CODE_FAILED].exit_code
    assert seconds_since_the_raise(failed) < LOOKING_S
    assert len(stage.events(f"learner-{PROJECT}-0", "failed")) == 1
