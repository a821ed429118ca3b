"""The user's code: loading an ML repository, calling its `ModelManager`, and telling what went wrong in it.

This module is part of the actor kit: it imports the standard library and numpy only.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import random
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flops.errors import ErrorCode, FlopsError
from flops_utils.local_data import DataSource, rows_loaded, use_source

Array = npt.NDArray[Any]
_SHOWN_CHARACTERS = 500  # of an exception's text; the traceback has the rest


def read_parameters(path: Path) -> list[Array]:
    """A model's parameters from an NPZ file, which has them under "0", "1", …"""
    with np.load(path, allow_pickle=False) as stored:
        return [stored[str(index)] for index in range(len(stored.files))]


def named_parameters(parameters: Sequence[Array]) -> dict[str, Array]:
    """Parameters under the names that they have in an NPZ file."""
    return {str(index): array for index, array in enumerate(parameters)}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_model` returned; numbers that are not finite are None."""

    rows: int
    loss: float | None
    accuracy: float | None
    metrics: dict[str, float] = field(default_factory=dict)


class MLRepo:
    """An ML repository with its `ModelManager`, built once.

    Args:
        folder: the unpacked repository.
        node: name of this node, for messages.
        seed: start of the random number generators; None leaves them alone.

    Raises:
        FlopsError: ``user_code_failed``.
    """

    def __init__(self, folder: Path, *, node: str, seed: int | None = None) -> None:
        self._folder = folder.resolve()
        self._node = node
        if seed is not None:
            _seed_generators(seed)
        sys.path.insert(0, str(self._folder))
        with self._user_code("load"):
            self._manager = importlib.import_module("model_manager").ModelManager()
            if seed is not None and "torch" in sys.modules:
                sys.modules["torch"].manual_seed(seed)

    def load_data(self, source: DataSource) -> int:
        """Have the repository load its data from `source`; returns how many rows it took.

        Raises:
            FlopsError: ``user_code_failed``, ``no_matching_data``, ``unreachable``.
        """
        use_source(source)
        with self._user_code("load its data"):
            self._manager.set_model_data()
        return rows_loaded()

    def parameters(self) -> list[Array]:
        """The model's parameters.

        Raises:
            FlopsError: ``user_code_failed``, also when they are not a list of numeric arrays.
        """
        with self._user_code("give its parameters"):
            raw = self._manager.get_model_parameters()
        if not isinstance(raw, Sequence | np.ndarray) or isinstance(raw, str | bytes):
            raise self._wrong(f"get_model_parameters() returned a {type(raw).__name__}, not a list of arrays")
        if len(raw) == 0:
            raise self._wrong("get_model_parameters() returned an empty list")
        arrays = []
        for number, item in enumerate(raw):
            with self._user_code("give its parameters"):
                array = np.asarray(item)
            if array.dtype.kind not in "biufc":
                kind = type(item).__name__
                raise self._wrong(
                    f"get_model_parameters() returned a {kind} without numbers as item {number}"
                )
            arrays.append(array)
        return arrays

    def fit(self, parameters: list[Array], config: Mapping[str, Any]) -> tuple[int, list[Array]]:
        """Train from these parameters; returns the rows trained on, and the new parameters.

        Raises:
            FlopsError: ``user_code_failed``.
        """
        with self._user_code("train"):
            self._manager.set_model_parameters(parameters)
            take_config = getattr(self._manager, "set_training_config", None)
            if callable(take_config):
                take_config(dict(config))
            rows = self._manager.fit_model()
        return self._rows(rows, "fit_model()"), self.parameters()

    def evaluate(self, parameters: list[Array]) -> Evaluation:
        """Evaluate these parameters on the held-out data.

        Raises:
            FlopsError: ``user_code_failed``.
        """
        with self._user_code("evaluate"):
            self._manager.set_model_parameters(parameters)
            result = self._manager.evaluate_model()
        if not isinstance(result, Sequence) or len(result) not in (3, 4):
            raise self._wrong(
                f"evaluate_model() returned {result!r:.100}, not (loss, accuracy, number of rows)"
            )
        loss, accuracy, rows, *rest = result
        metrics = rest[0] if rest else {}
        if not isinstance(metrics, Mapping):
            raise self._wrong(f"evaluate_model() returned {metrics!r:.100} as fourth item, not a dictionary")
        named = {str(name): self._number(value, str(name)) for name, value in metrics.items()}
        return Evaluation(
            self._rows(rows, "evaluate_model()"),
            self._number(loss, "loss"),
            self._number(accuracy, "accuracy"),
            {name: value for name, value in named.items() if value is not None},
        )

    def model(self, parameters: list[Array]) -> Any:
        """The model with these parameters, for saving it.

        Raises:
            FlopsError: ``user_code_failed``.
        """
        with self._user_code("give its model"):
            self._manager.set_model_parameters(parameters)
            return self._manager.get_model()

    def input_example(self) -> Any:
        """Some rows as the model takes them, by the optional `get_input_example`; None without it.

        Raises:
            FlopsError: ``user_code_failed``.
        """
        give_example = getattr(self._manager, "get_input_example", None)
        if not callable(give_example):
            return None
        with self._user_code("give an input example"):
            return give_example()

    def _rows(self, value: Any, function: str) -> int:
        try:
            rows = int(value)
        except (TypeError, ValueError) as exc:
            raise self._wrong(f"{function} returned {value!r:.100} as number of rows") from exc
        if rows < 0:
            raise self._wrong(f"{function} returned {rows} as number of rows")
        return rows

    def _number(self, value: Any, name: str) -> float | None:
        """A finite number; None for None, NaN and infinity."""
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError) as exc:
            raise self._wrong(f"evaluate_model() returned {value!r:.100} as {name}") from exc
        return number if math.isfinite(number) else None

    def _wrong(self, what: str) -> FlopsError:
        return FlopsError(
            ErrorCode.USER_CODE_FAILED,
            f"The ML repository's {what} on {self._node}.",
            hint="docs/ml-repository.md says what each method returns.",
            details={"node": self._node},
        )

    @contextlib.contextmanager
    def _user_code(self, doing: str) -> Iterator[None]:
        """Turn an exception of the repository's code into an error with its own lines only."""
        try:
            yield
        except FlopsError:
            raise
        except (Exception, SystemExit) as exc:
            text, where = describe_exception(exc, self._folder)
            summary = f"{type(exc).__name__}: {exc}"[:_SHOWN_CHARACTERS]
            raise FlopsError(
                ErrorCode.USER_CODE_FAILED,
                f"The ML repository failed to {doing} on {self._node}{where}: {summary}",
                details={"traceback": text, "node": self._node, "phase": doing},
            ) from exc


def describe_exception(exc: BaseException, folder: Path) -> tuple[str, str]:
    """A traceback with only the frames of a repository, and where the last one is (" in FILE, line N")."""
    own = _frames_of(traceback.extract_tb(exc.__traceback__), folder)
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(own)]
    lines += traceback.format_exception_only(exc)
    text = "".join(lines).replace(f"{folder}/", "")
    if isinstance(exc, SyntaxError) and exc.filename and Path(exc.filename).resolve().is_relative_to(folder):
        return text, f" in {Path(exc.filename).resolve().relative_to(folder)}, line {exc.lineno}"
    return text, f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""


def describe_thread(ident: int, folder: str) -> str:
    """Where a thread is now: a traceback with only the frames of a repository."""
    frame = sys._current_frames().get(ident)
    own = _frames_of(traceback.extract_stack(frame) if frame is not None else [], Path(folder).resolve())
    return "".join(["Stack (most recent call last):\n", *traceback.format_list(own)])


def _frames_of(frames: Iterable[traceback.FrameSummary], folder: Path) -> list[traceback.FrameSummary]:
    """The frames within a repository, with their files' places in it."""
    own = []
    for frame in frames:
        path = Path(frame.filename).resolve()
        if path.is_relative_to(folder):
            frame.filename = str(path.relative_to(folder))
            own.append(frame)
    return own


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # user code draws from the global generator
