"""A node's daemon whose learners run programs that tests write; started as a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from flops.command import run_command
from flops.core.project import Environment
from flops.errors import ErrorCode, FlopsError
from flops.settings import inherited_environment
from flops.wiring.data import open_data_catalog
from flops.wiring.node import NodeParts, run_node_daemon

INTERPRETER = """#!{python}
import pathlib, sys
from flops.actor import run_actor
def main(context, events):
    exec(context.config["program"], {{"context": context, "events": events}})
sys.exit(run_actor(main, [sys.argv[0], sys.argv[-1]]))
"""


class PlayedEnvironments:
    """Environments whose interpreter runs what stands in the service's configuration."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def lock(
        self, repo: Path, flavor: str, report: Callable[[str], None], *, needs_gpu: bool = False
    ) -> tuple[str, str, Environment]:
        raise NotImplementedError

    def materialise(self, lock: str, report: Callable[[str], None]) -> Path:
        report(f"building {lock.strip()}")
        if lock.startswith("fail"):
            raise FlopsError(ErrorCode.ENVIRONMENT_BUILD_FAILED, "No such package.")
        if lock.startswith("slow"):
            # A build is a program that runs, and is ended when nobody needs it any more.
            run_command(["sleep", "60"], environ=inherited_environment(), cwd=Path.home(), timeout_s=90)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "python"
        path.write_text(INTERPRETER.format(python=sys.executable))
        path.chmod(0o755)
        return path


if __name__ == "__main__":
    sys.exit(
        run_node_daemon(
            sys.argv[1:],
            lambda paths: NodeParts(
                environments=PlayedEnvironments(paths.environments),
                kit_dir=Path(__file__).resolve().parents[2] / "src",
                open_catalog=open_data_catalog,
            ),
        )
    )
