"""The tutorial works as it stands: its blocks are run one after the other, in one shell."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from flops.testing.deployment import free_ports

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CLUSTER_PORT = 10_100


def runnable_commands(document: Path) -> list[str]:
    """The commands of all blocks marked ``console run``, in order."""
    blocks = re.findall(r"```console run\n(.*?)```", document.read_text(), re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_tutorial(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    commands = runnable_commands(ROOT / "docs" / "tutorial.md")
    assert len(commands) > 15
    script = "\n".join(["set -euo pipefail", *commands]).replace(f"-p {DEFAULT_CLUSTER_PORT}", f"-p {port}")
    stop = "; ".join(
        [
            f"cd {tmp_path}/flops-tutorial",
            "NodeEngine --home node-1 stop",
            "NodeEngine --home node-2 stop",
            "flops down",
        ]
    )
    cache = os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache" / "uv"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("FLOPS_", "XDG_"))}
    environ |= {
        "HOME": str(tmp_path),
        "UV_CACHE_DIR": cache,
        "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
        "FLOPS_MANAGER_PORT": "0",
        "FLOPS_TRACKING_PORT": "0",
        "FLOPS_CLUSTER_PORT": str(port),
    }
    try:
        result = subprocess.run(
            ["bash", "-x", "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
        )
    finally:
        subprocess.run(["bash", "-c", stop], env=environ, capture_output=True, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    accuracy = re.search(r"Accuracy on 10 rows: ([\d.]+)", result.stderr)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.5
