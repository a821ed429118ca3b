"""``flops model predict``: sends rows of a file to a served model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from flops.core.model import Value
from flops.errors import ErrorCode, FlopsError

LABELS = ("label", "labels", "target", "y")
_TIMEOUT_S = 60.0


class PredictedRow(Value):
    """One row's prediction, beside its label when the file has one."""

    row: int
    prediction: Any
    label: Any = None


class Predictions(Value):
    """Predictions of a served model, in the order of the file's rows."""

    url: str
    rows: tuple[PredictedRow, ...]
    accuracy: float | None = None  # of rows with a label


def predict_file(inference_url: str, path: Path, limit: int | None) -> Predictions:
    """Send the rows of a Parquet, CSV or NPZ file to a served model.

    Args:
        inference_url: base URL of the inference service.
        path: its columns are the model's inputs, in order; one of `LABELS` is kept back as the label. An NPZ
            file has one array of inputs, and may have one of labels.
        limit: send only the first rows.

    Raises:
        FlopsError: ``file_unreadable``, ``data_format_unknown``, ``unreachable``, or the service's answer.
    """
    inputs, labels = _read(path)
    inputs, labels = inputs[:limit], labels[:limit]
    answers = _ask(f"{inference_url}/invocations", inputs.tolist())
    padded = labels if len(labels) else [None] * len(answers)
    rows = tuple(
        PredictedRow(row=number, prediction=answer, label=label)
        for number, (answer, label) in enumerate(zip(answers, padded, strict=True), start=1)
    )
    accuracy = sum(r.prediction == r.label for r in rows) / len(rows) if len(labels) else None
    return Predictions(url=f"{inference_url}/invocations", rows=rows, accuracy=accuracy)


def _read(path: Path) -> tuple[np.ndarray[Any, Any], Sequence[Any]]:
    try:
        if path.suffix == ".npz":
            return _read_npz(path)
        if path.suffix == ".parquet":
            return _split(path, pq.read_table(path))
        if path.suffix == ".csv":
            return _split(path, pyarrow.csv.read_csv(path))
    except (OSError, ValueError, pa.ArrowException) as exc:
        raise FlopsError(ErrorCode.FILE_UNREADABLE, f"{path} cannot be read: {exc}.") from exc
    raise FlopsError(
        ErrorCode.DATA_FORMAT_UNKNOWN,
        f"{path.name} is neither .parquet, .csv nor .npz.",
        hint="Give one of these.",
    )


def _read_npz(path: Path) -> tuple[np.ndarray[Any, Any], Sequence[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        labels = [name for name in arrays.files if name in LABELS]
        inputs = [name for name in arrays.files if name not in LABELS]
        if len(inputs) != 1 or len(labels) > 1:
            raise FlopsError(
                ErrorCode.DATA_FORMAT_UNKNOWN,
                f"{path.name} has the arrays {', '.join(arrays.files)}; needed are one of inputs and at most "
                f"one of labels ({', '.join(LABELS)}).",
            )
        return arrays[inputs[0]], arrays[labels[0]].tolist() if labels else []


def _split(path: Path, table: pa.Table) -> tuple[np.ndarray[Any, Any], Sequence[Any]]:
    label = next((name for name in table.column_names if name in LABELS), None)
    features = table.drop_columns([label]) if label else table
    other = [
        f.name for f in features.schema if not (pa.types.is_integer(f.type) or pa.types.is_floating(f.type))
    ]
    if other:
        raise FlopsError(
            ErrorCode.DATA_FORMAT_UNKNOWN,
            f"Columns of {path.name} are not numbers: {', '.join(other)}.",
            hint="Prepare the rows as the training code does, for example into an NPZ file.",
        )
    inputs = np.column_stack([column.to_numpy() for column in features.itercolumns()])
    return inputs, table[label].to_pylist() if label else []


def _ask(url: str, inputs: list[Any]) -> list[Any]:
    try:
        response = httpx.post(url, json={"inputs": inputs}, timeout=_TIMEOUT_S)
    except httpx.TransportError as exc:
        raise FlopsError(
            ErrorCode.UNREACHABLE, f"The inference service at {url} does not answer: {exc}.",
            hint="`flops project show` says whether it runs.",
        ) from exc  # fmt: skip
    body = response.json()
    if response.is_error:
        raise FlopsError.from_dict(body)
    predictions: list[Any] = body["predictions"]
    return predictions
