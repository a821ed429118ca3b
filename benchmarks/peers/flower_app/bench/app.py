"""A Flower app whose clients do next to nothing, and whose server tells how long its rounds take."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

KEYS = ("learners", "size", "rounds", "told")  # of the run's configuration, or of the environment

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, _context: Context) -> Message:
    """Change one number."""
    (weights,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    weights = weights.copy()
    weights[0] += 1
    content = {"arrays": ArrayRecord([weights]), "metrics": MetricRecord({"num-examples": 80})}
    return Message(RecordDict(content), reply_to=message)


@client.evaluate()
def evaluate(message: Message, _context: Context) -> Message:
    """Tell one number."""
    (weights,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    numbers = MetricRecord({"num-examples": 20, "loss": float(weights[0])})
    return Message(RecordDict({"metrics": numbers}), reply_to=message)


class Timed(FedAvg):
    """Notes when a round's evaluation is aggregated, which is the end of the round."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ends_s: list[float] = []

    def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
        """Aggregate, and note the time."""
        found = super().aggregate_evaluate(server_round, replies)
        self.ends_s.append(time.perf_counter())
        return found


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and write the seconds of a round to the file ``told``."""
    environ = dict(os.environ)  # noqa: TID251 (no part of FLOps; the simulation takes no configuration)
    config = {key: context.run_config.get(key) or environ[f"BENCH_{key.upper()}"] for key in KEYS}
    learners = int(config["learners"])
    strategy = Timed(min_train_nodes=learners, min_evaluate_nodes=learners, min_available_nodes=learners)
    weights = ArrayRecord([np.zeros(int(config["size"]), dtype=np.float32)])
    strategy.start(grid=grid, initial_arrays=weights, num_rounds=int(config["rounds"]))
    times_s = [end_s - start_s for start_s, end_s in pairwise(strategy.ends_s)]
    Path(str(config["told"])).write_text(json.dumps({"round_s": median(times_s)}))
