"""`flops model predict` asks real inference servers with every kind of file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.models import infer_signature
from PIL import Image
from sklearn.linear_model import LinearRegression, LogisticRegression

from flops.actor import ActorContext
from flops.adapters.http_server import HttpServer
from flops.cli.prediction import predict_file
from flops.errors import ErrorCode, FlopsError
from flops.serving.app import Model, application

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ROWS = np.array([[0.0, 1, 2, 3], [4.0, 0, 1, 2], [1.0, 5, 2, 0], [9.0, 9, 8, 7]])
LABELS = [0, 1, 2, 1]


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Two served models: one takes rows of four numbers, one takes the columns a to d by their names."""
    folder = tmp_path_factory.mktemp("models")
    frame = pd.DataFrame(ROWS, columns=list("abcd"))
    models = {
        "rows": (LogisticRegression(C=1e6, max_iter=1_000).fit(ROWS, LABELS), ROWS),
        "columns": (LinearRegression().fit(frame, [1.0, 2, 3, 4]), frame),
    }
    servers = []
    found = {}
    for name, (model, rows) in models.items():
        mlflow.sklearn.save_model(
            model,
            folder / name,
            signature=infer_signature(rows, model.predict(rows)),
            pip_requirements=["scikit-learn"],
            serialization_format="skops",
        )
        context = ActorContext(service_id="i", project_id="p", node_name="n", work_dir=str(folder))
        app = application(Model(folder / name), context, lambda: None)
        server = HttpServer(app, "127.0.0.1", 0)
        server.start()
        servers.append(server)
        found[name] = f"http://127.0.0.1:{server.port}"
    yield found
    for server in servers:
        server.close()


def png(row: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(row.reshape(2, 2).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*"abcd", "label"])
        writer.writerows([*row, label] for row, label in zip(ROWS, LABELS, strict=True))


COLUMNS = {name: ROWS[:, index] for index, name in enumerate("abcd")}
RECORDS = [dict(zip("abcd", map(float, row), strict=True)) for row in ROWS]
SPLIT = {"dataframe_split": {"columns": [*"abcd"], "data": ROWS.tolist()}}
IMAGES = [{"bytes": png(row), "path": "x.png"} for row in ROWS]
FILES: dict[str, Callable[[Path], Any]] = {
    "table.parquet": lambda path: pq.write_table(pa.table({**COLUMNS, "label": LABELS}), path),
    "lists.parquet": lambda path: pq.write_table(pa.table({"x": ROWS.tolist(), "label": LABELS}), path),
    "images.parquet": lambda path: pq.write_table(pa.table({"image": IMAGES, "label": LABELS}), path),
    "table.csv": write_csv,
    "arrays.npz": lambda path: np.savez(path, x=ROWS, y=np.array(LABELS)),
    "squares.npz": lambda path: np.savez(path, x=ROWS.reshape(4, 2, 2), y=np.array(LABELS)),
    "records.json": lambda path: path.write_text(json.dumps(RECORDS)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS.tolist())),
    "inputs.json": lambda path: path.write_text(json.dumps({"inputs": ROWS.tolist()})),
    "split.json": lambda path: path.write_text(json.dumps(SPLIT)),
}


def write(path: Path) -> Path:
    """Write the rows, with labels where the format has them; the name says which format."""
    FILES[path.name](path)
    return path


@pytest.mark.parametrize(
    "name",
    ["table.parquet", "lists.parquet", "images.parquet", "table.csv", "arrays.npz", "squares.npz"],
)
def test_files_with_labels(urls: dict[str, str], tmp_path: Path, name: str) -> None:
    found = predict_file(urls["rows"], write(tmp_path / name), None)
    assert [row.prediction for row in found.rows] == LABELS
    assert [row.label for row in found.rows] == LABELS
    assert [row.row for row in found.rows] == [1, 2, 3, 4]
    assert found.accuracy == 1.0


@pytest.mark.parametrize("name", ["rows.json", "inputs.json"])
def test_json_without_labels(urls: dict[str, str], tmp_path: Path, name: str) -> None:
    found = predict_file(urls["rows"], write(tmp_path / name), 2)
    assert [row.prediction for row in found.rows] == LABELS[:2]
    assert found.rows[0].label is None
    assert found.accuracy is None


@pytest.mark.parametrize("name", ["table.parquet", "table.csv", "records.json", "split.json"])
def test_a_model_with_named_columns(urls: dict[str, str], tmp_path: Path, name: str) -> None:
    found = predict_file(urls["columns"], write(tmp_path / name), None)
    assert [row.prediction for row in found.rows] == pytest.approx([1.0, 2, 3, 4])
    assert found.accuracy is None, "numbers that are no classes have no accuracy"


def test_many_rows_are_sent_in_pieces(urls: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "many.npz"
    np.savez(path, x=np.tile(ROWS, (400, 1)), y=np.tile(LABELS, 400))
    found = predict_file(urls["rows"], path, None)
    assert [row.prediction for row in found.rows] == LABELS * 400
    assert len(predict_file(urls["rows"], path, 777).rows) == 777


def test_another_label_column(urls: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "named.parquet"
    pq.write_table(pa.table({"x": ROWS.tolist(), "kind": LABELS}), path)
    assert predict_file(urls["rows"], path, None, "kind").accuracy == 1.0
    with pytest.raises(FlopsError, match="no column 'sort'") as raised:
        predict_file(urls["rows"], path, None, "sort")
    assert raised.value.code is ErrorCode.INPUT_INVALID


def test_rows_that_do_not_fit_say_what_the_model_expects(urls: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "narrow.npz"
    np.savez(path, x=ROWS[:, :3])
    with pytest.raises(FlopsError, match="expects rows of 4 numbers") as raised:
        predict_file(urls["rows"], path, None)
    assert raised.value.code is ErrorCode.INPUT_INVALID


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("x.json", b"{", ErrorCode.DATA_FORMAT_UNKNOWN),
        ("x.json", b"[]", ErrorCode.DATA_FORMAT_UNKNOWN),
        ("x.json", b'{"other": 1}', ErrorCode.DATA_FORMAT_UNKNOWN),
        ("x.json", b'{"inputs": 5}', ErrorCode.DATA_FORMAT_UNKNOWN),
        ("x.parquet", b"", ErrorCode.DATA_EMPTY),
        ("x.parquet", b"PAR1 and nothing else", ErrorCode.DATA_FORMAT_UNKNOWN),
        ("x.png", b"\x89PNG", ErrorCode.DATA_FORMAT_UNKNOWN),
        ("x.json", None, ErrorCode.FILE_UNREADABLE),
        ("x.csv", None, ErrorCode.FILE_UNREADABLE),
    ],
)
def test_files_that_are_no_rows(tmp_path: Path, name: str, content: bytes | None, code: ErrorCode) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FlopsError) as raised:
        predict_file("http://127.0.0.1:9", tmp_path / name, None)
    assert raised.value.code is code
    assert name in raised.value.message


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"x": [[1.0], [1.0, 2.0]]}),
        pa.table({"x": [[1.0], None]}),
        pa.table({"x": [["a"], ["b"]]}),
        pa.table({"label": [1]}),
    ],
)
def test_columns_that_are_no_rows_of_numbers(tmp_path: Path, table: pa.Table) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(table, path)
    with pytest.raises(FlopsError) as raised:
        predict_file("http://127.0.0.1:9", path, None)
    assert raised.value.code is ErrorCode.INPUT_INVALID


def test_a_service_that_is_away(tmp_path: Path) -> None:
    with pytest.raises(FlopsError, match="does not answer") as raised:
        predict_file("http://127.0.0.1:9", write(tmp_path / "arrays.npz"), None)
    assert raised.value.code is ErrorCode.UNREACHABLE
