"""An aggregator that tracks in a file, ``tracked.json``: ``CONTEXT.json [place of a kill, …]``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from flops.settings import inherited_environment, quiet_libraries


def run(argv: list[str]) -> NoReturn:
    """Run the aggregator, and exit as the real one does."""
    quiet_libraries()
    from flops.actor import run_actor  # noqa: PLC0415 (Flower reads the environment when it is imported)
    from flops.testing.kept_tracker import KeptTracker  # noqa: PLC0415
    from flops.testing.kill_points import KillPoints  # noqa: PLC0415
    from flops.trainer.aggregator import main  # noqa: PLC0415

    folder = Path(argv[1]).parent
    KillPoints(folder, argv[2:]).install()
    tracker = KeptTracker(folder / "tracked.json")
    environ = inherited_environment()
    code = run_actor(
        lambda context, events: main(context, events, lambda _: tracker, environ), argv, has_users_code=False
    )
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run(sys.argv)
