"""Measures what it takes to aggregate updates: time, and memory.

Run from the root of the repository: ``.venv/bin/python benchmarks/aggregation.py``, or ``make
bench-aggregation``. Each run is a process of its own that gets one update after the other, as they come from
a network, and aggregates them by FedAvg: as FLOps does it, which folds them in, by Flower's own strategy,
which wants all of them at the end, and by one streaming pass of numpy, which multiplies, adds and forgets.
The time is without that for making the updates. Memory is the process's peak beyond what it had before the
first update, in sizes of a model.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import strategy as flower
from harness import Figure, Report, alternate, arguments, memory_bytes

from flops.core.sla import Strategy, StrategyName
from flops.trainer.grid import ROWS, FlightGrid
from flops.trainer.links import LearnerServer, Link
from flops.trainer.strategy import RoundStrategy
from flops.wire.training import REPLY, Array, Message, Stream

NUMBER_BYTES = 4
HOW = ("flops", "flower", "numpy")


class Updates:
    """Updates that come one after the other; each is made anew, and is not kept here."""

    def __init__(self, count: int, size: int) -> None:
        self._count = count
        self._size = size
        self.made_s = 0.0  # how long making them took

    def __iter__(self) -> Iterator[tuple[Array, int]]:
        for number in range(self._count):
            started_s = time.perf_counter()
            update = np.full(self._size, number + 1, np.float32)
            self.made_s += time.perf_counter() - started_s
            yield update, 100 + number
            del update


def with_flops(updates: Updates, messages: list[FlowerMessage], start: Array) -> Array:
    """The mean as an aggregator computes it."""
    strategy = RoundStrategy(Strategy(name=StrategyName.FED_AVG))
    strategy.begin([start])
    for message, (update, rows) in zip(messages, updates, strict=True):
        reply = Message(REPLY, {"rows": rows, "metrics": {}}, [update])
        del update
        strategy.take(message, reply)
        reply.arrays.clear()
    (mean,) = strategy.aggregate_train(1)
    return mean


def with_flower(updates: Updates, messages: list[FlowerMessage], _start: Array) -> Array:
    """The mean as Flower's own strategy computes it from its own records."""
    replies = []
    for message, (update, rows) in zip(messages, updates, strict=True):
        records: dict[str, Any] = {"arrays": ArrayRecord([update]), "metrics": MetricRecord({ROWS: rows})}
        del update
        replies.append(FlowerMessage(RecordDict(records), reply_to=message))
    record, _ = flower.FedAvg().aggregate_train(1, replies)
    if record is None:
        raise SystemExit("Flower's strategy gave no parameters.")
    (mean,) = record.to_numpy_ndarrays()
    return mean


def with_numpy(updates: Updates, _messages: list[FlowerMessage], start: Array) -> Array:
    """The mean in one pass over the updates."""
    total, scaled, weight = np.zeros_like(start), np.empty_like(start), 0
    for update, rows in updates:
        np.multiply(update, rows, out=scaled)
        np.add(total, scaled, out=total)
        weight += rows
    total /= weight
    return total


def measure(how: str, count: int, size: int) -> tuple[float, float]:
    """Seconds, and peak memory in models, of one aggregation in a process of its own."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_aggregate, args=(theirs, how, count, size))
    child.start()
    theirs.close()
    seconds, models = ours.recv()
    child.join()
    return seconds, models


def _aggregate(told: Connection, how: str, count: int, size: int) -> None:
    work = {"flops": with_flops, "flower": with_flower, "numpy": with_numpy}[how]
    server = LearnerServer("127.0.0.1", 0, "secret")
    grid = FlightGrid(server)
    grid.show([Link(f"learner-{n}", "node", 0, Stream(None, None)) for n in range(count)])  # type: ignore[arg-type]
    start = np.zeros(size, np.float32)
    asked = list(flower.FedAvg().configure_train(1, ArrayRecord(), ConfigRecord({}), grid))
    server.stop()
    updates = Updates(count, size)
    before = memory_bytes("VmRSS")
    started_s = time.perf_counter()
    mean = work(updates, asked, start)
    seconds = time.perf_counter() - started_s - updates.made_s
    rows = np.arange(count) + 100.0
    np.testing.assert_allclose(
        mean[:: max(1, size // 100)], np.average(np.arange(count) + 1.0, weights=rows), rtol=1e-5
    )
    told.send((seconds, (memory_bytes("VmHWM") - before) / (size * NUMBER_BYTES)))


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    cases, runs = [(10, 25_000_000), (50, 25_000_000)], 3
    if options.smoke:
        cases, runs = [(3, 100_000)], 1
    columns = [f"{how}, {unit}" for how in ("FLOps", "Flower", "numpy") for unit in ("s", "models")]
    report = Report("aggregation", ("updates", "parameters", *columns, "FLOps / numpy", "Flower / FLOps"))
    for count, size in cases:
        memory: dict[str, list[float]] = {how: [] for how in HOW}

        def once(how: str, count: int = count, size: int = size) -> float:
            seconds, models = measure(how, count, size)
            memory[how].append(models)  # noqa: B023 (called within this turn of the loop only)
            return seconds

        took = alternate({how: partial(once, how) for how in HOW}, runs)
        peaks = {how: Figure.of(models) for how, models in memory.items()}
        cells = [cell for how in HOW for cell in (took[how].text(), f"{peaks[how].median:.1f}")]
        report.add(
            [
                str(count),
                f"{size:,}",
                *cells,
                f"{took['flops'].median / took['numpy'].median:.1f}",
                f"{took['flower'].median / took['flops'].median:.1f}",
            ],
            updates=count,
            parameters=size,
            **{f"{how}_s": figure for how, figure in took.items()},
            **{f"{how}_models": figure for how, figure in peaks.items()},
        )
    report.print()


if __name__ == "__main__":
    main()
