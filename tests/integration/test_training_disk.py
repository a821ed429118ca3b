"""A training on a full disk: nothing that was trained is lost, and the user is told what is waited for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.errors import ErrorCode
from flops.testing.disk import small_disk
from flops.testing.training_stage import AGGREGATOR, TrainingStage
from flops.trainer import tier
from flops.trainer.checkpoint import CheckpointStore

LEFT_BYTES = 64 * 1024  # enough for what is told, and for no parameters
MODEL = {"np.ones((2, 2))": "np.ones(50_000)"}  # 400 kB


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[TrainingStage]:
    """The aggregator works on a disk of its own, of 4 MiB."""
    with small_disk(tmp_path / AGGREGATOR, "4m"):
        stage = TrainingStage(tmp_path)
        yield stage
        stage.close()


def waits_in_round_3(stage: TrainingStage) -> Path:
    """A repository whose third training lasts until a file named `go` is there; it makes one named `flag`."""
    flag, go = stage.root / "flag", stage.root / "go"
    wait = (
        "import pathlib, time\n        if self.config['server-round'] == 3:\n"
        f"            pathlib.Path({str(flag)!r}).touch()\n"
        f"            while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)\n"
        "        self.center += ("
    )
    return stage.repo(changes={**MODEL, "self.center += (": wait})


def fill_the_disk(stage: TrainingStage) -> Path:
    """Fill it while the third round is trained."""
    stage.await_condition((stage.root / "flag").exists)
    ballast = stage.root / AGGREGATOR / "ballast"
    with ballast.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        os.ftruncate(file.fileno(), file.tell() - LEFT_BYTES)
    (stage.root / "go").touch()
    return ballast


def saved_rounds(stage: TrainingStage) -> int:
    found = CheckpointStore(stage.root / AGGREGATOR / "checkpoint").load()
    assert found is not None
    assert len(found.parameters) == 2
    return len(found.history)


def test_a_full_disk_pauses_the_training_until_there_is_space(stage: TrainingStage) -> None:
    repo = waits_in_round_3(stage)
    config = stage.config(learners=1, rounds=4)
    training = stage.train_in_thread(stage.aggregator_context(config, repo))
    stage.start_learner(0, repo, of=1)
    ballast = fill_the_disk(stage)
    told = stage.await_event(AGGREGATOR, "progress", lambda event: "waits for space" in event["message"])
    assert told["message"].startswith("Saving round 3 waits for space on the disk: ")
    assert "No space left on device" in told["message"]
    assert saved_rounds(stage) == 2
    ballast.unlink()
    training.result()
    assert saved_rounds(stage) == 4
    numbers = [event["record"]["number"] for event in stage.events(AGGREGATOR, "round_completed")]
    assert numbers == [1, 2, 3, 4]


def test_a_disk_that_stays_full_ends_the_training_which_can_go_on_later(
    stage: TrainingStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier, "DISK_PATIENCE_S", 0.5)
    repo = waits_in_round_3(stage)
    context = stage.aggregator_context(stage.config(learners=1, rounds=4), repo)
    training = stage.train_in_thread(context)
    learner = stage.start_learner(0, repo, of=1)
    ballast = fill_the_disk(stage)
    error = training.failure()
    assert error.code is ErrorCode.DISK_FULL
    assert "checkpoint" in error.message
    assert saved_rounds(stage) == 2
    learner.kill()
    ballast.unlink()
    again = stage.train_in_thread(context)
    address = stage.events(AGGREGATOR, "listening")[-1]["address"]
    stage.start_learner(0, repo, of=1, aggregator=address)
    again.result()
    assert saved_rounds(stage) == 4
