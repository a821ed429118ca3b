"""The user's code, and how its failures are told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flops.errors import ErrorCode, FlopsError
from flops.trainer.ml_repo import MLRepo
from flops_utils.local_data import DataSource, use_source

MODEL = """
import numpy as np

class ModelManager:
    def __init__(self):
        self.parameters = [np.zeros(2), [1, 2]]
    def set_model_data(self):
        {data}
    def get_model_parameters(self):
        return {parameters}
    def set_model_parameters(self, parameters):
        self.parameters = parameters
    def fit_model(self):
        self.parameters[0][:] += 1
        return {rows}
    def evaluate_model(self):
        return {evaluation}
"""
DEFAULTS = {"data": "pass", "parameters": "self.parameters", "rows": "3", "evaluation": "0.5, 0.75, 4"}


@pytest.fixture(autouse=True)
def _no_traces() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("model_manager", None)
    use_source(None)


def load(folder: Path, source: str = MODEL, **parts: str) -> MLRepo:
    text = source.format(**{**DEFAULTS, **parts}) if source is MODEL else source
    (folder / "model_manager.py").write_text(text)
    return MLRepo(folder, node="node-1")


def failure(repo: MLRepo, what: str) -> FlopsError:
    with pytest.raises(FlopsError) as caught:
        {
            "parameters": repo.parameters,
            "fit": lambda: repo.fit([np.zeros(2)], {}),
            "evaluate": lambda: repo.evaluate([]),
            "load": lambda: repo.load_data(DataSource("", "", ("tag",))),
        }[what]()
    assert caught.value.code is ErrorCode.USER_CODE_FAILED
    assert caught.value.details["node"] == "node-1"
    return caught.value


def test_trains_and_evaluates(tmp_path: Path) -> None:
    repo = load(tmp_path)
    assert [list(array) for array in repo.parameters()] == [[0, 0], [1, 2]]
    rows, arrays = repo.fit([np.zeros(2), np.zeros(2)], {"server-round": 1})
    assert (rows, list(arrays[0])) == (3, [1, 1])
    result = repo.evaluate(arrays)
    assert (result.loss, result.accuracy, result.rows, result.metrics) == (0.5, 0.75, 4, {})


@pytest.mark.parametrize(
    ("evaluation", "loss", "metrics"),
    [
        ("float('nan'), 0.5, 4", None, {}),
        ("None, 0.5, 4", None, {}),
        ("np.float32(0.5), 0.5, np.int64(4)", 0.5, {}),
        ("[0.5, 0.5, 4, {'f1': 0.25, 'odd': float('inf')}]", 0.5, {"f1": 0.25}),
    ],
)
def test_numbers_of_all_kinds_are_taken(
    tmp_path: Path, evaluation: str, loss: float | None, metrics: dict[str, float]
) -> None:
    result = load(tmp_path, evaluation=evaluation).evaluate([])
    assert (result.loss, result.accuracy, result.rows, result.metrics) == (loss, 0.5, 4, metrics)


@pytest.mark.parametrize(
    ("what", "parts", "message"),
    [
        ("parameters", {"parameters": "None"}, "returned a NoneType, not a list of arrays"),
        ("parameters", {"parameters": "'text'"}, "returned a str, not a list of arrays"),
        ("parameters", {"parameters": "[]"}, "returned an empty list"),
        ("parameters", {"parameters": "[np.zeros(1), 'text']"}, "a str without numbers as item 1"),
        ("parameters", {"parameters": "[[[1], [1, 2]]]"}, "ValueError"),
        ("fit", {"rows": "None"}, "fit_model() returned None as number of rows"),
        ("fit", {"rows": "-1"}, "fit_model() returned -1 as number of rows"),
        (
            "fit",
            {"rows": "1 / 0"},
            "failed to train on node-1 in model_manager.py, line 15: ZeroDivisionError",
        ),
        ("fit", {"rows": "exit(3)"}, "SystemExit"),
        ("evaluate", {"evaluation": "0.5"}, "evaluate_model() returned 0.5, not (loss, accuracy"),
        ("evaluate", {"evaluation": "'bad', 0.5, 4"}, "evaluate_model() returned 'bad' as loss"),
        ("evaluate", {"evaluation": "0.5, 0.5, 4, 5"}, "returned 5 as fourth item, not a dictionary"),
        ("load", {"data": "raise OSError('no disk')"}, "failed to load its data on node-1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, what: str, parts: dict[str, str], message: str) -> None:
    assert message in failure(load(tmp_path, **parts), what).message


def test_a_traceback_has_the_repositorys_lines_only(tmp_path: Path) -> None:
    error = failure(load(tmp_path, rows="np.linalg.inv(np.zeros((2, 2)))"), "fit")
    traceback = error.details["traceback"]
    assert 'File "model_manager.py", line 15, in fit_model' in traceback
    assert traceback.count("File ") == 1
    assert traceback.endswith("LinAlgError: Singular matrix\n")
    assert str(tmp_path) not in traceback


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class ModelManager\n", "in model_manager.py, line 1: SyntaxError"),
        ("\nimport not_there\n", "in model_manager.py, line 2: ModuleNotFoundError"),
        ("x = 1\n", "AttributeError"),
        (
            "class ModelManager:\n    def __init__(self):\n        self.x\n",
            "in model_manager.py, line 3: Attr",
        ),
    ],
)
def test_code_that_cannot_be_loaded_is_told(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(FlopsError) as caught:
        load(tmp_path, source)
    assert caught.value.code is ErrorCode.USER_CODE_FAILED
    assert message in caught.value.message


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    source = MODEL.replace("np.zeros(2), [1, 2]", "np.random.rand(2)").format(**DEFAULTS)
    (tmp_path / "model_manager.py").write_text(source)
    drawn = []
    for _ in range(2):
        sys.modules.pop("model_manager", None)
        drawn.append(MLRepo(tmp_path, node="n", seed=7).parameters()[0])
    np.testing.assert_array_equal(*drawn)
