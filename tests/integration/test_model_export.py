"""Exporting a repository's model, as the aggregator does it: a process in the model's environment."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flops.actor import ActorContext
from flops.errors import ErrorCode, FlopsError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

LINEAR = """
import numpy as np
from sklearn.linear_model import LogisticRegression
from layers import SCALE

class ModelManager:
    def __init__(self):
        self.model = LogisticRegression(max_iter=1, warm_start=True)
        self.model.classes_ = np.arange(3)
    def get_model(self):
        return self.model
    def set_model_parameters(self, parameters):
        self.model.coef_, self.model.intercept_ = parameters
"""
LAYERS = "SCALE = 2\n"
CUSTOM = """
from estimators.scaled import Scaled

class ModelManager:
    def __init__(self):
        self.model = Scaled()
    def get_model(self):
        return self.model
    def set_model_parameters(self, parameters):
        self.model.weights = parameters[0]
    def get_input_example(self):
        import pandas as pd
        return pd.DataFrame({"a": [1.0], "b": [2.0]})
"""
SCALED = """
import numpy as np
from sklearn.base import BaseEstimator

class Scaled(BaseEstimator):
    def predict(self, rows):
        return np.asarray(rows) @ self.weights
"""
RAISING = """
class ModelManager:
    def set_model_parameters(self, parameters):
        self.first = parameters[7]
    def get_model(self):
        return None
"""
NO_MODEL = """
class ModelManager:
    def set_model_parameters(self, parameters): ...
    def get_model(self):
        return {"weights": 1}
"""
WEIGHTS = [np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]]), np.zeros(3)]


class Export:
    """A repository and its export."""

    def __init__(
        self, folder: Path, files: dict[str, str], arrays: list[Any], flavor: str = "sklearn"
    ) -> None:
        self.repo, self.work, self.out = folder / "repo", folder / "work", folder / "model"
        self.arrays = folder / "best.npz"
        self.work.mkdir(parents=True)
        for name, text in files.items():
            path = self.repo / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        np.savez(self.arrays, **{str(index): array for index, array in enumerate(arrays)})
        context = ActorContext(
            "aggregator-p", "p", "edge-1", str(self.work), repo_dir=str(self.repo), config={"flavor": flavor}
        )
        self.context = context.save()

    def run(self, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "flops.trainer.export", str(self.context)]
        argv += [str(self.arrays), str(self.out)] if stdin is None else []
        return subprocess.run(argv, capture_output=True, text=True, input=stdin, cwd=self.work, check=False)

    def error(self) -> FlopsError:
        done = self.run()
        error = FlopsError.from_dict(json.loads(done.stderr.splitlines()[-1]))
        assert done.returncode == error.spec.exit_code
        assert not self.out.exists()
        return error

    def load_elsewhere(self, rows: list[Any]) -> Any:
        """Predictions in a process that has the model's folder only."""
        code = (
            "import json, sys, mlflow; import pandas as pd; import numpy as np\n"
            "model = mlflow.pyfunc.load_model(sys.argv[1]); rows = json.loads(sys.argv[2])\n"
            "rows = pd.DataFrame(rows) if isinstance(rows[0], dict) else np.array(rows)\n"
            "print(json.dumps(np.asarray(model.predict(rows)).tolist()))\n"
        )
        argv = [sys.executable, "-W", "ignore", "-c", code, str(self.out), json.dumps(rows)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd="/")
        return json.loads(done.stdout.splitlines()[-1])

    @property
    def description(self) -> dict[str, Any]:
        return dict(yaml.safe_load((self.out / "MLmodel").read_text()))


def test_a_scikit_learn_model_is_saved_safely_with_signature_and_pins(tmp_path: Path) -> None:
    export = Export(tmp_path, {"model_manager.py": LINEAR, "layers.py": LAYERS}, WEIGHTS)
    export.out.mkdir()
    (export.out / "of an earlier try").touch()
    done = export.run()
    assert done.returncode == 0, done.stderr
    assert {path.name for path in export.out.iterdir()} == {
        "MLmodel",
        "conda.yaml",
        "model.skops",
        "python_env.yaml",
        "requirements.txt",
    }
    inputs = json.loads(export.description["signature"]["inputs"])
    assert inputs == [{"type": "tensor", "tensor-spec": {"dtype": "float64", "shape": [-1, 4]}}]
    pins = (export.out / "requirements.txt").read_text().split()
    assert f"scikit-learn=={version('scikit-learn')}" in pins
    assert f"numpy=={version('numpy')}" in pins
    assert all("==" in pin and not pin.startswith("flops") for pin in pins)
    assert export.load_elsewhere([[0.0, 9, 0, 0], [0.0, 0, 9, 0]]) == [1, 2]


def test_the_user_s_own_estimator_takes_its_code_along(tmp_path: Path) -> None:
    files = {"model_manager.py": CUSTOM, "estimators/scaled.py": SCALED, "estimators/__init__.py": ""}
    export = Export(tmp_path, files, [np.array([2.0, 3.0])])
    done = export.run()
    assert done.returncode == 0, done.stderr
    assert (export.out / "code" / "estimators" / "scaled.py").exists()
    assert not list(export.out.rglob("__pycache__"))
    inputs = json.loads(export.description["signature"]["inputs"])
    assert [item["name"] for item in inputs] == ["a", "b"]
    assert export.load_elsewhere([{"a": 1.0, "b": 1.0}]) == [5.0]


def test_a_warm_export_waits_for_the_parameters(tmp_path: Path) -> None:
    export = Export(tmp_path, {"model_manager.py": LINEAR, "layers.py": LAYERS}, WEIGHTS)
    done = export.run(stdin=f"{export.arrays}\n{export.out}\n")
    assert done.returncode == 0, done.stderr
    assert (export.out / "MLmodel").exists()


def test_a_warm_export_ends_when_nobody_wants_it(tmp_path: Path) -> None:
    export = Export(tmp_path, {"model_manager.py": LINEAR, "layers.py": LAYERS}, WEIGHTS)
    done = export.run(stdin="")
    assert done.returncode == 0, done.stderr
    assert not export.out.exists()


def test_an_exception_of_the_user_s_code_shows_the_user_s_line(tmp_path: Path) -> None:
    error = Export(tmp_path, {"model_manager.py": RAISING}, WEIGHTS).error()
    assert error.code is ErrorCode.USER_CODE_FAILED
    assert "model_manager.py, line 4" in error.message
    assert "IndexError: list index out of range" in error.details["traceback"]
    assert "flops/trainer" not in error.details["traceback"]


def test_what_is_no_model_of_the_flavor_is_refused(tmp_path: Path) -> None:
    error = Export(tmp_path, {"model_manager.py": NO_MODEL}, []).error()
    assert error.code is ErrorCode.MODEL_EXPORT_FAILED
    assert "builtins.dict" in error.message
    assert "a scikit-learn estimator" in error.message


def test_a_flavor_without_its_library_is_told(tmp_path: Path) -> None:
    error = Export(tmp_path, {"model_manager.py": NO_MODEL}, [], flavor="pytorch").error()
    assert error.code is ErrorCode.MODEL_EXPORT_FAILED
    assert "torch" in error.message


def test_damaged_parameters_are_told(tmp_path: Path) -> None:
    export = Export(tmp_path, {"model_manager.py": LINEAR, "layers.py": LAYERS}, WEIGHTS)
    export.arrays.write_bytes(export.arrays.read_bytes()[:100])
    assert export.error().code is ErrorCode.MODEL_EXPORT_FAILED
