"""An aggregator that is killed at every step of its work leaves no trace of it in what was trained."""

from __future__ import annotations

import itertools
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flops.core.project import Round
from flops.core.sla import Strategy
from flops.testing.training_stage import AGGREGATOR, TrainingStage

ROUNDS = 7
KILLS = (
    "aggregated@1",  # the strategy has taken a step, nothing is on disk
    "file-written@2",  # the new parameters are there, the strategy's state is not
    "history-written@3",  # everything is there, but does not count yet
    "saved@4",  # it counts, and nobody knows
    "told@5",  # the manager knows, MLflow does not
    "tracked@6",
    "best-kept",
    "ended@exports the model",
    "registered",
    "stored",
    "run-ended",
    "told@1000",  # everything is told, the process has not ended
)
STRATEGIES = {"FedAvg": {}, "FedAdam": {"eta": 0.5}, "FedAvgM": {"server_momentum": 0.5}}


class Blobs(BaseHTTPRequestHandler):
    """Takes everything."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def blobs_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Blobs)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/blobs"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "name",
    ["FedAdam", *(pytest.param(name, marks=pytest.mark.chaos) for name in ("FedAvg", "FedAvgM"))],
)
@pytest.mark.timeout(300)  # thirteen starts of an aggregator
def test_kills_at_every_step_change_no_bit_of_what_is_trained(
    tmp_path: Path, blobs_url: str, name: str
) -> None:
    strategy = Strategy.model_validate({"name": name, "parameters": STRATEGIES[name]})
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    disturbed = train(killed, blobs_url, strategy, KILLS)
    undisturbed = train(calm, blobs_url, strategy, ())
    for file in ("best.npz", f"checkpoint/round-{ROUNDS}.npz", f"checkpoint/strategy-{ROUNDS}.npz"):
        assert bits_of(killed / AGGREGATOR / file) == bits_of(calm / AGGREGATOR / file), file
    assert disturbed == undisturbed


def train(folder: Path, blobs_url: str, strategy: Strategy, kills: Sequence[str]) -> dict[str, Any]:
    """Train with a kill at each of these places; returns what the manager and MLflow know afterwards."""
    folder.mkdir()
    stage = TrainingStage(folder)
    try:
        config = stage.config(rounds=ROUNDS, strategy=strategy)
        context = stage.aggregator_context(config, stage.repo(), blobs_url=blobs_url)
        aggregator = stage.start_aggregator(context, *kills)
        for number in range(2):
            stage.start_learner(number, stage.repo())
        for place in kills:
            assert aggregator.wait(60) == -signal.SIGKILL, f"at {place}\n{stage.output()}"
            assert (folder / AGGREGATOR / f"killed-{place}").exists()
            aggregator = stage.start_aggregator(context, *kills)
        assert aggregator.wait(60) == 0, stage.output()
        return known_of(stage)
    finally:
        stage.close()


def known_of(stage: TrainingStage) -> dict[str, Any]:
    told = [Round.model_validate(event["record"]) for event in stage.events(AGGREGATOR, "round_completed")]
    run = stage.kept_run()
    models = {json.dumps(event["model"]) for event in stage.events(AGGREGATOR, "training_completed")}
    return {
        "told": [numbers_of(record) for record, _ in itertools.groupby(told)],  # a repetition changes nothing
        "tracked": [numbers_of(run.rounds[number]) for number in sorted(run.rounds)],
        "models": (models, len(run.models)),
        "status": run.status,
    }


def numbers_of(record: Round) -> tuple[object, ...]:
    rows = [(part.learner, part.rows, part.accuracy, part.loss) for part in record.participants]
    return record.number, record.accuracy, record.loss, record.left_out, rows


def bits_of(path: Path) -> dict[str, bytes]:
    """The arrays of a file; of one that is not there none, as of the state of a strategy without any."""
    if not path.exists():
        return {}
    with np.load(path) as stored:
        return {name: stored[name].tobytes() for name in stored.files}
