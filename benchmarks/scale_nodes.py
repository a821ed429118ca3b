"""Measures what many nodes cost the control plane.

Run from the root of the repository: ``.venv/bin/python benchmarks/scale_nodes.py``, or ``make
bench-scale_nodes``. The control plane is a real one. The nodes are played by one process: each has a
connection of its own, says hello, and then sends its heartbeats as NodeEngine does, every 2 s, with a load
that changes, two addons, and a data tag; nothing is encrypted, as on loopback. Told is the processor time
of the control plane's process, without MLflow, and what it writes to files meanwhile.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harness import Figure, Report, arguments, cpu_s
from plot import Line, draw
from websockets.asyncio.client import ClientConnection, connect

from flops.adapters.system_clock import SystemClock
from flops.core.cluster import (
    HEARTBEAT_INTERVAL_S,
    IMAGE_BUILDER_ADDON,
    LEARNER_ADDON,
    Addon,
    AddonState,
    DataTag,
    NodeFacts,
    NodeLoad,
)
from flops.testing.chaos import Role, processes_of
from flops.testing.deployment import Deployment, deployed
from flops.wire.node import Heartbeat, Hello

ADDONS = tuple(
    Addon(name=name, state=AddonState.HEALTHY, port=11_027) for name in (LEARNER_ADDON, IMAGE_BUILDER_ADDON)
)
COLUMNS = {"image": "binary", "label": "int64", "taken_at": "timestamp[us]"}
TAGS = (DataTag(name="mnist", rows=10_000, size_bytes=3_000_000, columns=COLUMNS),)
FACTS = NodeFacts(hostname="played", cpu_cores=8, memory_mb=16_000, disk_free_mb=100_000)
JOINING_AT_ONCE = 50
PICTURE = Path(__file__).parents[1] / "docs" / "plots" / "nodes.svg"


def play_nodes(port: int, count: int, beats: Any) -> None:
    """Be so many nodes, until this process is ended; `beats` counts what they send."""
    asyncio.run(_play_all(port, count, beats))


async def _play_all(port: int, count: int, beats: Any) -> None:
    joining = asyncio.Semaphore(JOINING_AT_ONCE)
    await asyncio.gather(*(_play(port, number, joining, beats) for number in range(count)))


async def _play(port: int, number: int, joining: asyncio.Semaphore, beats: Any) -> None:
    uri = f"ws://127.0.0.1:{port}/api/node/link"
    async with joining:
        connection = await connect(uri, compression=None, proxy=None, open_timeout=60, ping_interval=None)
        hello = Hello(
            node_id=f"played-{number:05}",
            name=f"node-{number:05}",
            facts=FACTS,
            addons=ADDONS,
            data_tags=TAGS,
        )
        await connection.send(hello.model_dump_json())
        await connection.recv()  # the welcome
    await _beat(connection, random.Random(number), beats)  # noqa: S311 (a load that changes)


async def _beat(connection: ClientConnection, chance: random.Random, beats: Any) -> None:
    await asyncio.sleep(chance.uniform(0, HEARTBEAT_INTERVAL_S))
    while True:
        load = NodeLoad(
            cpu_percent=round(chance.uniform(0, 100), 1),
            memory_percent=round(chance.uniform(20, 30), 1),
            disk_free_mb=100_000 - chance.randrange(100),
            disk_total_mb=200_000,
        )
        beat = Heartbeat(load=load, addons=ADDONS, data_tags=TAGS, clock_s=SystemClock().now_s())
        await connection.send(beat.model_dump_json())
        beats.value += 1
        await asyncio.sleep(HEARTBEAT_INTERVAL_S)


@dataclass(frozen=True)
class Cost:
    """What so many nodes take."""

    share: Figure  # of a core, of the control plane
    beats_per_s: float  # heartbeats that it got
    written_mb_per_hour: float  # to files
    joined_s: float  # until all had joined


def measure(deployment: Deployment, count: int, runs: int, run_s: float) -> Cost:
    """Let so many nodes join, measure, and let them go."""
    (found,) = processes_of(deployment, Role.CONTROL_PLANE)
    context = multiprocessing.get_context("spawn")
    beats = context.Value("q", 0)
    played = (deployment.cluster_port, count, beats)
    nodes = context.Process(target=play_nodes, args=played, daemon=True)
    started_s = time.monotonic()
    nodes.start()
    try:
        deployment.wait_for(lambda: connected(deployment) == count, f"{count} nodes", timeout_s=300)
        joined_s = time.monotonic() - started_s
        time.sleep(HEARTBEAT_INTERVAL_S)
        before = beats.value, found.process.io_counters().write_bytes
        began_s = time.monotonic()
        shares = [_share(found.process, run_s) for _ in range(runs)]
        took_s = time.monotonic() - began_s
        sent, written = beats.value - before[0], found.process.io_counters().write_bytes - before[1]
        if connected(deployment) != count:
            raise SystemExit(f"Only {connected(deployment)} of {count} nodes were connected to the end.")
        return Cost(Figure.of(shares), sent / took_s, written / 1e6 / took_s * 3_600, joined_s)
    finally:
        nodes.kill()
        nodes.join()
        deployment.wait_for(lambda: connected(deployment) == 0, "the nodes to be gone")


def _share(process: psutil.Process, run_s: float) -> float:
    before_s, began_s = cpu_s(process), time.monotonic()
    time.sleep(run_s)
    return (cpu_s(process) - before_s) / (time.monotonic() - began_s)


def connected(deployment: Deployment) -> int:
    """How many nodes are connected, as users see it."""
    return int(deployment.ask("status")["nodes_connected"])


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    counts, runs, run_s = ([1, 10, 100, 300, 1_000], 3, 10.0) if not options.smoke else ([3], 1, 2.0)
    columns = ("nodes", "of a core", "heartbeats, 1/s", "written, MB/h", "all have joined after, s")
    report = Report("scale_nodes", columns)
    shares = []
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as folder, deployed(Path(folder)) as deployment:
        deployment.up()
        for count in counts:
            cost = measure(deployment, count, runs, run_s)
            shares.append(100 * cost.share.median)
            low, high = 100 * cost.share.low, 100 * cost.share.high
            report.add(
                [
                    str(count),
                    f"{shares[-1]:.1f} % ({low:.1f}–{high:.1f})",
                    f"{cost.beats_per_s:.0f}",
                    f"{cost.written_mb_per_hour:.1f}",
                    f"{cost.joined_s:.1f}",
                ],
                nodes=float(count),
                **vars(cost),
            )
    report.print()
    if not options.smoke:
        lines = [Line("control plane", counts, shares)]
        draw(PICTURE, "Nodes of a control plane", "nodes", "% of a core", lines)


if __name__ == "__main__":
    main()
