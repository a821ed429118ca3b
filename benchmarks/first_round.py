"""Measures how long a project takes from its submission to the end of its first round, in both packagings.

Run from the root of the repository: ``.venv/bin/python benchmarks/first_round.py [environment] [image]``.
Each packaging gets a deployment of its own, with two nodes: the first project builds everything, the second
has the same commit, the third a commit that changes code. uv's own cache is used as it is found. Images need
root and podman (scripts/install-containers). Times are also given as multiples of the start of one
interpreter that imports what a learner imports: no first round can be faster.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from flops.testing.deployment import Deployment, commit_all
from flops.testing.example import REPOSITORY, example_deployment, sla_file, submit
from flops.testing.podman import missing_for_podman, running_podman

IMPORTS = "import numpy, pyarrow.flight, sklearn.linear_model"
PATIENCE_S = 1_200.0


@contextmanager
def deployment_for(packaging: str, home: Path) -> Iterator[Deployment]:
    """A deployment whose nodes can run the packaging."""
    if packaging == "environment":
        with example_deployment(home) as deployment:
            yield deployment
        return
    with running_podman() as podman, example_deployment(home, container_socket=podman.socket) as deployment:
        yield deployment


def interpreter_start_s(home: Path) -> float:
    """The start of a learner's interpreter with what it imports, best of three."""
    pythons = home.glob("node-1/environments/*/bin/python")
    (python,) = [path for path in pythons if not list(path.parent.parent.glob("lib/*/site-packages/mlflow"))]
    times = []
    for _ in range(3):
        start_s = time.monotonic()
        subprocess.run([str(python), "-c", IMPORTS], check=True)
        times.append(time.monotonic() - start_s)
    return min(times)


def first_round(deployment: Deployment, name: str, packaging: str) -> dict[str, float]:
    """Run a project; returns the seconds of its stages, and until its first round was done."""
    changes = {"min_available_clients": 2, "min_fit_clients": 2}
    sla = sla_file(
        deployment, name, packaging=packaging, training_configuration=changes, post_training_steps=[]
    )
    project_id = submit(deployment, sla)
    watching = deployment.begin("flops", "project", "watch", project_id)
    told, _ = watching.communicate(timeout=PATIENCE_S)
    if watching.returncode != 0:
        raise SystemExit(told)
    shown = deployment.ask("project", "show", project_id)
    begun_s = shown["project"]["created_at_s"]
    spans = shown["project"]["spans"]
    times = {
        span["stage"]: following["entered_at_s"] - span["entered_at_s"] for span, following in pairwise(spans)
    }
    done_s = next(event["time_s"] for event in shown["history"] if event["kind"] == "round_completed")
    return {**times, "first round": done_s - begun_s}


def measure(packaging: str) -> None:
    """Print the times of one packaging."""
    with (
        tempfile.TemporaryDirectory(prefix="flops-bench-") as folder,
        deployment_for(packaging, Path(folder)) as deployment,
    ):
        repository = deployment.home / REPOSITORY
        for name in ("cold", "warm", "code"):
            if name == "code":
                with (repository / "model_manager.py").open("a") as file:
                    file.write("# changed\n")
                commit_all(repository, "Change code")
            times = first_round(deployment, name, packaging)
            peer = ""
            if packaging == "environment":
                peer = f"  {times['first round'] / interpreter_start_s(deployment.home):6.1f} starts"
            known = [stage for stage in ("resolving", "building", "placing") if stage in times]
            stages = ", ".join(f"{stage} {times[stage]:.1f}" for stage in known)
            print(f"{packaging:<12} {name:<5} {times['first round']:7.1f} s{peer}   ({stages})", flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packagings", nargs="*", default=["environment", "image"])
    for packaging in parser.parse_args().packagings:
        if packaging == "image" and missing_for_podman():
            print(f"image        skipped: it {missing_for_podman()}")
            continue
        measure(packaging)


if __name__ == "__main__":
    main()
