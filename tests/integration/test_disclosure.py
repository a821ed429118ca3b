"""What leaves a node when users' code fails on it: on every path, for each choice of its operator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flops.actor import ActorContext
from flops.disclosure import Disclosure
from flops.errors import ErrorCode
from flops.testing.training_stage import AGGREGATOR, PROJECT, TrainingStage

SECRET = "patient-4711"
SAYS_AND_RAISES = f"print('{SECRET}', flush=True)\n        raise ValueError('{SECRET}')\n        "
LEARNER = f"learner-{PROJECT}-0"
HIDING = [Disclosure.MESSAGE, Disclosure.NONE]


def check(told: dict[str, Any], disclosure: Disclosure, *, line: str = "") -> None:
    """What may have left the node, and what must not."""
    text = json.dumps(told)
    assert "Traceback" not in text
    assert "traceback" not in told["details"]
    assert "output" not in told["details"]
    if disclosure is Disclosure.NONE:
        assert SECRET not in text
        assert "ValueError" not in text
        assert "operator" in told["hint"]
    else:
        assert f"ValueError: {SECRET}" in told["message"]
        assert line in told["message"]


@pytest.mark.parametrize("disclosure", HIDING)
def test_a_failing_fit(stage: TrainingStage, disclosure: Disclosure) -> None:
    repo = stage.repo(changes={"self.center += (": f"{SAYS_AND_RAISES}self.center += ("})
    training = stage.train_in_thread(stage.aggregator_context(stage.config(learners=1), stage.repo("other")))
    stage.start_learner(0, repo, of=1, disclosure=disclosure.value)
    error = training.failure()
    assert error.code is ErrorCode.USER_CODE_FAILED
    assert (error.details["node"], error.details["round"]) == ("node-0", 1)
    assert error.message.startswith("Round 1, train: The ML repository failed to train on node-0")
    check(error.to_dict(), disclosure, line="in model_manager.py, line 30")
    told = json.dumps(stage.events(AGGREGATOR)) + json.dumps(stage.events(LEARNER))
    assert disclosure is Disclosure.MESSAGE or SECRET not in told
    assert "Traceback" not in told
    output = (stage.root / LEARNER / "output.log").read_text()
    assert output.count(SECRET) >= 3  # printed, in the message, in the traceback
    assert "Traceback" in output


@pytest.mark.parametrize("disclosure", HIDING)
def test_a_failing_load(stage: TrainingStage, disclosure: Disclosure) -> None:
    changes = {"self.training, self.held_out": f"{SAYS_AND_RAISES}self.training, self.held_out"}
    training = stage.train_in_thread(stage.aggregator_context(stage.config(learners=1), stage.repo("other")))
    process = stage.start_learner(0, stage.repo(changes=changes), of=1, disclosure=disclosure.value)
    error = training.failure()
    check(error.to_dict(), disclosure, line="in model_manager.py, line ")
    assert "failed to load its data on node-0" in error.message
    assert process.wait(20) != 0
    (own,) = stage.events(LEARNER, "failed")
    check(own["error"], disclosure, line="in model_manager.py, line ")
    assert "Traceback" in (stage.root / LEARNER / "output.log").read_text()


@pytest.mark.parametrize("disclosure", HIDING)
def test_a_model_host_that_raises_hides_it_although_learners_would_not(
    stage: TrainingStage, disclosure: Disclosure
) -> None:
    repo = stage.repo(changes={"return [self.center": f"{SAYS_AND_RAISES}return [self.center"})
    context = stage.aggregator_context(stage.config(learners=1), repo, disclosure=disclosure.value)
    aggregator = stage.start_aggregator(context)
    assert aggregator.wait(30) != 0
    (failed,) = stage.events(AGGREGATOR, "failed")
    check(failed["error"], disclosure, line="in model_manager.py, line ")
    assert "Traceback" in (stage.root / AGGREGATOR / "output.log").read_text()


def test_the_last_words_of_a_model_host_that_tells_nothing(stage: TrainingStage) -> None:
    dies = f"import os\n        os.write(2, b'{SECRET}')\n        os._exit(3)\n        "
    repo = stage.repo(changes={"return [self.center": f"{dies}return [self.center"})
    context = stage.aggregator_context(stage.config(learners=1), repo, disclosure="message")
    error = stage.train_in_thread(context).failure()
    assert "ended with 3" in error.message
    assert SECRET not in json.dumps(error.to_dict())
    assert error.details["node"] == "node-0"


def test_an_aggregator_passes_on_what_another_node_reveals(stage: TrainingStage) -> None:
    repo = stage.repo(changes={"self.center += (": f"{SAYS_AND_RAISES}self.center += ("})
    other = stage.repo("other")
    context = stage.aggregator_context(stage.config(learners=1), other, disclosure="none")
    aggregator = stage.start_aggregator(context)
    stage.start_learner(0, repo, of=1)
    assert aggregator.wait(30) != 0
    (failed,) = stage.events(AGGREGATOR, "failed")
    assert f"ValueError: {SECRET}" in failed["error"]["message"]
    assert "raise ValueError" in failed["error"]["details"]["traceback"]


@pytest.mark.parametrize("disclosure", HIDING)
def test_an_export(stage: TrainingStage, disclosure: Disclosure) -> None:
    repo = stage.repo(changes={"return self\n": f"{SAYS_AND_RAISES}return self\n"})
    context = stage.aggregator_context(stage.config(), repo, disclosure=disclosure.value)
    (stage.root / "arrays.npz").write_bytes(_npz())
    ended = subprocess.run(
        [sys.executable, "-m", "flops.trainer.export", f"{context.work_dir}/context.json",
         str(stage.root / "arrays.npz"), str(stage.root / "model")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    told = json.loads(ended.stderr.splitlines()[-1])
    check(told, disclosure, line="in model_manager.py, line ")
    assert "Traceback" in ended.stderr


def test_a_model_that_cannot_be_loaded_for_serving(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text(f"flavors: {{python_function: {{loader_module: {SECRET}}}}}\n")
    for disclosure in HIDING:
        work_dir = tmp_path / disclosure.value
        work_dir.mkdir()
        context = ActorContext(
            service_id="inference-p1", project_id="p1", node_name="node-0", work_dir=str(work_dir),
            repo_dir=str(tmp_path), disclosure=disclosure.value,
        )  # fmt: skip
        ended = subprocess.run(
            [sys.executable, "-m", "flops.serving.app", str(context.save())],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode != 0
        events = [json.loads(line) for line in (work_dir / "events.jsonl").read_text().splitlines()]
        error = events[-1]["error"]
        assert error["code"] == ErrorCode.MODEL_UNLOADABLE
        assert "traceback" not in error["details"]
        assert (SECRET in error["message"]) is (disclosure is Disclosure.MESSAGE)
        assert "Traceback" in ended.stderr


def _npz() -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **{"0": np.zeros(3), "1": np.ones((2, 2))})
    return buffer.getvalue()
