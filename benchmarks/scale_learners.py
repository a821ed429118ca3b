"""Measures what a round costs by the number of learners, with one aggregator and with clusters below a root.

Run from the root of the repository: ``.venv/bin/python benchmarks/scale_learners.py``, or ``make
bench-scale_learners``. Aggregators are real processes that track in MLflow. Learners are played, many in a
process: each has a connection of its own and speaks the real protocol, but returns the parameters that it
got, so that a round is the aggregators' work. Told is the processor time of all aggregators together for a
round, or for a cycle of one round; seconds on the clock are beside it, but the learners take the same cores
then. Bytes are those of the kernel for all connections of the aggregator at the top, both ways: what
crosses the uplink when learners or clusters are elsewhere.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from harness import Report, arguments, cpu_s
from plot import Line, draw, exponent
from rounds import MODEL_MANAGER

from flops.testing.played_learner import PlayedLearner
from flops.testing.training_stage import AGGREGATOR, LEARNER_TOKEN, PROJECT, TrainingStage

PARAMETERS = 10_000  # of 4 bytes each
WARM = 2  # rounds that are not measured: threads and buffers are made in them
IN_A_PROCESS = 50
PICTURES = Path(__file__).parents[1] / "docs" / "plots"
_BYTES = re.compile(r"bytes_(?:sent|received):(\d+)")


@dataclass(frozen=True)
class Cost:
    """What a round takes, on average over some."""

    cpu_s: float  # of all aggregators
    wall_s: float
    top_bytes: float  # through the port of the aggregator at the top


def play_learners(port: int, names: Sequence[str]) -> None:
    """Be these learners until the training is over."""
    learners = [PlayedLearner(port, name, token=LEARNER_TOKEN) for name in names]
    for learner in learners:
        learner.wait()
        learner.close()


def flat(learners: int, rounds: int) -> Cost:
    """One aggregator with so many learners."""
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as folder:
        stage = TrainingStage(Path(folder))
        children: list[BaseProcess] = []
        try:
            top = _start_top(stage, learners, WARM + rounds)
            children += _start_learners(stage, AGGREGATOR, range(learners))
            return _measure(stage, [top], rounds)
        finally:
            _end(stage, children)


def tree(learners: int, clusters: int, rounds: int) -> Cost:
    """The same learners in clusters, each with an aggregator below the root."""
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as folder:
        stage = TrainingStage(Path(folder))
        children: list[BaseProcess] = []
        try:
            aggregators = [_start_top(stage, clusters, WARM + rounds, has_clusters=True)]
            each = learners // clusters
            for number in range(clusters):
                context = stage.cluster_context(number, learners=each, rounds=1, round_timeout_s=300.0)
                aggregators.append(psutil.Process(stage.start_aggregator(context).pid))
                own = range(number * each, (number + 1) * each)
                children += _start_learners(stage, context.service_id, own)
            return _measure(stage, aggregators, rounds)
        finally:
            _end(stage, children)


def _start_top(
    stage: TrainingStage, learners: int, rounds: int, *, has_clusters: bool = False
) -> psutil.Process:
    config = stage.config(
        learners=learners,
        rounds=rounds,
        has_clusters=has_clusters,
        tracking_uri=f"sqlite:///{stage.root}/mlflow.db",
        round_timeout_s=600.0,
    )
    repo = stage.repo(model_manager=MODEL_MANAGER.format(size=PARAMETERS))
    context = stage.aggregator_context(config, repo)
    return psutil.Process(stage.start_aggregator(context, is_tracking_played=False).pid)


def _start_learners(stage: TrainingStage, aggregator: str, numbers: range) -> list[BaseProcess]:
    port = int(stage.address(aggregator).rpartition(":")[2])
    started = []
    for at in range(0, len(numbers), IN_A_PROCESS):
        names = [f"learner-{PROJECT}-{number}" for number in numbers[at : at + IN_A_PROCESS]]
        child = multiprocessing.get_context("spawn").Process(
            target=play_learners, args=(port, names), daemon=True
        )
        child.start()
        started.append(child)
    return started


def _measure(stage: TrainingStage, aggregators: Sequence[psutil.Process], rounds: int) -> Cost:
    port = int(stage.address().rpartition(":")[2])
    seen = []
    for number in (WARM, WARM + rounds - 1):  # connections end with the last round
        has_ended = partial(lambda count: len(stage.events(AGGREGATOR, "round_completed")) >= count, number)
        stage.await_condition(has_ended, f"round {number}", timeout_s=600.0)
        done = len(stage.events(AGGREGATOR, "round_completed"))
        seen.append((done, sum(map(cpu_s, aggregators)), time.monotonic(), _bytes_of(port)))
    (first, *before), (last, *after) = seen
    return Cost(*((late - early) / (last - first) for early, late in zip(before, after, strict=True)))


def _bytes_of(port: int) -> int:
    """Bytes that all connections of a port have carried, both ways."""
    told = subprocess.run(
        ["ss", "--tcp", "--info", "--numeric", "--no-header", "state", "established", f"sport = :{port}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return sum(int(count) for count in _BYTES.findall(told))


def _end(stage: TrainingStage, children: Sequence[BaseProcess]) -> None:
    for child in children:
        child.kill()
        child.join()
    stage.close()


def main() -> None:
    """Print the table, and draw the plots."""
    options = arguments(__doc__)
    counts, clusters, rounds = ([10, 20, 50, 100, 200, 500], 10, 20) if not options.smoke else ([4], 2, 3)
    columns = ("learners", "shape", "processor, s", "clock, s", "through the top, MB")
    report = Report("scale_learners", columns)
    costs: dict[str, list[Cost]] = {"flat": [], "tree": []}
    for learners in counts:
        for shape in costs:
            cost = flat(learners, rounds) if shape == "flat" else tree(learners, clusters, rounds)
            costs[shape].append(cost)
            cells = [f"{cost.cpu_s:.3f}", f"{cost.wall_s:.3f}", f"{cost.top_bytes / 1e6:.2f}"]
            report.add([str(learners), shape, *cells], learners=float(learners), shape=shape, **vars(cost))
    if len(counts) < 2:
        report.print()
        return
    cpu = [Line(name, counts, [cost.cpu_s for cost in found]) for name, found in costs.items()]
    size = [Line(name, counts, [cost.top_bytes / 1e6 for cost in found]) for name, found in costs.items()]
    draw(PICTURES / "round.svg", "A round of 10,000 parameters", "learners", "processor, s", cpu)
    draw(PICTURES / "uplink.svg", "Through the aggregator at the top", "learners", "MB a round", size)
    grows = "; ".join(f"{line.name}: learners^{exponent(line):.2f}" for line in cpu)
    report.print(f"Processor time of a round grows as {grows}.")


if __name__ == "__main__":
    main()
