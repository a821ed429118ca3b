"""What a training must not lose: after every round its parameters, the strategy's state, and the history.

Files in the folder, of which `state.json` is replaced last and names the round that counts:

| file | content |
|---|---|
| ``round-<n>.npz`` | the parameters after round n as "0", "1", …; of the last and the best round |
| ``strategy-<n>.npz`` | the strategy's state after round n, when it has any |
| ``history.jsonl`` | a line per round, appended |
| ``state.json`` | ``{"round": n, "origin": …}`` |
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flops.core.project import Round
from flops.core.rounds import best_round
from flops.durable_file import file_error, sync_folder, write_durably
from flops.errors import FlopsError
from flops.trainer.ml_repo import named_parameters, read_parameters
from flops.wire.training import Array

_STATE, _HISTORY = "state.json", "history.jsonl"


@dataclass(frozen=True)
class Checkpoint:
    """Where a training stands."""

    parameters: list[Array]
    strategy_state: dict[str, Array]
    history: tuple[Round, ...]
    origin: str = ""


class CheckpointStore:
    """Saves and loads checkpoints in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prepared: Sequence[Array] | None = None  # whose files are written

    def load(self) -> Checkpoint | None:
        """The last checkpoint; None when no round was finished."""
        try:
            state = json.loads((self._folder / _STATE).read_text())
        except FileNotFoundError:
            return None
        number = int(state["round"])
        state_file = self._folder / f"strategy-{number}.npz"
        return Checkpoint(
            read_parameters(self.parameters_file(number)),
            _load(state_file) if state_file.exists() else {},
            self._history(number),
            str(state.get("origin", "")),
        )

    def parameters_file(self, number: int) -> Path:
        """The file with the parameters after a round, the last or the best one."""
        return self._folder / f"round-{number}.npz"

    def prepare(self, number: int, parameters: Sequence[Array], strategy_state: Mapping[str, Array]) -> None:
        """Write what takes long of a round that is not finished yet, which does not count before `save`.

        What goes wrong is not told: `save` does it again.
        """
        with contextlib.suppress(FlopsError):
            self._write_files(number, parameters, strategy_state)
            self._prepared = parameters

    def save(
        self,
        parameters: Sequence[Array],
        strategy_state: Mapping[str, Array],
        history: Sequence[Round],
        origin: str = "",
    ) -> None:
        """Make the last round of the history durable; a kill at any moment leaves this or the one before.

        Args:
            parameters: after the last round.
            strategy_state: after the last round.
            history: all rounds so far.
            origin: names what the rounds went out from, where there is more than one beginning.

        Raises:
            FlopsError: ``disk_full``, ``file_unreadable``.
        """
        number = history[-1].number
        if self._prepared is not parameters:
            self._write_files(number, parameters, strategy_state)
        self._prepared = None
        try:
            self._append(history)
        except OSError as exc:
            raise file_error(exc, self._folder) from exc
        write_durably(self._folder / _STATE, json.dumps({"round": number, "origin": origin}))
        self._drop_all_but(history)

    def _write_files(
        self, number: int, parameters: Sequence[Array], strategy_state: Mapping[str, Array]
    ) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(self.parameters_file(number), named_parameters(parameters))
            if strategy_state:
                self._write(self._folder / f"strategy-{number}.npz", strategy_state)
        except OSError as exc:
            raise file_error(exc, self._folder) from exc

    def _write(self, path: Path, arrays: Mapping[str, Array]) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # no key is another parameter of savez
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)  # on a full disk, what is left is for telling about it
            raise
        temporary.replace(path)

    def _append(self, history: Sequence[Round]) -> None:
        path = self._folder / _HISTORY
        line = history[-1].model_dump_json() + "\n"
        if len(history) == 1:  # also after a kill before the first `state.json`
            path.unlink(missing_ok=True)
        with path.open("ab") as file:
            # A line torn by a kill must not swallow the next one.
            torn = file.tell() > 0 and not _ends_with_newline(path)
            file.write((b"\n" if torn else b"") + line.encode())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._folder)

    def _history(self, last: int) -> tuple[Round, ...]:
        found: dict[int, Round] = {}
        for line in (self._folder / _HISTORY).read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line torn by a kill
                record = Round.model_validate_json(line)
                found[record.number] = record  # a round told twice counts as it was told last
        return tuple(found[number] for number in sorted(found) if number <= last)

    def _drop_all_but(self, history: Sequence[Round]) -> None:
        best = best_round(history)
        last = history[-1].number
        kept = {_STATE, _HISTORY, f"round-{last}.npz", f"strategy-{last}.npz"}
        if best is not None:
            kept.add(f"round-{best.number}.npz")
        for path in self._folder.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _load(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
