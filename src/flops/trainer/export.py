"""Export parameters as an MLflow model: ``python -m flops.trainer.export CONTEXT.json [ARRAYS.npz FOLDER]``.

Runs in the environment that saves and serves models. ARRAYS holds the parameters under the keys "0", "1", …
in the order of `ModelManager.get_model_parameters`. FOLDER is replaced. A failure is told by the last line on
standard error, a `FlopsError` as JSON, and by the catalogue's exit code.

Nearly all of its 3 s is importing. Without ARRAYS and FOLDER it imports at once, and waits for them as two
lines on standard input, so that an aggregator can start it beside the rounds; without the lines it ends.

This module is part of the actor kit. Beside the standard library and numpy it needs what the environment has:
MLflow, and the libraries of the user's code.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flops.actor import ActorContext, tell_parent
from flops.errors import ErrorCode, FlopsError
from flops.trainer.ml_repo import MLRepo, read_parameters

Array = npt.NDArray[Any]

_MODEL_CLASSES = {  # flavor: module and names of the classes its models are of, and what people call them
    "sklearn": ("sklearn.base", ("BaseEstimator",), "a scikit-learn estimator"),
    "pytorch": ("torch.nn", ("Module",), "a torch.nn.Module"),
    "keras": ("keras", ("Model",), "a keras.Model"),
    "tensorflow": ("keras", ("Model",), "a Keras model"),
    "xgboost": ("xgboost", ("Booster", "XGBModel"), "an xgboost.Booster or one of XGBoost's estimators"),
}
_REQUIREMENTS = {  # what a flavor's models need, beside what the repository imports
    "sklearn": ("scikit-learn", "scipy", "numpy", "pandas", "cloudpickle", "skops"),
    "pytorch": ("torch", "numpy", "pandas", "cloudpickle"),
    "keras": ("keras", "tensorflow", "tensorflow-cpu", "torch", "jax", "numpy", "pandas"),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "keras", "numpy", "pandas", "cloudpickle"),
    "xgboost": ("xgboost", "scikit-learn", "numpy", "pandas"),
}
_OURS = frozenset({"flops", "flops_utils"})
_OTHER_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "PyYAML", "cv2": "opencv-python"}


def main(argv: Sequence[str]) -> int:
    """Export; returns the exit code."""
    context = None
    try:
        context = ActorContext.load(Path(argv[0]))
        repo = load_repository(context)
        orders = argv[1:] or sys.stdin.read().splitlines()
        if orders:
            export(context, repo, Path(orders[0]), Path(orders[1]))
    except FlopsError as exc:
        return tell_parent(exc, context)
    except Exception as exc:  # noqa: BLE001 (the last line of defence: the aggregator reads one JSON line)
        return tell_parent(
            FlopsError(
                ErrorCode.MODEL_EXPORT_FAILED,
                f"The model could not be saved: {type(exc).__name__}: {exc}",
                details={"traceback": traceback.format_exc()},
            ),
            context,
        )
    return 0


def load_repository(context: ActorContext) -> MLRepo:
    """Import the repository, and the libraries that save its model.

    Raises:
        FlopsError: ``user_code_failed``, ``model_export_failed`` when the flavor is unknown or not installed.
    """
    repo = MLRepo(Path(context.repo_dir), node=context.node_name)
    flavor = str(context.config["flavor"])
    _classes_of(flavor)
    importlib.import_module(f"mlflow.{flavor}")
    return repo


def export(context: ActorContext, repo: MLRepo, parameters: Path, folder: Path) -> None:
    """Save the repository's model with these parameters to `folder`, as an MLflow model.

    Raises:
        FlopsError: ``user_code_failed``, ``model_export_failed``.
    """
    flavor = str(context.config["flavor"])
    arrays = read_parameters(parameters)
    model = repo.model(arrays)
    _check(model, flavor)
    signature = _signature(model, flavor, repo.input_example())
    partial = folder.with_name(f"{folder.name}.partial")
    for path in (partial, folder):
        shutil.rmtree(path, ignore_errors=True)
    _save(model, flavor, partial, Path(context.repo_dir).resolve(), signature)
    for cache in partial.rglob("__pycache__"):
        shutil.rmtree(cache)
    partial.rename(folder)


def _save(model: Any, flavor: str, path: Path, repo: Path, signature: Any) -> None:
    """Save with MLflow. scikit-learn: skops where it can, because loading it runs no code; else cloudpickle.

    skops refuses classes that are not of scikit-learn and its kin, such as the user's own estimators.
    """
    library = importlib.import_module(f"mlflow.{flavor}")
    arguments: dict[str, Any] = {
        "signature": signature,
        "pip_requirements": _requirements(flavor, repo),
        "code_paths": _code_paths(repo) or None,
    }
    if flavor == "sklearn":
        exceptions = importlib.import_module("mlflow.exceptions")
        try:
            if _is_installed("skops"):
                library.save_model(
                    model, path, serialization_format="skops", **arguments | {"code_paths": None}
                )
                return
        except exceptions.MlflowException:
            shutil.rmtree(path, ignore_errors=True)
        library.save_model(model, path, serialization_format="cloudpickle", **arguments)
    elif flavor == "xgboost":
        # The text form: other versions of XGBoost read it, and it has no code of the repository.
        library.save_model(model, path, model_format="json", **arguments | {"code_paths": None})
    elif flavor == "pytorch":
        # The traced format would need an example and fixes the shapes it was traced with.
        library.save_model(model, path, serialization_format="pickle", **arguments)
    else:
        classes = _own_keras_classes(model, repo)
        if flavor == "keras" and not classes:
            del arguments["code_paths"]
        else:  # mlflow.keras cannot save classes that are not of Keras; mlflow.tensorflow can
            library = importlib.import_module("mlflow.tensorflow")
            arguments["custom_objects"] = classes
        library.save_model(model, str(path), **arguments)


def _own_keras_classes(model: Any, repo: Path) -> dict[str, type]:
    """Classes of the model and its layers, however deep, that the repository defines."""
    found = {}
    waiting = [model]
    while waiting:
        layer = waiting.pop()
        waiting += getattr(layer, "layers", [])
        file = getattr(sys.modules.get(type(layer).__module__), "__file__", None)
        if file and Path(file).is_relative_to(repo):
            found[type(layer).__name__] = type(layer)
    return found


def _classes_of(flavor: str) -> tuple[type, ...]:
    if flavor not in _MODEL_CLASSES:
        raise FlopsError(ErrorCode.MODEL_EXPORT_FAILED, f"The flavor {flavor!r} is not supported.")
    module, names, _ = _MODEL_CLASSES[flavor]
    try:
        library = importlib.import_module(module)
    except ImportError as exc:
        raise FlopsError(
            ErrorCode.MODEL_EXPORT_FAILED,
            f"The flavor is {flavor!r}, but the environment does not have its library: {exc}.",
            hint="Name the library in the repository's dependency file, or correct ml_model_flavor.",
        ) from exc
    return tuple(getattr(library, name) for name in names)


def _check(model: Any, flavor: str) -> None:
    if not isinstance(model, _classes_of(flavor)):
        raise FlopsError(
            ErrorCode.MODEL_EXPORT_FAILED,
            f"ModelManager.get_model() returned a {type(model).__module__}.{type(model).__qualname__}, "
            f"but ml_model_flavor {flavor!r} needs {_MODEL_CLASSES[flavor][2]}.",
        )


def _signature(model: Any, flavor: str, example: Any) -> Any:
    """What the model takes and gives; None, with a note, when it cannot be told."""
    models = importlib.import_module("mlflow.models")
    if example is None and flavor == "sklearn":
        example = _sklearn_example(model)
    elif example is None and flavor in {"keras", "tensorflow"}:
        return _keras_signature(model)
    if example is None:
        sys.stderr.write(
            "The model is saved without a signature; ModelManager.get_input_example() gives it one.\n"
        )
        return None
    try:
        outputs = _schema_of(_predict(model, flavor, example))
    except Exception as exc:  # noqa: BLE001 (user code and foreign libraries: whatever it is, there is a model)
        sys.stderr.write(f"The signature lacks the outputs: {type(exc).__name__}: {exc}\n")
        outputs = None
    return models.ModelSignature(_schema_of(example), outputs)


def _schema_of(value: Any) -> Any:
    """MLflow's schema of rows. Of arrays it is made here, because MLflow needs scipy to infer it."""
    if isinstance(value, np.ndarray):
        return _tensor_schema(value.dtype, (None, *value.shape[1:]))
    return importlib.import_module("mlflow.models").infer_signature(value).inputs


def _tensor_schema(dtype: Any, shape: Sequence[int | None]) -> Any:
    types = importlib.import_module("mlflow.types")
    sizes = tuple(-1 if size is None else int(size) for size in shape)
    return types.Schema([types.TensorSpec(np.dtype(dtype), sizes)])


def _predict(model: Any, flavor: str, example: Any) -> Any:
    if flavor == "pytorch":
        torch = importlib.import_module("torch")
        model.eval()
        with torch.no_grad():
            return model(torch.as_tensor(np.asarray(example))).numpy()
    if flavor == "xgboost" and type(model).__name__ == "Booster":
        return model.predict(importlib.import_module("xgboost").DMatrix(example))
    return np.asarray(model.predict(example))


def _sklearn_example(model: Any) -> Any:
    """One row of zeros, as wide as the model was trained with."""
    names = getattr(model, "feature_names_in_", None)
    if names is not None:
        return importlib.import_module("pandas").DataFrame(np.zeros((1, len(names))), columns=list(names))
    width = getattr(model, "n_features_in_", None)
    if width is None and getattr(model, "coef_", None) is not None:
        width = np.shape(model.coef_)[-1]
    if width is None and getattr(model, "coefs_", None):
        width = np.shape(model.coefs_[0])[0]
    return None if width is None else np.zeros((1, int(width)))


def _keras_signature(model: Any) -> Any:
    """Of models with one input and one output tensor; the others need an example."""
    inputs, outputs = getattr(model, "inputs", None), getattr(model, "outputs", None)
    if not inputs or not outputs or len(inputs) != 1 or len(outputs) != 1:
        return None
    schemas = [
        _tensor_schema(getattr(tensor.dtype, "name", tensor.dtype), tensor.shape)
        for tensor in (inputs[0], outputs[0])
    ]
    return importlib.import_module("mlflow.models").ModelSignature(*schemas)


def _requirements(flavor: str, repo: Path) -> list[str]:
    """Exact pins, as installed here, of what the flavor needs and what the repository's modules import."""
    names = {name for name in _REQUIREMENTS[flavor] if _is_installed(name)}
    for path in _loaded_files(repo):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported = [node.module]
            else:
                continue
            for name in imported:
                names.update(_distributions_of(name.partition(".")[0], repo))
    return sorted(f"{name}=={importlib.metadata.version(name)}" for name in names)


def _distributions_of(module: str, repo: Path) -> Sequence[str]:
    """Distributions that a top-level module comes from; none for the standard library and ours."""
    is_own = (repo / module).exists() or (repo / f"{module}.py").exists()
    if is_own or module in sys.stdlib_module_names or module in _OURS:
        return ()
    name = _OTHER_NAMES.get(module, module)
    if _is_installed(name):
        return (name,)
    return importlib.metadata.packages_distributions().get(module, ())  # reads every package: half a second


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _loaded_files(repo: Path) -> list[Path]:
    """Source files of the repository that are imported now."""
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return sorted(
        {Path(file) for file in files if file and file.startswith(f"{repo}/") and file.endswith(".py")}
    )


def _code_paths(repo: Path) -> list[str]:
    """The repository's modules and packages that are imported: the classes of the model may be in them."""
    return sorted({str(repo / path.relative_to(repo).parts[0]) for path in _loaded_files(repo)})


if __name__ == "__main__":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # noqa: TID251 (for MLflow, not read by us)
    sys.exit(main(sys.argv[1:]))
