"""The first parameters of a model: ``python -m flops.trainer.model_host CONTEXT.json PARAMETERS.npz``.

Runs in the project's environment, as a child of the aggregator. PARAMETERS gets the arrays of
`ModelManager.get_model_parameters` under the keys "0", "1", … A failure is told by the last line on standard
error, a `FlopsError` as JSON, and by the catalogue's exit code.

This module is part of the actor kit: it imports the standard library and numpy only.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flops.actor import ActorContext, tell_parent
from flops.errors import ErrorCode, FlopsError
from flops.trainer.ml_repo import MLRepo, named_parameters


def main(argv: Sequence[str]) -> int:
    """Write the parameters; returns the exit code."""
    context = None
    try:
        _, context_file, output = argv
        context = ActorContext.load(Path(context_file))
        seed = context.config.get("seed")
        repo = MLRepo(Path(context.repo_dir), node=context.node_name, seed=seed)
        arrays = named_parameters(repo.parameters())
        with Path(output).open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the keys are no other parameters of savez
    except FlopsError as exc:
        return tell_parent(exc, context)
    except Exception as exc:  # noqa: BLE001 (the last line of defence: the aggregator reads one JSON line)
        details = {"traceback": traceback.format_exc()}
        message = f"The first parameters could not be made: {type(exc).__name__}: {exc}"
        return tell_parent(FlopsError(ErrorCode.INTERNAL, message, details=details), context)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
