"""What the benchmarks share: alternating runs, medians with their spread, a table and a line of JSON.

Machines are shared and noisy, so no figure stands alone: what is compared runs in the same process of
measuring, one run of each after the other, and the table tells ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from flops.adapters.mlflow_server import MlflowServer
from flops.settings import inherited_environment

_PACKAGES = ("flops", "flwr", "mlflow", "numpy", "pyarrow")


@dataclass(frozen=True)
class Figure:
    """Several measurements of one thing, in its own unit."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Summarise measurements; there is at least one."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def text(self, digits: int = 3) -> str:
        """The median with its spread, such as ``0.012 (0.011–0.015)``."""
        if self.runs == 1:
            return f"{self.median:.{digits}g}"
        return f"{self.median:.{digits}g} ({self.low:.{digits}g}–{self.high:.{digits}g})"


def alternate(works: Mapping[str, Callable[[], float]], runs: int) -> dict[str, Figure]:
    """Measure each in turn, `runs` times: what slows the machine down for a while slows down all of them.

    Args:
        works: by name, what does the work once and returns its measurement.
        runs: how often.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            found[name].append(work())
    return {name: Figure.of(values) for name, values in found.items()}


def timed(work: Callable[[], Any]) -> float:
    """How many seconds something takes."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def memory_bytes(what: str, process: int | str = "self") -> int:
    """Memory of a process as the system tells it: now (``VmRSS``), or at its highest (``VmHWM``)."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"The system does not tell {what}.")


def cpu_s(process: psutil.Process) -> float:
    """Seconds of processor time that a process has taken, without its children."""
    times = process.cpu_times()
    return float(times.user + times.system)


class Report:
    """A benchmark's result, printed as a Markdown table and as one line of JSON.

    Args:
        name: of the benchmark.
        columns: heads of the table.
    """

    def __init__(self, name: str, columns: Sequence[str]) -> None:
        self._name = name
        self._columns = list(columns)
        self._rows: list[list[str]] = []
        self._figures: list[dict[str, Any]] = []

    def add(self, cells: Sequence[str], **figures: Figure | float | str | None) -> None:
        """Add a row, and its figures for the line of JSON."""
        self._rows.append(list(cells))
        self._figures.append(
            {key: asdict(value) if isinstance(value, Figure) else value for key, value in figures.items()}
        )
        print("  ".join(cells), flush=True)

    def print(self, *notes: str) -> None:
        """Print the table, the notes, and the JSON."""
        found = machine()
        print(f"\n{_in_words(found)}\n")
        rule = ["---"] * len(self._columns)
        for cells in (self._columns, rule, *self._rows):
            print(f"| {' | '.join(cells)} |")
        for note in notes:
            print(f"\n{note}")
        print(f"\n{json.dumps({'benchmark': self._name, 'machine': found, 'rows': self._figures})}")


@contextlib.contextmanager
def tracking_server() -> Iterator[str]:
    """The address of an MLflow server that runs meanwhile, as a control plane runs it."""
    with tempfile.TemporaryDirectory(prefix="flops-bench-mlflow-") as folder:
        server = MlflowServer(Path(folder), 0, inherited_environment())
        server.start()
        try:
            server.wait_ready(300.0)  # machines are shared
            yield server.url
        finally:
            server.stop()


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores, memory, versions, load and date."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
    }


def _in_words(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB, load {found['load']}; "
        f"Python {found['python']}, {versions}; {found['date']}"
    )


def arguments(description: str | None) -> argparse.Namespace:
    """The command line: ``--smoke`` for a small run that shows that the benchmark works."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="small sizes, one run: shows that it works")
    return parser.parse_args()
