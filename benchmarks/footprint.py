"""Measures what FLOps' processes take while nothing happens: memory, and share of a core.

Run from the root of the repository: ``.venv/bin/python benchmarks/footprint.py``, or ``make
bench-footprint``. A control plane and two nodes with the learner addon run idle. Memory is the
proportional set size: pages that processes share count by parts. A learner is measured with what FLOps
brings along, without the user's libraries and data, with all pages it shares, against the same
interpreter with numpy and pyarrow: it cannot be smaller.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
from harness import Report, arguments, cpu_s

from flops.settings import inherited_environment
from flops.testing.chaos import processes_of, services_of
from flops.testing.deployment import Deployment
from flops.testing.example import example_deployment

MB = 1_000_000
LEARNER = {
    "numpy and pyarrow": "import numpy, pyarrow.flight",
    "a learner": "import flops.trainer.learner",
}


def measure_idle(report: Report, deployment: Deployment, duration_s: float) -> None:
    """Add a row for each kind of process."""
    deployment.wait_for(lambda: not services_of(deployment), "the end of the mock data provider")
    time.sleep(duration_s / 2)  # what follows a start is no idling
    found = [item for item in processes_of(deployment) if item.process.is_running()]
    before_s = {item.process.pid: cpu_s(item.process) for item in found}
    time.sleep(duration_s)
    memory_mb, share = defaultdict(list), defaultdict(list)
    for item in found:
        spent_s = cpu_s(item.process) - before_s[item.process.pid]
        memory_mb[item.role.value].append(item.process.memory_full_info().pss / MB)
        share[item.role.value].append(spent_s / duration_s)
    for role, sizes in sorted(memory_mb.items()):
        report.add(
            [role, str(len(sizes)), f"{max(sizes):.0f} MB", f"{max(share[role]):.1%}"],
            process=role,
            count=float(len(sizes)),
            largest_mb=max(sizes),
            busiest_share=max(share[role]),
        )


def measure_learner(report: Report) -> None:
    """Add a row for a learner, and for the least that it can be."""
    for name, program in LEARNER.items():
        argv = [sys.executable, "-c", f"{program}; print(flush=True); input()"]
        with subprocess.Popen(
            argv, env=inherited_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            size_mb = psutil.Process(process.pid).memory_info().rss / MB
            process.kill()
        report.add([name, "1", f"{size_mb:.0f} MB", ""], process=name, largest_mb=size_mb)


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    report = Report("footprint", ("process", "how many", "largest", "of a core, idle"))
    with (
        tempfile.TemporaryDirectory(prefix="flops-bench-") as folder,
        example_deployment(Path(folder)) as deployment,
    ):
        measure_idle(report, deployment, 1.0 if options.smoke else 30.0)
    measure_learner(report)
    report.print()


if __name__ == "__main__":
    main()
