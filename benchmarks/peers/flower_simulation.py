"""Seconds of a round of Flower's simulation: ``LEARNERS PARAMETERS ROUNDS``, told as a line of JSON."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def main(learners: int, size: int, rounds: int) -> None:
    """Run the app in the simulation, one actor a core, and print what it told."""
    with tempfile.TemporaryDirectory(prefix="bench-flower-") as folder:
        told = Path(folder) / "told.json"
        os.environ |= {  # noqa: TID251 (no part of FLOps)
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": folder,
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "BENCH_LEARNERS": str(learners),
            "BENCH_SIZE": str(size),
            "BENCH_ROUNDS": str(rounds),
            "BENCH_TOLD": str(told),
        }
        sys.path.insert(0, str(Path(__file__).parent / "flower_app"))
        from bench.app import client, server  # noqa: PLC0415 (Flower reads the environment when it is imported)
        from flwr.simulation import run_simulation  # noqa: PLC0415

        run_simulation(server, client, learners, backend_config={"client_resources": {"num_cpus": 1}})
        print(told.read_text())


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:4]))
