"""Places in an aggregator at which it is killed, once each, by a SIGKILL that it gives itself.

A kill from outside meets such a place by chance only. What is between two places is the real code.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from flops.actor import EventLog
from flops.testing.kept_tracker import KeptTracker
from flops.trainer import aggregator
from flops.trainer.checkpoint import CheckpointStore
from flops.trainer.model_process import ModelProcess
from flops.trainer.strategy import RoundStrategy

_Which = Callable[..., object]


class KillPoints:
    """Kills this process where it is told to.

    Args:
        folder: where it is remembered which kills are done.
        wanted: names of places, such as ``saved@3``: after the third round was saved.
    """

    def __init__(self, folder: Path, wanted: Collection[str]) -> None:
        self._folder = folder
        self._wanted = set(wanted)

    def install(self) -> None:
        """Have the aggregator's code pass the places."""
        self._after(RoundStrategy, "aggregate_train", "aggregated", lambda _self, number: number)
        self._after(CheckpointStore, "_write", "file-written", lambda _self, path, _arrays: _number_of(path))
        self._after(CheckpointStore, "_append", "history-written", lambda _self, history: history[-1].number)
        self._after(CheckpointStore, "save", "saved", lambda _self, _p, _s, history, _o: history[-1].number)
        self._after(EventLog, "tell", "told", _number_told)
        self._after(KeptTracker, "log_round", "tracked", lambda _self, _run, record: record.number)
        self._after(aggregator, "keep_best", "best-kept")
        self._after(ModelProcess, "wait", "ended", lambda child, *_: child._doing)
        self._after(KeptTracker, "log_model", "registered")
        self._after(aggregator, "store_bundle", "stored")
        self._after(KeptTracker, "close_run", "run-ended")

    def _after(self, owner: Any, attribute: str, name: str, which: _Which | None = None) -> None:
        original = getattr(owner, attribute)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._reach(name if which is None else f"{name}@{which(*args, **kwargs)}")
            return result

        setattr(owner, attribute, wrapped)

    def _reach(self, name: str) -> None:
        done = self._folder / f"killed-{name}"
        if name in self._wanted and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def _number_of(path: Path) -> int:
    """The round in the name of a checkpoint's file of parameters; 0 for others."""
    name, _, number = path.stem.partition("-")
    return int(number) if name == "round" else 0


def _number_told(_self: EventLog, kind: str, **fields: Any) -> int:
    """The round that was told to be completed; 1,000 for the whole training, 0 for what else is told."""
    if kind == "training_completed":
        return 1_000
    return int(fields["record"]["number"]) if kind == "round_completed" else 0
