"""Trainings with a real data server, and aggregator and learners as processes."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flops.adapters.memory_tracker import MemoryTracker
from flops.core.project import Round
from flops.core.sla import EarlyStopping, Strategy, TargetMetric
from flops.errors import ErrorCode, FlopsError
from flops.network_rules import can_restrict
from flops.testing.training_stage import AGGREGATOR, LEARNER_TOKEN, PROJECT, TrainingStage

FAILING_FIT = {"self.center += (": "raise RuntimeError('the sensor is broken')\n        self.center += ("}
NAN_FIT = {"self.center += (self.training": "self.center += np.nan * (self.training"}


def slow_in_round(number: int, flag: Path) -> dict[str, str]:
    """A learner that says that it is in `number`'s training by making a file, and then takes very long."""
    return {
        "self.center += (": f"import pathlib, time\n        if self.config['server-round'] == {number}:\n"
        f"            pathlib.Path({str(flag)!r}).touch(); time.sleep(60)\n        self.center += ("
    }


def rounds_of(stage: TrainingStage) -> list[Round]:
    """The rounds that were told; the last one before a restart is told again."""
    return [record for record, _ in itertools.groupby(stage.rounds())]


def test_trains_and_hands_over_the_best_model(stage: TrainingStage) -> None:
    repo = stage.repo()
    training = stage.train_in_thread(stage.aggregator_context(stage.config(), repo))
    learners = [stage.start_learner(number, repo) for number in range(2)]
    training.result()
    assert [learner.wait(10) for learner in learners] == [0, 0]
    rounds = rounds_of(stage)
    assert [record.number for record in rounds] == [1, 2, 3]
    assert rounds[0].accuracy < rounds[1].accuracy < rounds[2].accuracy  # type: ignore[operator]
    assert {p.learner for p in rounds[0].participants} == {f"learner-{PROJECT}-0", f"learner-{PROJECT}-1"}
    assert {p.node for p in rounds[0].participants} == {"node-0", "node-1"}
    assert sum(p.rows for p in rounds[0].participants) == 80  # disjoint parts of 101 rows, 80 % each
    kinds = [event["kind"] for event in stage.events(AGGREGATOR)]
    assert kinds[0] == "listening"
    assert kinds.count("learner_joined") == 2
    assert "learner_left" not in kinds
    assert kinds[-1] == "training_completed"
    run = stage.tracker.runs[PROJECT]  # type: ignore[index]
    assert (run.status, sorted(run.rounds)) == ("FINISHED", [1, 2, 3])
    model = stage.events(AGGREGATOR, "training_completed")[0]["model"]
    assert (model["round"], model["accuracy"]) == (3, rounds[2].accuracy)
    with np.load(stage.root / AGGREGATOR / "best.npz") as best:
        assert best["0"].dtype == np.float32
        assert best["0"][0] == pytest.approx(8 * (1 - 0.5**3), rel=0.1)  # the means of the first 80 %


def test_the_aggregated_model_is_evaluated_by_rows(stage: TrainingStage) -> None:
    few = stage.repo("few", changes={"len(self.held_out)": "1"})
    many = stage.repo(
        "many", changes={"return distance, 1 / (1 + distance), len(self.held_out)": "return 1.0, 0.25, 3"}
    )
    few = stage.repo(
        "few", changes={"return distance, 1 / (1 + distance), len(self.held_out)": "return 5.0, 0.75, 1"}
    )
    training = stage.train_in_thread(stage.aggregator_context(stage.config(rounds=1), few))
    stage.start_learner(0, few)
    stage.start_learner(1, many)
    training.result()
    assert rounds_of(stage)[0].accuracy == pytest.approx((0.75 + 3 * 0.25) / 4)
    assert rounds_of(stage)[0].loss == pytest.approx((5.0 + 3 * 1.0) / 4)


def test_a_killed_learner_leaves_the_round_at_once(stage: TrainingStage) -> None:
    flag = stage.root / "in-round-2"
    config = stage.config(min_fit_clients=1, min_evaluate_clients=1, round_timeout_s=50.0)
    repo = stage.repo()
    training = stage.train_in_thread(stage.aggregator_context(config, repo))
    stage.start_learner(0, repo)
    victim = stage.start_learner(1, stage.repo("slow", changes=slow_in_round(2, flag)))
    stage.await_condition(flag.exists)
    killed = time.monotonic()
    victim.kill()
    left = stage.await_event(AGGREGATOR, "learner_left")
    assert time.monotonic() - killed < 2.0
    assert (left["learner"], left["node"]) == (f"learner-{PROJECT}-1", "node-1")
    training.result()
    assert rounds_of(stage)[1].left_out == (f"learner-{PROJECT}-1",)
    assert len(rounds_of(stage)) == 3


def test_a_learner_that_returns_saves_the_round(stage: TrainingStage) -> None:
    flag = stage.root / "in-round-2"
    training = stage.train_in_thread(stage.aggregator_context(stage.config(), stage.repo()))
    stage.start_learner(0, stage.repo())
    victim = stage.start_learner(1, stage.repo("slow", changes=slow_in_round(2, flag)))
    stage.await_condition(flag.exists)
    victim.kill()
    victim.wait()
    stage.start_learner(1, stage.repo())
    training.result()
    assert [len(record.participants) for record in rounds_of(stage)] == [2, 2, 2]
    assert rounds_of(stage)[1].left_out == ()


def test_too_few_learners_fail_the_round_when_the_time_is_up(stage: TrainingStage) -> None:
    flag = stage.root / "in-round-1"
    config = stage.config(round_timeout_s=3.0)
    training = stage.train_in_thread(stage.aggregator_context(config, stage.repo()))
    stage.start_learner(0, stage.repo())
    victim = stage.start_learner(1, stage.repo("slow", changes=slow_in_round(1, flag)))
    stage.await_condition(flag.exists)
    victim.kill()
    error = training.failure()
    assert error.code is ErrorCode.TOO_FEW_LEARNERS
    assert "1 of the 2 needed" in error.message
    assert "it left on node-1" in error.message
    assert stage.tracker.runs[PROJECT].status == "FAILED"  # type: ignore[index]


def test_a_straggler_is_left_out_when_the_time_is_up(stage: TrainingStage) -> None:
    config = stage.config(min_fit_clients=1, min_evaluate_clients=1, round_timeout_s=1.5, rounds=2)
    training = stage.train_in_thread(stage.aggregator_context(config, stage.repo()))
    stage.start_learner(0, stage.repo())
    stage.start_learner(1, stage.repo("slow", changes=slow_in_round(1, stage.root / "flag")))
    training.result()
    first, second = rounds_of(stage)
    assert first.left_out == (f"learner-{PROJECT}-1",)
    assert second.left_out == ()  # still busy: it is not asked, and nobody waits for it
    assert second.duration_s < 1.0


def test_the_users_exception_reaches_the_user(stage: TrainingStage) -> None:
    repo = stage.repo(changes=FAILING_FIT)
    training = stage.train_in_thread(stage.aggregator_context(stage.config(), repo))
    for number in range(2):
        stage.start_learner(number, repo)
    error = training.failure()
    assert error.code is ErrorCode.USER_CODE_FAILED
    assert "RuntimeError: the sensor is broken" in error.message
    line = next(
        n
        for n, text in enumerate((repo / "model_manager.py").read_text().splitlines(), 1)
        if "broken" in text
    )
    assert f'File "model_manager.py", line {line}, in fit_model' in error.details["traceback"]
    assert str(stage.root) not in error.details["traceback"]
    assert "ml_repo.py" not in error.details["traceback"]
    assert error.details["node"] in ("node-0", "node-1")
    assert error.details["round"] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (FAILING_FIT, "its code failed on node-1"),
        (NAN_FIT, "NaN or infinite"),
        ({"return len(self.training)": "import sys; sys.exit(3)"}, "SystemExit"),
    ],
)
def test_the_training_goes_on_without_a_learner_that_answers_badly(
    stage: TrainingStage, changes: dict[str, str], reason: str
) -> None:
    config = stage.config(min_fit_clients=1, min_evaluate_clients=1, rounds=2)
    repo = stage.repo()
    training = stage.train_in_thread(stage.aggregator_context(config, repo))
    stage.start_learner(0, repo)
    bad = stage.start_learner(1, stage.repo("bad", changes=changes))
    training.result()
    assert bad.wait(10) == 0  # it stays to the end, and is told to stop
    for record in rounds_of(stage):
        assert record.left_out == (f"learner-{PROJECT}-1",)
    told = [event["message"] for event in stage.events(AGGREGATOR, "progress")]
    assert any(reason in message for message in told), told


def test_a_round_without_an_evaluated_row_is_a_failure(stage: TrainingStage) -> None:
    repo = stage.repo(changes={"len(self.held_out)": "0"})
    training = stage.train_in_thread(stage.aggregator_context(stage.config(learners=1), repo))
    stage.start_learner(0, repo, of=1)
    error = training.failure()
    assert error.code is ErrorCode.ROUND_FAILED
    assert "no learner evaluated a single row" in error.message
    assert rounds_of(stage) == []


def test_a_round_without_numbers_is_never_the_best(stage: TrainingStage) -> None:
    nan_in_round_3 = {
        "distance = abs": "if self.config['server-round'] == 3:\n"
        "            return np.nan, np.inf, len(self.held_out)\n        distance = abs"
    }
    repo = stage.repo(changes=nan_in_round_3)
    training = stage.train_in_thread(stage.aggregator_context(stage.config(learners=1), repo))
    stage.start_learner(0, repo, of=1)
    training.result()
    third = rounds_of(stage)[2]
    assert (third.accuracy, third.loss) == (None, None)
    assert stage.events(AGGREGATOR, "training_completed")[0]["model"]["round"] == 2
    told = [event["message"] for event in stage.events(AGGREGATOR, "progress")]
    assert "Round 3 has no finite accuracy or loss; it cannot be the best." in told


def test_a_training_without_any_number_fails(stage: TrainingStage) -> None:
    repo = stage.repo(changes={"return distance, 1 / (1 + distance)": "return np.nan, np.nan"})
    training = stage.train_in_thread(stage.aggregator_context(stage.config(learners=1), repo))
    stage.start_learner(0, repo, of=1)
    error = training.failure()
    assert error.code is ErrorCode.ROUND_FAILED
    assert error.message.startswith("None of the 3 rounds has a finite accuracy or loss")
    assert stage.events(AGGREGATOR, "training_completed") == []


def test_missing_data_is_told_before_the_first_round(stage: TrainingStage) -> None:
    repo = stage.repo()
    training = stage.train_in_thread(stage.aggregator_context(stage.config(), repo))
    stage.start_learner(0, repo)
    process = stage.start_learner(1, repo, data_tags=("letters",), node="node-7")
    error = training.failure()
    assert error.code is ErrorCode.NO_MATCHING_DATA
    assert "node-7 holds no rows with the data tags letters" in error.message
    assert process.wait(10) == error.spec.exit_code
    failed = stage.await_event(f"learner-{PROJECT}-1", "failed")
    assert failed["error"]["code"] == "no_matching_data"


def test_code_that_cannot_be_loaded_is_told_before_the_first_round(stage: TrainingStage) -> None:
    repo = stage.repo(model_manager="import not_installed_anywhere\n")
    training = stage.train_in_thread(stage.aggregator_context(stage.config(), repo))
    error = training.failure()
    assert error.code is ErrorCode.USER_CODE_FAILED
    assert "model_manager.py, line 1: ModuleNotFoundError" in error.message


@pytest.mark.skipif(not can_restrict(), reason="the network of processes cannot be limited here")
@pytest.mark.parametrize("has_open_network", [False, True])
def test_code_that_makes_a_model_dials_nobody(stage: TrainingStage, *, has_open_network: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dial = (
            f"import socket\n        socket.create_connection({listener.getsockname()}, 5); exit(7)\n        "
        )
        repo = stage.repo(changes={"return [self.center": f"{dial}return [self.center"})
        context = stage.aggregator_context(stage.config(), repo, has_open_network=has_open_network)
        error = stage.train_in_thread(context).failure()
        assert error.code is ErrorCode.USER_CODE_FAILED
        listener.settimeout(0)
        if has_open_network:
            assert "SystemExit" in error.message
            listener.accept()[0].close()
        else:
            assert "PermissionError" in error.message
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_learners_that_do_not_come_are_not_waited_for_without_end(stage: TrainingStage) -> None:
    repo = stage.repo()
    config = stage.config(round_timeout_s=0.5)
    training = stage.train_in_thread(stage.aggregator_context(config, repo), join_patience_s=0.5)
    error = training.failure()
    assert error.code is ErrorCode.TOO_FEW_LEARNERS
    assert "joined within 0.5 s: none" in error.message


def test_a_wrong_token_is_refused(stage: TrainingStage) -> None:
    repo = stage.repo()
    config = stage.config(learners=1, round_timeout_s=3.0)
    training = stage.train_in_thread(stage.aggregator_context(config, repo), join_patience_s=3.0)
    intruder = stage.start_learner(0, repo, learner_token=f"not-{LEARNER_TOKEN}")
    assert intruder.wait(20) == FlopsError(ErrorCode.UNAUTHENTICATED, "").spec.exit_code
    assert training.failure().code is ErrorCode.TOO_FEW_LEARNERS
    assert stage.events(AGGREGATOR, "learner_joined") == []


@pytest.mark.parametrize("strategy", ["FedAvgM", "FedAdam"])
def test_a_killed_aggregator_goes_on_where_it_was(stage: TrainingStage, strategy: str) -> None:
    flag = stage.root / "in-round-3"
    momentum = {"server_momentum": 0.5} if strategy == "FedAvgM" else {"eta": 0.5}
    config = stage.config(rounds=4, strategy=Strategy(name=strategy, parameters=momentum))  # type: ignore[arg-type]
    repo = stage.repo()
    context = stage.aggregator_context(config, repo)
    aggregator = stage.start_aggregator(context)
    wait_once = {
        "self.center += (": f"import pathlib, time\n        flag = pathlib.Path({str(flag)!r})\n"
        "        if self.config['server-round'] == 3 and not flag.exists():\n"
        "            flag.touch(); time.sleep(1)\n        self.center += ("
    }
    learners = [stage.start_learner(0, repo), stage.start_learner(1, stage.repo("slow", changes=wait_once))]
    stage.await_condition(flag.exists)
    aggregator.kill()
    aggregator.wait()
    told = len(stage.events(AGGREGATOR))
    address = stage.address()
    aggregator = stage.start_aggregator(context)
    assert aggregator.wait(30) == 0, stage.output()
    assert [learner.wait(10) for learner in learners] == [0, 0]
    assert stage.await_event(AGGREGATOR, "listening", after=told)["address"] == address
    assert [record.number for record in rounds_of(stage)] == [1, 2, 3, 4]
    assert len(stage.events(f"learner-{PROJECT}-0", "progress")) == 2  # data and code were loaded once
    assert sorted(stage.kept_run().rounds) == [1, 2, 3, 4]
    undisturbed = _undisturbed_accuracies(stage, config)
    assert [record.accuracy for record in rounds_of(stage)] == pytest.approx(undisturbed)


def _undisturbed_accuracies(stage: TrainingStage, config: object) -> list[float | None]:
    """What the same training gives when nobody is killed."""
    other = TrainingStage(stage.root / "other") if (stage.root / "other").mkdir() is None else None
    assert other is not None
    try:
        repo = other.repo()
        training = other.train_in_thread(other.aggregator_context(config, repo))  # type: ignore[arg-type]
        for number in range(2):
            other.start_learner(number, repo)
        training.result()
        return [record.accuracy for record in rounds_of(other)]
    finally:
        other.close()


def test_a_killed_aggregator_hands_over_what_was_trained(stage: TrainingStage) -> None:
    """Killed while the model is exported, it needs no learner any more."""
    hanging = stage.root / "hanging-export"
    hanging.write_text(
        f"#!/bin/sh\nread -r arrays && read -r folder && touch {stage.root}/exporting; exec sleep 60\n"
    )
    hanging.chmod(0o755)
    repo = stage.repo()
    config = stage.config(learners=1, rounds=1)
    aggregator = stage.start_aggregator(stage.aggregator_context(config, repo, model_python=str(hanging)))
    stage.start_learner(0, repo, of=1)
    stage.await_condition((stage.root / "exporting").exists)
    import psutil

    children = psutil.Process(aggregator.pid).children(recursive=True)
    aggregator.kill()
    aggregator.wait()
    for child in children:
        child.kill()
    aggregator = stage.start_aggregator(stage.aggregator_context(config, repo))
    assert aggregator.wait(30) == 0, stage.output()
    assert len(stage.events(AGGREGATOR, "training_completed")) == 1


def test_a_completed_training_is_told_again_and_its_run_is_left_alone(stage: TrainingStage) -> None:
    """Killed after it has told the end, it is about to be stopped: a stop ends an open run as failed."""
    context = stage.aggregator_context(stage.config(learners=1, rounds=1), stage.repo())
    aggregator = stage.start_aggregator(context, "told@1000")
    stage.start_learner(0, stage.repo(), of=1)
    assert aggregator.wait(30) == -signal.SIGKILL, stage.output()
    tracked = stage.root / AGGREGATOR / "tracked.json"
    written_ns = tracked.stat().st_mtime_ns
    assert stage.start_aggregator(context).wait(30) == 0, stage.output()
    assert tracked.stat().st_mtime_ns == written_ns
    assert stage.kept_run().status == "FINISHED"
    first, again = stage.events(AGGREGATOR, "training_completed")
    assert first["model"] == again["model"]


def test_a_stopped_aggregator_ends_its_run(stage: TrainingStage) -> None:
    repo = stage.repo()
    aggregator = stage.start_aggregator(stage.aggregator_context(stage.config(), repo))
    stage.start_learner(0, repo)
    stage.await_event(AGGREGATOR, "learner_joined")
    aggregator.send_signal(signal.SIGTERM)
    assert aggregator.wait(10) == 130
    assert stage.kept_run().status == "FAILED"


def test_a_tracking_server_that_is_away_delays_no_round(stage: TrainingStage) -> None:
    stage.tracker.problem = FlopsError(ErrorCode.UNREACHABLE, "MLflow is away.")
    repo = stage.repo()
    training = stage.train_in_thread(stage.aggregator_context(stage.config(), repo))
    for number in range(2):
        stage.start_learner(number, repo)
    stage.await_condition(lambda: len(rounds_of(stage)) == 3, "three rounds")
    assert stage.events(AGGREGATOR, "training_started") == []
    stage.tracker.problem = None
    training.result()
    assert sorted(stage.tracker.runs[PROJECT].rounds) == [1, 2, 3]  # type: ignore[index]


def test_a_run_is_ended_once(stage: TrainingStage, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[bool] = []
    close_run = MemoryTracker.close_run

    def count(tracker: MemoryTracker, run_id: str, *, is_success: bool) -> None:
        ends.append(is_success)
        close_run(tracker, run_id, is_success=is_success)

    monkeypatch.setattr(MemoryTracker, "close_run", count)
    config = stage.config(learners=1, rounds=1)
    training = stage.train_in_thread(stage.aggregator_context(config, stage.repo()))
    stage.start_learner(0, stage.repo(), of=1)
    training.result()
    assert ends == [True]


def test_a_reached_target_ends_the_training(stage: TrainingStage) -> None:
    repo = stage.repo()
    config = stage.config(learners=1, rounds=50, target_metric=TargetMetric(name="accuracy", value=0.08))
    training = stage.train_in_thread(stage.aggregator_context(config, repo))
    stage.start_learner(0, repo, of=1)
    training.result()
    assert 1 < len(rounds_of(stage)) < 50
    assert any("reached the target" in e["message"] for e in stage.events(AGGREGATOR, "progress"))


def test_patience_ends_a_training_without_gain(stage: TrainingStage) -> None:
    repo = stage.repo(changes={"self.center += (self.training.mean() - self.center) / 2": "pass"})
    config = stage.config(learners=1, rounds=50, early_stopping=EarlyStopping(patience=2))
    training = stage.train_in_thread(stage.aggregator_context(config, repo))
    stage.start_learner(0, repo, of=1)
    training.result()
    assert len(rounds_of(stage)) == 3
    model = stage.events(AGGREGATOR, "training_completed")[0]["model"]
    assert model["round"] == 1


def test_the_strategys_config_reaches_the_users_code(stage: TrainingStage) -> None:
    seen = stage.root / "seen.json"
    repo = stage.repo(
        changes={
            "self.config = config": f"self.config = config\n        import json, pathlib\n"
            f"        pathlib.Path({str(seen)!r}).write_text(json.dumps(config))"
        }
    )
    strategy = Strategy(name="FedProx", parameters={"proximal_mu": 0.25})  # type: ignore[arg-type]
    config = stage.config(learners=1, rounds=1, strategy=strategy)
    training = stage.train_in_thread(stage.aggregator_context(config, repo))
    stage.start_learner(0, repo, of=1)
    training.result()
    assert json.loads(seen.read_text()) == {"server-round": 1, "proximal-mu": 0.25}


def test_updates_in_half_precision_train_nearly_the_same_model(stage: TrainingStage) -> None:
    seen = stage.root / "seen.json"
    repo = stage.repo(
        changes={
            "self.config = config": f"self.config = config\n        import json, pathlib\n"
            f"        pathlib.Path({str(seen)!r}).write_text(json.dumps(config))"
        }
    )
    config = stage.config(learners=1, rounds=2, update_precision="half")
    training = stage.train_in_thread(stage.aggregator_context(config, repo))
    stage.start_learner(0, repo, of=1)
    training.result()
    assert json.loads(seen.read_text()) == {"server-round": 2}  # how to answer is nothing of users' code
    with np.load(stage.root / AGGREGATOR / "best.npz") as best:
        assert best["0"].dtype == np.float32
        half = best["0"][0]
    full = 7.9 * (1 - 0.5**2)  # half of the way to the mean of 0, 0.2, … 15.8, twice
    assert half == pytest.approx(full, rel=2**-11)
    assert half != pytest.approx(full, rel=1e-6)


def test_a_frozen_learner_does_not_keep_the_aggregator(stage: TrainingStage) -> None:
    """A learner that neither answers nor leaves is not waited for at the end."""
    config = stage.config(min_fit_clients=1, min_evaluate_clients=1, round_timeout_s=1.0, rounds=1)
    repo = stage.repo()
    aggregator = stage.start_aggregator(stage.aggregator_context(config, repo))
    stage.start_learner(0, repo)
    frozen = stage.start_learner(1, stage.repo("slow", changes=slow_in_round(1, stage.root / "flag")))
    stage.await_condition((stage.root / "flag").exists)
    frozen.send_signal(signal.SIGSTOP)
    assert aggregator.wait(20) == 0, stage.output()


def test_large_parameters_travel_in_pieces(stage: TrainingStage) -> None:
    repo = stage.repo(changes={"np.ones((2, 2))": "np.full(10_000_000, 1.5)"})  # 80 MB
    training = stage.train_in_thread(stage.aggregator_context(stage.config(learners=1, rounds=1), repo))
    stage.start_learner(0, repo, of=1)
    training.result()
    with np.load(stage.root / AGGREGATOR / "best.npz") as best:
        assert best["1"].shape == (10_000_000,)
        assert (best["1"] == 1.5).all()


@pytest.mark.slow
def test_twenty_learners(stage: TrainingStage) -> None:
    stage.push("many", pa.table({"value": np.arange(2000.0)}))
    repo = stage.repo()
    config = stage.config(learners=20, rounds=5)
    training = stage.train_in_thread(stage.aggregator_context(config, repo), join_patience_s=50)
    learners = [stage.start_learner(number, repo, of=20, data_tags=("many",)) for number in range(20)]
    training.result(55)
    assert [learner.wait(20) for learner in learners] == [0] * 20
    assert [len(record.participants) for record in rounds_of(stage)] == [20] * 5
