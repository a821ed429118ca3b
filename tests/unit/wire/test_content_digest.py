"""Two uploads are the same when their rows are, however they were cut and encoded."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest

from flops.wire.content_digest import ContentDigest

COLUMNS = {
    "int": pa.array([1, None, 3]),
    "float16": pa.array(np.arange(3, dtype=np.float16)),
    "bool": pa.array([True, None, False]),
    "text": pa.array(["x", None, "yy"]),
    "large_text": pa.array(["x", "", "yy"], pa.large_string()),
    "bytes": pa.array([b"x", None, b""]),
    "text_view": pa.array(["x" * 20, None, "b"], pa.string_view()),
    "fixed": pa.array([b"abcd", None, b"efgh"], pa.binary(4)),
    "list": pa.array([[1, 2], None, []]),
    "fixed_list": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)),
    "struct": pa.array([{"x": 1, "y": "q"}, None, {"x": None, "y": "zz"}]),
    "map": pa.array([[("k", 1)], None, [("z", 2), ("y", None)]], pa.map_(pa.string(), pa.int64())),
    "null": pa.nulls(3),
    "dictionary": pa.array(["p", "q", None]).dictionary_encode(),
    "time": pa.array([datetime.datetime(2020, 1, 1), None, datetime.datetime(2021, 1, 1)]),  # noqa: DTZ001
    "decimal": pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("2.5")]),
}


def digest_of(table: pa.Table, rows: int) -> str:
    digest = ContentDigest(table.schema)
    for batch in table.to_batches(max_chunksize=rows):
        digest.update(batch)
    return digest.hexdigest()


@pytest.mark.parametrize("name", COLUMNS)
def test_cutting_makes_no_difference(name: str) -> None:
    table = pa.concat_tables([pa.table({name: COLUMNS[name]})] * 5).combine_chunks()
    assert len({digest_of(table, rows) for rows in (1, 2, 7, 15)}) == 1


@pytest.mark.parametrize("name", [name for name in COLUMNS if name not in {"null", "text_view"}])
def test_rows_make_a_difference(name: str) -> None:
    table = pa.table({name: COLUMNS[name]})
    others = [table.slice(1), table.take([2, 1, 0]), table.take([0, 1, 1]), table.rename_columns(["other"])]
    digests = {digest_of(each, 2) for each in [table, *others]}
    assert len(digests) == 1 + len(others)


def test_where_items_are_divided_makes_a_difference() -> None:
    tables = [pa.table({"a": rows}) for rows in ([[1], [2, 3]], [[1, 2], [3]], [[1, 2, 3], []])]
    texts = [pa.table({"a": rows}) for rows in (["ab", "c"], ["a", "bc"], ["abc", ""], [None, "abc"])]
    assert len({digest_of(table, 9) for table in tables + texts}) == 7


def test_metadata_and_what_null_slots_hold_make_none() -> None:
    values, valid = pa.py_buffer(np.array([1, 7], np.int64)), pa.py_buffer(b"\x01")
    other = pa.Array.from_buffers(pa.int64(), 2, [valid, values])
    described = pa.table({"a": pa.array([1, None])}).replace_schema_metadata({"k": "v"})
    assert digest_of(described, 9) == digest_of(pa.table({"a": other}), 9)


def test_data_that_was_stored_by_earlier_versions_is_known_again() -> None:
    """The digest is in the names of stored files: with another one, the same data would be stored twice."""
    whole = pa.table(COLUMNS)
    assert digest_of(whole, 3) == "d8f6158bcaba24d859118519d85772154e11e80e77a8fc6985880b43f13165bc"
    assert (
        digest_of(whole.slice(0, 1), 3) == "30bd7d7edc27607e745a246f348bade17ee2dc9f94626179730fac3009d33ff6"
    )
