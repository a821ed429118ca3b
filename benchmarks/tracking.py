"""Measures what tracking adds to a round, and whether a kill loses any of it.

Run from the root of the repository: ``.venv/bin/python benchmarks/tracking.py``, or ``make bench-tracking``.
A training of many short rounds with a small model: aggregator, learners and MLflow's server are real
processes on one machine. It is run with the server, and with an address where no server is, in turns: rounds
do not wait for tracking, so what it adds is what it takes from them by working beside them. The figure is the
median time from one round's end to the next's. With the server, the aggregator is killed in the middle;
afterwards, MLflow's own client looks for accuracy and loss of every round, and of every learner in it.
"""

from __future__ import annotations

import os
import signal
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

from harness import Figure, Report, alternate, arguments, tracking_server

from flops.testing.tracking import read_run
from flops.testing.training_stage import AGGREGATOR, TrainingStage

LEARNERS = 2
NOWHERE = "http://127.0.0.1:9"


def rounds_s(rounds: int, tracking_uri: str, *, is_tracked: bool) -> Figure:
    """Seconds from one round's end to the next's; a tracked training is killed once, and looked up."""
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as folder:
        stage = TrainingStage(Path(folder))
        try:
            config = stage.config(
                learners=LEARNERS, rounds=rounds, tracking_uri=tracking_uri, round_timeout_s=60.0
            )
            context = stage.aggregator_context(config, stage.repo())
            aggregator = stage.start_aggregator(context, is_tracking_played=False)
            for number in range(LEARNERS):
                stage.start_learner(number, stage.repo(), of=LEARNERS)
            if is_tracked:
                _await_round(stage, rounds // 2)
                os.kill(aggregator.pid, signal.SIGKILL)
                aggregator.wait()
                stage.start_aggregator(context, is_tracking_played=False)
            _await_round(stage, rounds)
            if is_tracked:
                stage.await_event(AGGREGATOR, "training_completed", timeout_s=600.0)
                _look_up(stage, tracking_uri, rounds)
            ends_s = [float(event["time_s"]) for event in stage.events(AGGREGATOR, "round_completed")]
            return Figure.of([end_s - start_s for start_s, end_s in pairwise(ends_s)])
        finally:
            stage.close()


def _await_round(stage: TrainingStage, number: int) -> None:
    is_last = partial(lambda last, event: event["record"]["number"] >= last, number)
    stage.await_event(AGGREGATOR, "round_completed", is_last, timeout_s=600.0)


def _look_up(stage: TrainingStage, tracking_uri: str, rounds: int) -> None:
    """End the benchmark unless MLflow has every number of every round once."""
    run = read_run(tracking_uri, stage.events(AGGREGATOR, "training_started")[-1]["run_id"])
    expected = {record.number: record for record in stage.rounds()}
    found = {"accuracy": run.accuracy, "loss": run.loss, **run.learner_accuracy}
    for name, points in found.items():
        if [number for number, _ in points] != list(range(1, rounds + 1)):
            raise SystemExit(f"MLflow has {len(points)} points of {name} for {rounds} rounds.")
    if run.accuracy != [(number, expected[number].accuracy) for number in sorted(expected)]:
        raise SystemExit("MLflow has other numbers than the rounds.")
    if len(run.learner_accuracy) != LEARNERS:
        raise SystemExit(f"MLflow has {len(run.learner_accuracy)} learners.")


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    rounds, runs = (20, 1) if options.smoke else (1_000, 3)
    report = Report(
        "tracking", ("rounds", "with MLflow, ms", "without, ms", "added, ms", "missing after a kill")
    )
    with tracking_server() as uri:
        works = {
            "tracked": lambda: rounds_s(rounds, uri, is_tracked=True).median,
            "untracked": lambda: rounds_s(rounds, NOWHERE, is_tracked=False).median,
        }
        found = alternate(works, runs)
    in_ms = {
        name: Figure(*(1e3 * value for value in (figure.median, figure.low, figure.high)), figure.runs)
        for name, figure in found.items()
    }
    added_ms = in_ms["tracked"].median - in_ms["untracked"].median
    cells = [f"{rounds:,}", in_ms["tracked"].text(), in_ms["untracked"].text(), f"{added_ms:.2f}", "none"]
    report.add(cells, rounds=rounds, added_ms=added_ms, **in_ms)
    report.print()


if __name__ == "__main__":
    main()
