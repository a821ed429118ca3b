"""An aggregator whose tracker is its own memory, written to ``tracked.json`` at the end."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from flops.settings import inherited_environment, quiet_libraries


def run(argv: list[str]) -> NoReturn:
    """Run the aggregator, and exit as the real one does."""
    quiet_libraries()
    from flops.actor import run_actor  # noqa: PLC0415 (Flower reads the environment when it is imported)
    from flops.adapters.memory_tracker import MemoryTracker  # noqa: PLC0415
    from flops.trainer.aggregator import main  # noqa: PLC0415

    tracker = MemoryTracker()
    environ = inherited_environment()
    code = run_actor(
        lambda context, events: main(context, events, lambda _: tracker, environ), argv, has_users_code=False
    )
    runs = {
        project: {
            "status": run.status,
            "rounds": sorted(run.rounds),
            "models": {number: model.model_dump(mode="json") for number, model in run.models.items()},
        }
        for project, run in tracker.runs.items()
    }
    (Path(argv[1]).parent / "tracked.json").write_text(json.dumps(runs))
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run(sys.argv)
