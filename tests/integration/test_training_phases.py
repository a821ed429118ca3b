"""Learners that are killed or late in each phase of a round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flops.errors import ErrorCode
from flops.testing.training_stage import AGGREGATOR, PROJECT, TrainingStage

CALM, VICTIM = f"learner-{PROJECT}-0", f"learner-{PROJECT}-1"
BIG = {"np.ones((2, 2))": "np.ones(9_000_000)"}  # 72 MB: two pieces
# Ends its process when the main thread is about to send the second piece of its answer.
KILL_WHILE_SENDING = """
import os, pathlib, sys, threading, time

def _kill_while_sending(flag):
    main = threading.main_thread().ident
    while True:
        frame = sys._current_frames()[main]
        while frame is not None:
            if frame.f_code.co_name == "send_encoded" and frame.f_locals.get("number", 0) == 1:
                pathlib.Path(flag).touch()
                os.kill(os.getpid(), 9)
            frame = frame.f_back
        time.sleep(0.001)

"""


def killed_while_evaluating(flag: Path) -> dict[str, str]:
    """In the second round it says so by making a file, and dies."""
    return {
        "distance = abs": "if self.config['server-round'] == 2:\n            import os, pathlib\n"
        f"            pathlib.Path({str(flag)!r}).touch(); os.kill(os.getpid(), 9)\n        distance = abs"
    }


def killed_while_sending(flag: Path) -> dict[str, str]:
    """It dies between two pieces of the parameters that it sends."""
    start = f"threading.Thread(target=_kill_while_sending, args=({str(flag)!r},), daemon=True).start()"
    return {
        "import numpy as np\n": f"import numpy as np\n{KILL_WHILE_SENDING}",
        "self.center += (": f"{start}\n        self.center += (",
        **BIG,
    }


@pytest.mark.parametrize("phase", ["sending", "evaluating"])
def test_a_round_goes_on_without_a_learner_that_is_killed(stage: TrainingStage, phase: str) -> None:
    flag = stage.root / "flag"
    is_sending = phase == "sending"
    changes = killed_while_sending(flag) if is_sending else killed_while_evaluating(flag)
    calm = stage.repo(changes=BIG if is_sending else {})
    number = 1 if is_sending else 2
    config = stage.config(min_fit_clients=1, min_evaluate_clients=1, round_timeout_s=50.0, rounds=number)
    training = stage.train_in_thread(stage.aggregator_context(config, calm))
    stage.start_learner(0, calm)
    stage.start_learner(1, stage.repo("killed", changes=changes))
    left = stage.await_event(AGGREGATOR, "learner_left", timeout_s=50)
    assert left["learner"] == VICTIM
    assert left["time_s"] - flag.stat().st_mtime < 2.0
    training.result()
    record = stage.rounds()[-1]
    parts = {part.learner: part for part in record.participants}
    assert record.number == number
    assert record.duration_s < 50.0
    assert record.left_out == ((VICTIM,) if is_sending else ())
    assert (VICTIM in parts) == (not is_sending)
    if not is_sending:  # what it has trained counts
        assert (parts[VICTIM].rows, parts[VICTIM].accuracy) == (40, None)


def test_an_evaluation_waits_for_the_return_of_a_killed_learner(stage: TrainingStage) -> None:
    flag = stage.root / "flag"
    training = stage.train_in_thread(stage.aggregator_context(stage.config(), stage.repo()))
    stage.start_learner(0, stage.repo())
    victim = stage.start_learner(1, stage.repo("killed", changes=killed_while_evaluating(flag)))
    victim.wait(30)
    stage.start_learner(1, stage.repo())
    training.result()
    second = stage.rounds()[1]
    assert [part.learner for part in second.participants] == [CALM, VICTIM]
    assert all(part.rows == 40 and part.accuracy is not None for part in second.participants)


def test_an_evaluation_with_too_few_learners_fails_when_the_time_is_up(stage: TrainingStage) -> None:
    changes = killed_while_evaluating(stage.root / "flag")
    config = stage.config(round_timeout_s=4.0)
    training = stage.train_in_thread(stage.aggregator_context(config, stage.repo()))
    stage.start_learner(0, stage.repo())
    stage.start_learner(1, stage.repo("killed", changes=changes))
    error = training.failure()
    assert error.code is ErrorCode.TOO_FEW_LEARNERS
    assert "Round 2, evaluate: 1 of the 2 needed learners answered usably within 4 s" in error.message
    assert f"{VICTIM}: it left on node-1" in error.message


def test_a_late_answer_is_dropped_and_its_learner_takes_part_again(stage: TrainingStage) -> None:
    """The straggler's answer to round 1 would spoil every model; it comes while round 3 is trained."""
    go, has_answered = stage.root / "go", stage.root / "answered"
    late = {
        "self.center += (": "import pathlib, time\n        if self.config['server-round'] == 1:\n"
        f"            while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)\n"
        f"            self.center += 1e6; pathlib.Path({str(has_answered)!r}).touch()\n"
        "            return len(self.training)\n        self.center += ("
    }
    waits = {
        "self.center += (": "import pathlib, time\n        if self.config['server-round'] == 3:\n"
        f"            pathlib.Path({str(go)!r}).touch()\n"
        f"            while not pathlib.Path({str(has_answered)!r}).exists(): time.sleep(0.01)\n"
        "            time.sleep(1)\n        self.center += ("
    }
    config = stage.config(min_fit_clients=1, min_evaluate_clients=1, round_timeout_s=5.0, rounds=5)
    training = stage.train_in_thread(stage.aggregator_context(config, stage.repo()))
    stage.start_learner(0, stage.repo("calm", changes=waits))
    stage.start_learner(1, stage.repo("late", changes=late))
    training.result()
    rounds = stage.rounds()
    assert rounds[0].left_out == (VICTIM,)
    assert [part.learner for part in rounds[1].participants] == [CALM]
    for record in rounds[3:]:
        assert [part.learner for part in record.participants] == [CALM, VICTIM]
    with np.load(stage.root / AGGREGATOR / "checkpoint" / "round-5.npz") as last:
        assert abs(last["0"]).max() < 20.0
