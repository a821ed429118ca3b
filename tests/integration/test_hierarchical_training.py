"""Hierarchical trainings: a root aggregator, the clusters' aggregators, and their learners, as processes."""

from __future__ import annotations

import itertools
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flops.core.project import Round
from flops.core.sla import Strategy
from flops.errors import ErrorCode
from flops.testing.training_stage import AGGREGATOR, PROJECT, TrainingStage
from flops.wire.services import AggregatorConfig

CLUSTERS = 3


def cluster(number: int) -> str:
    return f"{AGGREGATOR}-{number}"


def root_config(
    stage: TrainingStage, *, clusters: int = CLUSTERS, cycles: int, **changes: Any
) -> AggregatorConfig:
    needed = {"min_fit_clients": 1, "min_evaluate_clients": 1}
    return stage.config(learners=clusters, rounds=cycles, has_clusters=True, **{**needed, **changes})


def start_clusters(
    stage: TrainingStage, repo: Path, *, clusters: int = CLUSTERS, each: int = 2, **changes: Any
) -> list[subprocess.Popen[bytes]]:
    """Start the clusters with `each` learners; learner n of all is of the cluster n // each."""
    processes = []
    for number in range(clusters):
        context = stage.cluster_context(number, learners=each, **changes)
        processes.append(stage.start_aggregator(context))
    for learner in range(clusters * each):
        above = stage.address(cluster(learner // each))
        stage.start_learner(learner, repo, of=clusters * each, aggregator=above)
    return processes


def cycles_of(stage: TrainingStage) -> list[Round]:
    return [record for record, _ in itertools.groupby(stage.rounds())]


def best_of(stage: TrainingStage) -> np.ndarray[Any, Any]:
    with np.load(stage.root / AGGREGATOR / "best.npz") as best:
        return np.asarray(best["0"])


@pytest.mark.timeout(240)
def test_one_round_a_cycle_is_flat_averaging(tmp_path: Path) -> None:
    """Three clusters of two unequal learners, and six learners of one aggregator, learn the same."""
    found: dict[str, tuple[np.ndarray[Any, Any], list[Round]]] = {}
    for shape in ("flat", "tree"):
        (tmp_path / shape).mkdir()
        stage = TrainingStage(tmp_path / shape)
        try:
            repo = stage.repo(
                changes={"self.training.mean()": "self.training[: 5 + int(self.training[0])].mean()"}
            )
            if shape == "flat":
                training = stage.train_in_thread(stage.aggregator_context(stage.config(learners=6), repo))
                for number in range(6):
                    stage.start_learner(number, repo, of=6)
            else:
                config = root_config(stage, cycles=3)
                training = stage.train_in_thread(stage.aggregator_context(config, repo))
                start_clusters(stage, repo, rounds=1)
            training.result(90)
            found[shape] = best_of(stage), cycles_of(stage)
        finally:
            stage.close()
    (flat, rounds), (tree, cycles) = found["flat"], found["tree"]
    assert np.allclose(flat, tree, rtol=1e-6)
    assert [r.accuracy for r in rounds] == pytest.approx([c.accuracy for c in cycles], rel=1e-6)
    assert [r.loss for r in rounds] == pytest.approx([c.loss for c in cycles], rel=1e-6)
    by_rows = [sum(p.rows for p in r.participants) for r in (*rounds, *cycles)]
    assert len(set(by_rows)) == 1  # the rows of clusters are those of their learners
    assert [len(c.participants) for c in cycles] == [3, 3, 3]


@pytest.mark.timeout(240)
def test_cycles_of_rounds_with_one_update_of_each_cluster(stage: TrainingStage) -> None:
    repo = stage.repo()
    config = root_config(stage, cycles=2)
    training = stage.train_in_thread(stage.aggregator_context(config, repo))
    aggregators = start_clusters(stage, repo, rounds=3)
    training.result(90)
    assert [process.wait(20) for process in aggregators] == [0, 0, 0]
    first, second = cycles_of(stage)
    assert [p.cluster for p in first.participants] == ["cluster-0", "cluster-1", "cluster-2"]
    numbers = [[r.number for r in p.rounds] for p in (*first.participants, *second.participants)]
    assert numbers == [[1, 2, 3]] * 3 + [[4, 5, 6]] * 3
    for part in first.participants:
        assert {p.learner for r in part.rounds for p in r.participants} == {
            f"learner-{PROJECT}-{2 * int(part.learner[-1]) + number}" for number in range(2)
        }
        assert part.rows == sum(p.rows for p in part.rounds[-1].participants)
    # Three rounds leave an eighth of the way, after two cycles a sixty-fourth.
    with np.load(stage.root / AGGREGATOR / "checkpoint" / "round-2.npz") as last:
        assert last["0"][0] == pytest.approx(8 * (1 - 0.5**6), rel=0.1)
    # The streams stay up: everybody has joined once and loaded once.
    for number in range(CLUSTERS):
        kinds = [event["kind"] for event in stage.events(cluster(number))]
        assert kinds.count("learner_joined") == 2
        assert "learner_left" not in kinds
    assert len(stage.events(AGGREGATOR, "learner_joined")) == CLUSTERS
    run = stage.tracker.runs[PROJECT]  # type: ignore[index]
    assert run.params["training_cycles"] == "2"
    assert sorted(run.rounds) == [1, 2]


@pytest.mark.timeout(240)
def test_kills_of_root_and_clusters_change_no_bit(tmp_path: Path) -> None:
    """Within and between cycles, with a momentum in both tiers."""
    calm = train_tree(tmp_path / "calm", (), ())
    killed = train_tree(
        tmp_path / "killed", ("saved@1", "told@2", "registered"), ("saved@2", "aggregated@3", "told@4")
    )
    assert killed == calm


def train_tree(folder: Path, of_root: Sequence[str], of_cluster: Sequence[str]) -> object:
    """Train with two clusters, and kills of the root and a cluster's aggregator; returns what came of it."""
    folder.mkdir()
    stage = TrainingStage(folder)
    strategy = Strategy.model_validate({"name": "FedAvgM", "parameters": {"server_momentum": 0.5}})
    all_needed = {"min_fit_clients": 2, "min_evaluate_clients": 2}
    try:
        repo = stage.repo()
        config = root_config(stage, clusters=2, cycles=3, strategy=strategy, **all_needed)
        context = {AGGREGATOR: stage.aggregator_context(config, repo)}
        kills: dict[str, Sequence[str]] = {AGGREGATOR: of_root, cluster(0): (), cluster(1): of_cluster}
        running = {AGGREGATOR: stage.start_aggregator(context[AGGREGATOR], *of_root)}
        for number in range(2):
            name = cluster(number)
            context[name] = stage.cluster_context(number, learners=1, rounds=2, strategy=strategy)
            running[name] = stage.start_aggregator(context[name], *kills[name])
            stage.start_learner(number, repo, aggregator=stage.address(name))
        for _ in (*of_root, *of_cluster):
            stage.await_condition(
                lambda: any(process.poll() is not None for process in running.values()), timeout_s=60
            )
            name = next(name for name, process in running.items() if process.poll() is not None)
            assert running[name].wait() == -signal.SIGKILL, f"{name}\n{stage.output()}"
            running[name] = stage.start_aggregator(context[name], *kills[name])
        assert running[AGGREGATOR].wait(60) == 0, stage.output()
        tracked = [(r.number, r.accuracy, r.loss) for _, r in sorted(stage.kept_run().rounds.items())]
        return best_of(stage).tobytes(), tracked
    finally:
        stage.close()


@pytest.mark.timeout(120)
def test_a_cluster_that_is_gone_is_left_out_until_it_is_back(stage: TrainingStage) -> None:
    repo = stage.repo(changes={"self.center += (": "import time; time.sleep(0.2)\n        self.center += ("})
    config = root_config(stage, clusters=2, cycles=40, target_metric={"name": "loss", "value": -1.0})
    training = stage.start_aggregator(stage.aggregator_context(config, repo))
    processes = start_clusters(stage, repo, clusters=2, each=1, rounds=2)
    stage.await_event(AGGREGATOR, "round_completed", timeout_s=60)
    processes[1].kill()
    processes[1].wait()
    without = stage.await_event(
        AGGREGATOR, "round_completed", lambda e: len(e["record"]["participants"]) == 1, timeout_s=30
    )
    left = stage.events(AGGREGATOR, "learner_left")
    assert [event["learner"] for event in left] == [cluster(1)]
    stage.start_aggregator(stage.cluster_context(1, learners=1, rounds=2))
    stage.await_event(
        AGGREGATOR,
        "round_completed",
        lambda e: (
            e["record"]["number"] > without["record"]["number"] and len(e["record"]["participants"]) == 2
        ),
        timeout_s=60,
    )
    assert training.poll() is None


@pytest.mark.timeout(120)
def test_a_cluster_without_learners_is_left_out(stage: TrainingStage) -> None:
    repo = stage.repo()
    config = root_config(stage, clusters=2, cycles=1)
    training = stage.train_in_thread(stage.aggregator_context(config, repo))
    processes = start_clusters(stage, repo, clusters=2, each=1, rounds=1, load_timeout_s=30)
    # The second one's only learner has no data: its cluster cannot take part.
    stage.processes[-1].kill()
    other = stage.start_learner(1, repo, aggregator=stage.address(cluster(1)), data_tags=("nothing",))
    training.result(60)
    assert other.wait(30) != 0
    assert processes[1].wait(30) != 0
    (record,) = cycles_of(stage)
    assert [part.learner for part in record.participants] == [cluster(0)]
    told = [event["message"] for event in stage.events(AGGREGATOR, "progress")]
    assert any("cluster" in m and cluster(1) in m and "not waited for" in m for m in told), told


@pytest.mark.timeout(60)
def test_the_users_exception_in_every_cluster_reaches_the_user(stage: TrainingStage) -> None:
    repo = stage.repo(
        changes={"self.center += (": "raise RuntimeError('the sensor is broken')\n        self.center += ("}
    )
    config = root_config(stage, clusters=1, cycles=1)
    training = stage.train_in_thread(stage.aggregator_context(config, repo))
    start_clusters(stage, repo, clusters=1, each=2, rounds=1)
    error = training.failure()
    assert error.code is ErrorCode.USER_CODE_FAILED
    assert "the sensor is broken" in error.message
    assert "Cycle 1, train" in error.message


@pytest.mark.timeout(60)
def test_a_cluster_that_is_stopped_before_it_joins_is_not_waited_for(stage: TrainingStage) -> None:
    repo = stage.repo()
    config = root_config(stage, clusters=2, cycles=1)
    training = stage.train_in_thread(stage.aggregator_context(config, repo), join_patience_s=600.0)
    (other,) = [
        process
        for number, process in enumerate(start_clusters(stage, repo, clusters=2, each=1, rounds=1))
        if number == 1
    ]
    stage.processes[-1].kill()  # its only learner
    stage.await_event(cluster(1), "progress", lambda e: "Waiting for 1 learner" in e["message"])
    other.send_signal(signal.SIGTERM)
    training.result(40)
    assert other.wait(20) == 130
    assert stage.events(cluster(1), "failed") == []  # its node may start it again
    (record,) = cycles_of(stage)
    assert [part.learner for part in record.participants] == [cluster(0)]


def test_clusters_send_changes_in_half_precision(stage: TrainingStage) -> None:
    config = root_config(stage, cycles=2, clusters=1, update_precision="half")
    training = stage.train_in_thread(stage.aggregator_context(config, stage.repo()))
    start_clusters(stage, stage.repo(), clusters=1, each=1, rounds=1, update_precision="half")
    training.result(60)
    full = 7.9 * (1 - 0.5**2)  # half of the way to the mean of 0, 0.2, … 15.8, twice
    assert best_of(stage)[0] == pytest.approx(full, rel=2**-10)
    assert best_of(stage)[0] != pytest.approx(full, rel=1e-6)
