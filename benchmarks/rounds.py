"""Measures what a round costs beyond the learners' own work.

Run from the root of the repository: ``.venv/bin/python benchmarks/rounds.py``, or ``make bench-rounds``.
Aggregator and learners are real processes on one machine; the learners' code does next to nothing, so that
nearly all of a round is FLOps: parameters to all learners to be evaluated and trained, theirs back, their
mean, the checkpoint, and the events. Rounds are tracked in MLflow meanwhile, by a server on the same machine.
The time of a round is that from one round's end to the next's, without the slowest learner's fit and
evaluation. Beside it stands the highest memory of the aggregator's process.

The limit moves the same bytes over loopback, to each learner and back, and adds each answer up once: no
round can be faster. After ``make peers`` the same model is trained by Flower's simulation, by Flower's
deployment engine and by NVIDIA FLARE's simulator, too (benchmarks/peers/).
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from harness import Figure, Report, alternate, arguments, memory_bytes, timed, tracking_server

from flops.testing.training_stage import AGGREGATOR, TrainingStage

PEERS_PYTHON = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"
PEERS = ("flower-simulation", "flower-deployment", "nvflare-simulator")
PEER_CASES = frozenset({(2, 10_000), (10, 10_000), (2, 1_000_000), (2, 25_000_000)})  # they take minutes
MODEL_MANAGER = """
import numpy as np
from data_manager import DataManager
from flops_utils.ml_repo_templates import ModelManagerTemplate

class ModelManager(ModelManagerTemplate):
    def __init__(self):
        self.weights = np.zeros({size}, dtype=np.float32)

    def set_model_data(self):
        self.training, self.held_out = DataManager().get_data()

    def get_model(self):
        return self

    def get_model_parameters(self):
        return [self.weights]

    def set_model_parameters(self, parameters):
        (self.weights,) = parameters

    def fit_model(self):
        self.weights[0] += 1
        return len(self.training)

    def evaluate_model(self):
        return float(self.weights[0]), 0.5, len(self.held_out)
"""


def flops_round_s(tracking_uri: str, learners: int, size: int, rounds: int, peaks_mb: list[float]) -> float:
    """Seconds of a round, without the first one and without the slowest learner's own work.

    The aggregator's highest memory is added to `peaks_mb`.
    """
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as folder:
        stage = TrainingStage(Path(folder))
        try:
            repo = stage.repo(model_manager=MODEL_MANAGER.format(size=size))
            config = stage.config(
                learners=learners,
                rounds=rounds,
                tracking_uri=tracking_uri,
                round_timeout_s=300.0,
            )
            context = stage.aggregator_context(config, repo)
            aggregator = stage.start_aggregator(context, is_tracking_played=False)
            for number in range(learners):
                stage.start_learner(number, repo, of=learners)
            last = partial(lambda count, event: event["record"]["number"] == count, rounds)
            stage.await_event(AGGREGATOR, "round_completed", last, timeout_s=600.0)
            peaks_mb.append(memory_bytes("VmHWM", aggregator.pid) / 1e6)
            ends_s = [float(event["time_s"]) for event in stage.events(AGGREGATOR, "round_completed")]
            overheads_s = [
                end_s
                - start_s
                - max(part.fit_s for part in record.participants)
                - max(part.evaluate_s for part in record.participants)
                for (start_s, end_s), record in zip(pairwise(ends_s), stage.rounds()[1:], strict=True)
            ]
            return Figure.of(overheads_s).median
        finally:
            stage.close()


def limit_s(learners: int, size: int) -> float:
    """Seconds to move the parameters to each learner and back over loopback, and to add them up once."""
    parameters = np.ones(size, dtype=np.float32)
    children, connections = [], []
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(learners):
            child = multiprocessing.get_context("fork").Process(
                target=_echo, args=(server.getsockname(), parameters.nbytes)
            )
            child.start()
            children.append(child)
            connections.append(server.accept()[0])
    total, answer = np.zeros_like(parameters), np.empty_like(parameters)

    def round_trip() -> None:
        for connection in connections:
            connection.sendall(memoryview(parameters).cast("B"))
        for connection in connections:
            _receive(connection, memoryview(answer).cast("B"))
            np.add(total, answer, out=total)

    round_trip()
    found_s = Figure.of([timed(round_trip) for _ in range(3)]).median
    for connection in connections:
        connection.close()
    for child in children:
        child.join()
    return found_s


def _echo(address: tuple[str, int], size: int) -> None:
    buffer = memoryview(bytearray(size))
    with socket.create_connection(address) as connection:
        while _receive(connection, buffer):
            connection.sendall(buffer)


def _receive(connection: socket.socket, buffer: memoryview) -> bool:
    received = 0
    while received < len(buffer):
        count = connection.recv_into(buffer[received:])
        if count == 0:
            return False
        received += count
    return True


def peer_round_s(peer: str, learners: int, size: int, rounds: int) -> float:
    """Seconds of a round of another system, as it tells them itself: one line of JSON at the end."""
    script = Path(__file__).parent / "peers" / f"{peer.replace('-', '_')}.py"
    done = subprocess.run(
        [str(PEERS_PYTHON), str(script), str(learners), str(size), str(rounds)],
        capture_output=True,
        text=True,
        timeout=1_200,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{peer} failed:\n{done.stdout[-2_000:]}\n{done.stderr[-4_000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["round_s"])


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    has_peers = PEERS_PYTHON.exists() and not options.smoke
    cases = [(n, size) for size in (10_000, 1_000_000, 25_000_000) for n in (2, 10, 50)]
    cases.remove((50, 25_000_000))  # 50 answers of 100 MB, and the learners': more than 16 GiB
    runs, rounds = 3, 12
    if options.smoke:
        cases, runs, rounds = [(2, 10_000)], 1, 3
    report = Report(
        "rounds",
        ("learners", "parameters", "FLOps, s", "limit, s", "FLOps / limit", "aggregator, MB", *PEERS),
    )
    with tracking_server() as uri:
        for learners, size in cases:
            own_rounds = rounds if size < 25_000_000 else 5
            peaks_mb: list[float] = []
            works: dict[str, Callable[[], float]] = {
                "flops": partial(flops_round_s, uri, learners, size, own_rounds, peaks_mb),
                "limit": partial(limit_s, learners, size),
            }
            found = alternate(works, runs)
            peers = {
                peer: Figure.of([peer_round_s(peer, learners, size, 3)])
                for peer in PEERS
                if has_peers and (learners, size) in PEER_CASES
            }
            own, limit = found["flops"], found["limit"]
            report.add(
                [
                    str(learners),
                    f"{size:,}",
                    own.text(),
                    limit.text(),
                    f"{own.median / limit.median:.1f}",
                    f"{max(peaks_mb):.0f}",
                    *(_against(peers[peer], own) if peer in peers else "" for peer in PEERS),
                ],
                learners=learners,
                parameters=size,
                aggregator_mb=max(peaks_mb),
                **found,
                **peers,
            )
    report.print(*([] if has_peers else ["Without peers: `make peers` installs them."]))


def _against(peer: Figure, own: Figure) -> str:
    return f"{peer.text()} ({peer.median / own.median:.0f} ×)"


if __name__ == "__main__":
    main()
