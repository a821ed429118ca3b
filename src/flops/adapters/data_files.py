"""Data files and folders of people as streams of record batches: Parquet, Arrow, CSV, NPZ, folders of images.

The content of a file tells what it is; only CSV is told by its name, or by having none of the others' marks.
"""

from __future__ import annotations

import contextlib
import json
import random
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from flops.durable_file import file_error
from flops.errors import ErrorCode, FlopsError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_SHUFFLE_SEED = 42
_WHOLE_CSV_BYTES = 256 * 1_048_576  # up to this, all rows decide a column's type, not only the first ones
_BATCH_BYTES = 4 * 1_048_576


@dataclass(frozen=True)
class DataSource:
    """Rows to be read once, one batch after the other."""

    schema: pa.Schema
    batches: Iterable[pa.RecordBatch]


def open_data(path: Path) -> DataSource:
    """Open a file or folder of people's data.

    Args:
        path: a Parquet, Arrow, CSV or NPZ file, or a folder with one sub-folder of images per label.

    Raises:
        FlopsError: ``file_unreadable``, ``data_format_unknown``, ``data_empty``; also while it is read.
    """
    with _translated(path):
        if path.is_dir():
            return _open_images(path)
        with path.open("rb") as file:
            magic = file.read(512)
        if not magic:
            raise FlopsError(ErrorCode.DATA_EMPTY, f"{path} is empty.")
        source = _open_file(path, magic)
        return DataSource(source.schema, _reading(path, source.batches))


def save_parquet(schema: pa.Schema, batches: Iterable[pa.RecordBatch], path: Path) -> int:
    """Write rows to a Parquet file, which is whole or not there; returns how many they were.

    Raises:
        FlopsError: ``file_unreadable``, ``disk_full``.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    rows = 0
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                rows += batch.num_rows
        temporary.replace(path)
    except OSError as exc:
        raise file_error(exc, path) from exc
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def _open_file(path: Path, magic: bytes) -> DataSource:
    if magic.startswith(b"PAR1"):
        file = pq.ParquetFile(path)
        return DataSource(file.schema_arrow, file.iter_batches())
    if magic.startswith(b"ARROW1"):
        reader = pa.ipc.open_file(path)
        return DataSource(reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches)))
    if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")) and zipfile.is_zipfile(path):
        return _open_npz(path)
    if path.suffix.lower() in {".csv", ".tsv", ".txt"} or (not path.suffix and b"\0" not in magic):
        return _open_csv(path)
    raise _unknown(path, "it is neither Parquet, Arrow nor NPZ by its content, nor CSV by its name")


def _open_csv(path: Path) -> DataSource:
    parsing = pa_csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    if path.stat().st_size <= _WHOLE_CSV_BYTES:
        table = pa_csv.read_csv(path, parse_options=parsing)
        return DataSource(table.schema, table.to_batches())
    reading = pa_csv.ReadOptions(block_size=64 * 1_048_576)
    reader = pa_csv.open_csv(path, read_options=reading, parse_options=parsing)
    return DataSource(reader.schema, reader)


def _open_npz(path: Path) -> DataSource:
    with np.load(path, allow_pickle=False) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    lengths = {name: len(array) if array.ndim else 0 for name, array in columns.items()}
    if not columns or 0 in lengths.values():
        raise FlopsError(ErrorCode.DATA_EMPTY, f"{path} has no rows: its arrays are {lengths}.")
    if len(set(lengths.values())) > 1:
        raise FlopsError(
            ErrorCode.DATA_FORMAT_UNKNOWN,
            f"The arrays of {path} have different lengths: {lengths}.",
            hint="Save arrays with one row per sample, such as x and y: np.savez(FILE, x=x, y=y).",
        )
    fields, arrays_ = zip(*(_column(path, name, array) for name, array in columns.items()), strict=True)
    table = pa.Table.from_arrays(list(arrays_), schema=pa.schema(list(fields)))
    return DataSource(table.schema, table.to_batches(max_chunksize=_rows_per_batch(table)))


def _column(path: Path, name: str, array: np.ndarray[Any, Any]) -> tuple[pa.Field, pa.Array]:
    """A column of an array: flat values, or one list of fixed size per row with its shape beside it."""
    try:
        values = pa.array(np.ascontiguousarray(array).reshape(-1))
    except pa.ArrowException as exc:
        raise _unknown(path, f"its array {name} has values of type {array.dtype}") from exc
    if array.ndim == 1:
        return pa.field(name, values.type), values
    lists = pa.FixedSizeListArray.from_arrays(values, int(np.prod(array.shape[1:])))
    return pa.field(name, lists.type, metadata={"shape": json.dumps(array.shape[1:])}), lists


def _open_images(folder: Path) -> DataSource:
    """Images as Hugging Face stores them. Rows are mixed, so that every part of them has all labels."""
    labels = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    images = [
        (path, number)
        for number, label in enumerate(labels)
        for path in sorted((folder / label).iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not images:
        raise _unknown(folder, "it has no sub-folder with images")
    random.Random(_SHUFFLE_SEED).shuffle(images)  # noqa: S311 (order, not secrets)
    features = {"image": {"_type": "Image"}, "label": {"names": labels, "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    return DataSource(schema, _reading(folder, _image_batches(images, schema)))


def _image_batches(images: list[tuple[Path, int]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    rows: list[dict[str, Any]] = []
    size_bytes = 0
    for path, label in images:
        content = path.read_bytes()
        rows.append({"image": {"bytes": content, "path": path.name}, "label": label})
        size_bytes += len(content)
        if size_bytes >= _BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(rows, schema=schema)
            rows, size_bytes = [], 0
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=schema)


def _reading(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    with _translated(path):
        yield from batches


def _rows_per_batch(table: pa.Table) -> int:
    return int(max(1, table.num_rows * _BATCH_BYTES // max(1, table.nbytes)))


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno is None:  # Arrow's own: the bytes are wrong
            raise _unknown(path, _first_line(exc)) from exc
        raise FlopsError(
            ErrorCode.FILE_UNREADABLE, f"{exc.filename or path} cannot be read: {exc.strerror}."
        ) from exc
    except (pa.ArrowException, ValueError, zipfile.BadZipFile) as exc:
        raise _unknown(path, _first_line(exc)) from exc


def _unknown(path: Path, reason: str) -> FlopsError:
    return FlopsError(ErrorCode.DATA_FORMAT_UNKNOWN, f"{path} cannot be read as data: {reason}.")


def _first_line(exc: Exception) -> str:
    return str(exc).strip().partition("\n")[0].rstrip(".")
