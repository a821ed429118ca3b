"""Every benchmark runs, at a small size, and prints what it measured for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


IN_SECONDS = ("rounds", "aggregation", "precision", "tracking", "data", "inference")
OF_SCALE = ("scale_learners", "scale_projects")
WITH_A_CONTROL_PLANE = [pytest.param("scale_nodes", marks=pytest.mark.chaos)]


@pytest.mark.parametrize("name", [*IN_SECONDS, *OF_SCALE, *WITH_A_CONTROL_PLANE])
def test_a_benchmark_prints_a_table_and_its_figures(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--smoke"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    told = json.loads(last)
    assert told["benchmark"] == name
    assert told["machine"]["cores"]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(told["rows"])
    assert all(
        figure["median"] > 0 for row in told["rows"] for figure in row.values() if type(figure) is dict
    )
    assert list(tmp_path.iterdir()) == []
