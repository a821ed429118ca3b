"""Seconds of a round of NVIDIA FLARE's simulator: ``LEARNERS PARAMETERS ROUNDS``, told as a line of JSON.

A client both trains and evaluates in the one task of a round; it notes when it gets the tasks.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import SimEnv

CLIENT = """
import time
import nvflare.client as flare

flare.init()
times = []
while flare.is_running():
    received = flare.receive()
    if received is None:
        break
    times.append(time.time())
    params = {name: array.copy() for name, array in received.params.items()}
    for array in params.values():
        array.flat[0] += 1
    flare.send(flare.FLModel(params=params, metrics={"accuracy": 0.5}, params_type=flare.ParamsType.FULL))
    with open(TOLD + "/" + flare.get_site_name(), "w") as file:
        file.write(repr(times))
"""


def main(learners: int, size: int, rounds: int) -> None:
    """Run the job in the simulator, and print what its first client told."""
    with tempfile.TemporaryDirectory(prefix="bench-flare-") as folder:
        script = Path(folder) / "client.py"
        script.write_text(f"TOLD = {folder!r}\n{CLIENT}")
        recipe = NumpyFedAvgRecipe(
            name="bench",
            min_clients=learners,
            num_rounds=rounds,
            initial_model=np.zeros(size, dtype=np.float32),
            train_script=str(script),
        )
        with contextlib.redirect_stdout(sys.stderr):
            recipe.execute(SimEnv(num_clients=learners, num_threads=learners, workspace_root=folder))
        told = Path(folder) / "site-1"
        times_s = [float(word) for word in told.read_text().strip("[]").split(",")]
        print(json.dumps({"round_s": median(end_s - start_s for start_s, end_s in pairwise(times_s))}))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:4]))
