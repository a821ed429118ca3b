"""``flops model predict``: sends the rows of a file to a served model.

How rows are written for a model depends on its signature, which only the service knows. So every way that
suits the file is tried with the first rows; the first one that the service accepts is used for all.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from flops.adapters.data_files import open_data
from flops.core.model import Value
from flops.errors import ErrorCode, FlopsError

LABELS = ("label", "labels", "target", "y")
BODY_KEYS = ("dataframe_split", "dataframe_records", "instances", "inputs")
ROWS_PER_REQUEST = 500
_TIMEOUT_S = 60.0

Body = dict[str, Any]


class PredictedRow(Value):
    """One row's prediction, beside its label when the file has one."""

    row: int  # counted from 1
    prediction: Any
    label: Any = None


class Predictions(Value):
    """Predictions of a served model, in the order of the file's rows."""

    url: str
    rows: tuple[PredictedRow, ...]
    accuracy: float | None = None  # share of labels that were predicted; None unless labels are classes


@dataclass(frozen=True)
class _Rows:
    """Rows without their labels, and the ways to write a slice of them as a request's body."""

    count: int
    ways: Sequence[Callable[[int, int], Body]]
    labels: Sequence[Any] | None = None


def predict_file(inference_url: str, path: Path, limit: int | None, label: str | None = None) -> Predictions:
    """Send the rows of a file to a served model.

    Args:
        inference_url: base URL of the inference service.
        path: what `flops data push` takes, or JSON: a list of rows, or a body of MLflow's. Columns are the
            model's inputs; images are sent as their pixels.
        limit: send only the first rows.
        label: the column that is kept back and shown beside the predictions; one of `LABELS` if not given.

    Raises:
        FlopsError: ``file_unreadable``, ``data_format_unknown``, ``data_empty``, ``input_invalid``,
            ``unreachable``, or the service's answer.
    """
    is_json = path.suffix.lower() == ".json"
    rows = _read_json(path, label) if is_json else _rows_of_table(_read_table(path, limit), path, label)
    count = rows.count if limit is None else min(limit, rows.count)
    url = f"{inference_url.rstrip('/')}/invocations"
    answers = _ask_for_all(url, rows, count)
    labels = rows.labels[:count] if rows.labels is not None else [None] * len(answers)
    predicted = tuple(
        PredictedRow(row=number, prediction=answer, label=label)
        for number, (answer, label) in enumerate(zip(answers, labels, strict=True), start=1)
    )
    return Predictions(url=url, rows=predicted, accuracy=_accuracy(predicted))


def _read_table(path: Path, limit: int | None) -> pa.Table:
    source = open_data(path)
    batches: list[pa.RecordBatch] = []
    rows = 0
    for batch in source.batches:
        batches.append(batch)
        rows += batch.num_rows
        if limit is not None and rows >= limit:
            break
    table = pa.Table.from_batches(batches, schema=source.schema)
    if table.num_rows == 0:
        raise FlopsError(ErrorCode.DATA_EMPTY, f"{path} has no rows.")
    return table.slice(0, limit)


def _rows_of_table(table: pa.Table, path: Path, label: str | None) -> _Rows:
    name = _label_column(table.column_names, path, label)
    labels = table[name].to_pylist() if name is not None else None
    features = table.drop_columns([name]) if name is not None else table
    if features.num_columns == 0:
        raise FlopsError(ErrorCode.INPUT_INVALID, f"{path} has no columns but the label {name!r}.", hint="")
    if features.num_columns == 1 and not _is_scalar(features.schema.field(0).type):
        array = _array_of(features, path)
        flat = array.reshape(len(array), -1)
        arrays = [flat] if array.ndim == 2 else [flat, array]
        return _Rows(table.num_rows, [_inputs_of(item) for item in arrays], labels)
    ways: list[Callable[[int, int], Body]] = [
        lambda begin, end: _split_of(features.slice(begin, end - begin))
    ]
    if all(_is_number(field.type) for field in features.schema):
        ways.append(_inputs_of(np.column_stack([column.to_numpy() for column in features.itercolumns()])))
    return _Rows(table.num_rows, ways, labels)


def _read_json(path: Path, label: str | None) -> _Rows:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise FlopsError(ErrorCode.FILE_UNREADABLE, f"{path} cannot be read: {exc.strerror}.") from exc
    except ValueError as exc:
        raise FlopsError(ErrorCode.DATA_FORMAT_UNKNOWN, f"{path} is not JSON: {exc}.") from exc
    if isinstance(content, dict):
        return _rows_of_body(content, path)
    if not isinstance(content, list) or not content:
        raise _unknown_json(path)
    if not all(isinstance(row, dict) for row in content):
        return _Rows(len(content), [lambda begin, end: {"inputs": content[begin:end]}])
    name = _label_column(list(content[0]), path, label)
    labels = [row.get(name) for row in content] if name is not None else None
    features = [{key: value for key, value in row.items() if key != name} for row in content]
    return _Rows(len(content), [lambda begin, end: {"dataframe_records": features[begin:end]}], labels)


def _rows_of_body(body: Body, path: Path) -> _Rows:
    """A body of MLflow's own, whose rows can be counted and cut."""
    key = next((key for key in BODY_KEYS if key in body), None)
    if key is None:
        raise _unknown_json(path)
    if key == "dataframe_split" and isinstance(body[key], dict) and isinstance(body[key].get("data"), list):
        split = body[key]
        rows = split["data"]
        rest = {name: value for name, value in split.items() if name not in {"data", "index"}}
        return _Rows(len(rows), [lambda begin, end: {key: {**rest, "data": rows[begin:end]}}])
    rows = body[key]
    if not isinstance(rows, list):
        raise _unknown_json(path)
    return _Rows(len(rows), [lambda begin, end: {key: rows[begin:end]}])


def _unknown_json(path: Path) -> FlopsError:
    return FlopsError(
        ErrorCode.DATA_FORMAT_UNKNOWN,
        f"{path} holds neither a list of rows nor one of {', '.join(BODY_KEYS)} with a list of rows.",
        hint="docs/inference.md shows what a model is asked with.",
    )


def _label_column(columns: Sequence[str], path: Path, label: str | None) -> str | None:
    if label is not None and label not in columns:
        raise FlopsError(
            ErrorCode.INPUT_INVALID,
            f"{path} has no column {label!r}; its columns are {', '.join(columns)}.",
            hint="Name one of its columns with --label.",
        )
    return label or next((name for name in LABELS if name in columns), None)


def _array_of(features: pa.Table, path: Path) -> np.ndarray[Any, Any]:
    """The only column's values, one array per row: lists of numbers, or the pixels of images."""
    field, column = features.schema.field(0), features.column(0)
    if column.null_count:
        raise FlopsError(ErrorCode.INPUT_INVALID, f"{path}: column {field.name} has empty rows.", hint="")
    if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
        arrays = [_pixels(image, path) for image in column.to_pylist()]
    else:
        arrays = [np.asarray(row) for row in column.to_pylist()]
    if len({array.shape for array in arrays}) > 1 or arrays[0].dtype.kind not in "biuf":
        raise FlopsError(
            ErrorCode.INPUT_INVALID,
            f"{path}: column {field.name} is not made of equally long rows of numbers.",
            hint="Prepare the rows as the training code does, for example into an NPZ file.",
        )
    stacked = np.stack(arrays)
    shape = json.loads((field.metadata or {}).get(b"shape", b"[]"))
    return stacked.reshape(len(stacked), *shape) if shape else stacked


def _pixels(image: Mapping[str, Any], path: Path) -> np.ndarray[Any, Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(image["bytes"] or b"")) as picture:
            return np.asarray(picture)
    except (OSError, UnidentifiedImageError) as exc:
        raise FlopsError(ErrorCode.DATA_FORMAT_UNKNOWN, f"{path}: {image.get('path')} is no image.") from exc


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_scalar(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _inputs_of(array: np.ndarray[Any, Any]) -> Callable[[int, int], Body]:
    return lambda begin, end: {"inputs": array[begin:end].tolist()}


def _split_of(table: pa.Table) -> Body:
    columns = [column.to_pylist() for column in table.itercolumns()]
    data = [list(row) for row in zip(*columns, strict=True)]
    return {"dataframe_split": {"columns": table.column_names, "data": data}}


def _ask_for_all(url: str, rows: _Rows, count: int) -> list[Any]:
    with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as http:
        end = min(ROWS_PER_REQUEST, count)
        way, answers = _accepted_way(http, url, rows, end)
        while end < count:
            begin, end = end, min(end + ROWS_PER_REQUEST, count)
            answers += _ask(http, url, way(begin, end), end - begin)
    return answers


def _accepted_way(
    http: httpx.Client, url: str, rows: _Rows, end: int
) -> tuple[Callable[[int, int], Body], list[Any]]:
    refusals: list[FlopsError] = []
    for way in rows.ways:
        try:
            return way, _ask(http, url, way(0, end), end)
        except FlopsError as exc:
            if exc.code is not ErrorCode.INPUT_INVALID:
                raise
            refusals.append(exc)
    raise refusals[0]


def _ask(http: httpx.Client, url: str, body: Body, expected: int) -> list[Any]:
    try:
        response = http.post(url, json=body)
    except httpx.TransportError as exc:
        raise FlopsError(
            ErrorCode.UNREACHABLE,
            f"The inference service at {url} does not answer: {str(exc) or type(exc).__name__}.",
            hint="`flops project show` says whether it runs.",
        ) from exc
    except ValueError as exc:  # NaN and infinities have no place in JSON
        raise FlopsError(ErrorCode.INPUT_INVALID, f"The rows cannot be sent: {exc}.", hint="") from exc
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.is_error and isinstance(answer, dict) and "code" in answer:
        raise FlopsError.from_dict(answer)
    predictions = answer.get("predictions") if isinstance(answer, dict) else None
    if not isinstance(predictions, list) or len(predictions) != expected:
        raise FlopsError(
            ErrorCode.UNREACHABLE,
            f"What answers at {url} with status {response.status_code} is no inference service of FLOps.",
        )
    return predictions


def _accuracy(rows: Sequence[PredictedRow]) -> float | None:
    pairs = [(row.prediction, row.label) for row in rows if row.label is not None]
    if not pairs or not all(isinstance(side, (int, str)) for pair in pairs for side in pair):
        return None
    return sum(1 for prediction, label in pairs if prediction == label) / len(pairs)
