"""Data files and folders of people, good and bad."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flops.adapters import data_files
from flops.adapters.data_files import open_data, save_parquet
from flops.errors import ErrorCode, FlopsError

TABLE = pa.table({"n": [1, 2, 3], "s": ["x", "y", None]})


def read(path: Path) -> pa.Table:
    source = open_data(path)
    return pa.Table.from_batches(source.batches, schema=source.schema)


def fails(code: ErrorCode, path: Path) -> str:
    with pytest.raises(FlopsError) as caught:
        read(path)
    assert caught.value.code is code
    assert str(path) in caught.value.message
    return caught.value.message


def png(grey: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes([0, grey])))


def test_parquet_keeps_its_metadata(tmp_path: Path) -> None:
    table = TABLE.replace_schema_metadata({"huggingface": "{}"})
    pq.write_table(table, tmp_path / "any.name")
    found = read(tmp_path / "any.name")
    assert found.equals(table)
    assert found.schema.metadata == {b"huggingface": b"{}"}


def test_arrow_files(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_file(file, TABLE.schema) as writer:
        writer.write_table(TABLE)
    assert read(tmp_path / "x.arrow").equals(TABLE)


@pytest.mark.parametrize(("name", "delimiter"), [("x.csv", ","), ("x.tsv", "\t"), ("x", ",")])
def test_csv(tmp_path: Path, name: str, delimiter: str) -> None:
    path = tmp_path / name
    path.write_text("\n".join(delimiter.join(row) for row in [("n", "s"), ("1", "x"), ("2", "y")]) + "\n")
    assert read(path).to_pydict() == {"n": [1, 2], "s": ["x", "y"]}


def test_all_rows_of_a_csv_decide_its_types(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("n\n" + "1\n" * 600_000 + "1.5\n")
    assert read(path).schema.field("n").type == pa.float64()


def test_a_large_csv_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "_WHOLE_CSV_BYTES", 10)
    path = tmp_path / "x.csv"
    path.write_text("n,s\n" + "1,x\n" * 1_000)
    assert read(path).num_rows == 1_000


def test_npz_arrays_become_columns(tmp_path: Path) -> None:
    images = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 2, 2)
    np.savez(tmp_path / "x.npz", x=images, y=np.array([0, 1, 2]), name=np.array(["a", "b", "c"]))
    table = read(tmp_path / "x.npz")
    field = table.schema.field("x")
    assert field.type == pa.list_(pa.uint8(), 4)
    assert json.loads(field.metadata[b"shape"]) == [2, 2]
    assert table["x"].to_pylist() == images.reshape(3, 4).tolist()
    assert table["y"].to_pylist() == [0, 1, 2]
    assert table["name"].to_pylist() == ["a", "b", "c"]


def test_compressed_npz(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.ones((5, 3)))
    assert read(tmp_path / "x.npz").num_rows == 5


@pytest.mark.parametrize(
    ("arrays", "code", "part"),
    [
        ({"x": np.ones(3), "y": np.ones(2)}, ErrorCode.DATA_FORMAT_UNKNOWN, "different lengths"),
        ({"x": np.ones(0)}, ErrorCode.DATA_EMPTY, "no rows"),
        ({"x": np.array(1)}, ErrorCode.DATA_EMPTY, "no rows"),
        ({}, ErrorCode.DATA_EMPTY, "no rows"),
        ({"x": np.array([1j])}, ErrorCode.DATA_FORMAT_UNKNOWN, "complex128"),
        ({"x": np.array([object()])}, ErrorCode.DATA_FORMAT_UNKNOWN, "pickle"),
    ],
)
def test_npz_that_are_no_tables(
    tmp_path: Path, arrays: dict[str, np.ndarray], code: ErrorCode, part: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    assert part in fails(code, tmp_path / "x.npz")


def test_a_folder_of_images_per_label(tmp_path: Path) -> None:
    for label, count in (("cat", 3), ("dog", 2)):
        (tmp_path / label).mkdir()
        for index in range(count):
            (tmp_path / label / f"{label}{index}.PNG").write_bytes(png(index))
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "README").write_text("not a label")
    (tmp_path / ".hidden").mkdir()
    table = read(tmp_path)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"names": ["cat", "dog"], "_type": "ClassLabel"}
    assert features["image"] == {"_type": "Image"}
    by_name = {row["image"]["path"]: row for row in table.to_pylist()}
    assert {name: row["label"] for name, row in by_name.items()} == {
        "cat0.PNG": 0, "cat1.PNG": 0, "cat2.PNG": 0, "dog0.PNG": 1, "dog1.PNG": 1,
    }  # fmt: skip
    assert by_name["dog1.PNG"]["image"]["bytes"] == png(1)
    assert read(tmp_path).equals(table)  # the same order again: the same content


def test_hugging_face_reads_such_images(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.png").write_bytes(png(7))
    row = datasets.Dataset(read(tmp_path))[0]
    assert row["image"].getpixel((0, 0)) == 7
    assert row["label"] == 0


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, ErrorCode.FILE_UNREADABLE),
        (lambda path: path.write_bytes(b""), ErrorCode.DATA_EMPTY),
        (lambda path: path.write_bytes(b"\x00\x01\x02"), ErrorCode.DATA_FORMAT_UNKNOWN),
        (lambda path: path.write_bytes(b"PAR1 but not really"), ErrorCode.DATA_FORMAT_UNKNOWN),
        (lambda path: path.write_bytes(b"ARROW1\0\0 but not really"), ErrorCode.DATA_FORMAT_UNKNOWN),
        (lambda path: path.write_bytes(b"PK\x03\x04 but not really"), ErrorCode.DATA_FORMAT_UNKNOWN),
        (lambda path: path.write_bytes(b"a,b\n1\n2,3,4\n"), ErrorCode.DATA_FORMAT_UNKNOWN),
        (lambda path: path.mkdir(), ErrorCode.DATA_FORMAT_UNKNOWN),
    ],
    ids=["missing", "empty", "binary", "parquet", "arrow", "zip", "csv", "folder"],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, make: Callable[[Path], object], code: ErrorCode) -> None:
    make(tmp_path / "data")
    fails(code, tmp_path / "data")


def test_other_names_are_no_csv(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    assert "CSV by its name" in fails(ErrorCode.DATA_FORMAT_UNKNOWN, tmp_path / "x.json")


def test_damage_is_told_while_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": np.random.default_rng(1).random(10_000)}), path, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    fails(ErrorCode.DATA_FORMAT_UNKNOWN, path)


def test_rows_are_saved_whole(tmp_path: Path) -> None:
    assert save_parquet(TABLE.schema, TABLE.to_batches(max_chunksize=2), tmp_path / "x.parquet") == 3
    assert pq.read_table(tmp_path / "x.parquet").equals(TABLE)
    with pytest.raises(FlopsError) as caught:
        save_parquet(TABLE.schema, [], tmp_path / "nowhere" / "x.parquet")
    assert caught.value.code is ErrorCode.FILE_UNREADABLE
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
