"""When uploads fit together under one tag."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from flops.errors import ErrorCode, FlopsError
from flops.wire.tag_schema import check_fit, columns_of, conform, differences, metadata_of, storable_schema


def schema_with(features: dict[str, object] | None) -> pa.Schema:
    metadata = None if features is None else {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([("label", pa.int64())], metadata=metadata)


def test_encodings_are_taken_off_and_metadata_kept() -> None:
    schema = pa.schema(
        [
            pa.field("d", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            pa.field("r", pa.run_end_encoded(pa.int32(), pa.int64())),
            pa.field("v", pa.string_view(), metadata={"k": "v"}),
            pa.field("l", pa.large_string()),
        ],
        metadata={"huggingface": "{}"},
    )
    stored = storable_schema(schema, "t")
    assert stored.types == [pa.string(), pa.int64(), pa.string(), pa.large_string()]
    assert stored.metadata == schema.metadata
    assert stored.field("v").metadata == {b"k": b"v"}
    assert all(field.nullable for field in stored)


@pytest.mark.parametrize(
    "schema",
    [
        pa.schema([]),
        pa.schema([("a", pa.int64()), ("a", pa.int64())]),
        pa.schema([("u", pa.sparse_union([pa.field("x", pa.int64())]))]),
    ],
    ids=["no column", "twice", "union"],
)
def test_what_no_tag_can_have_is_refused(schema: pa.Schema) -> None:
    with pytest.raises(FlopsError) as caught:
        storable_schema(schema, "the-upload")
    assert caught.value.code is ErrorCode.SCHEMA_MISMATCH
    assert "the-upload" in caught.value.message


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (pa.string(), pa.large_string()),
        (pa.binary(), pa.large_binary()),
        (
            pa.list_(pa.field("item", pa.int64())),
            pa.large_list(pa.field("element", pa.int64(), nullable=False)),
        ),
        (pa.struct([("x", pa.string())]), pa.struct([pa.field("x", pa.large_string(), nullable=False)])),
        (pa.string(), pa.dictionary(pa.int32(), pa.large_string())),
    ],
)
def test_carriers_of_the_same_values_fit(expected: pa.DataType, found: pa.DataType) -> None:
    assert differences(pa.schema([("a", expected)]), pa.schema([("a", found)])) == []


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (pa.int64(), pa.int32()),
        (pa.int64(), pa.float64()),
        (pa.string(), pa.binary()),
        (pa.binary(4), pa.binary(5)),
        (pa.list_(pa.int64()), pa.list_(pa.int64(), 2)),
        (pa.struct([("x", pa.string())]), pa.struct([("y", pa.string())])),
        (pa.timestamp("s"), pa.timestamp("ms")),
    ],
)
def test_other_values_do_not_fit(expected: pa.DataType, found: pa.DataType) -> None:
    with pytest.raises(FlopsError) as caught:
        check_fit("t", pa.schema([("a", expected)]), pa.schema([("a", found)]))
    assert f"'a' is {found} instead of {expected}" in caught.value.message
    assert len(caught.value.details["differences"]) == 1


def test_labels_must_mean_the_same() -> None:
    cats = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    dogs = {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}
    (problem,) = differences(schema_with(cats), schema_with(dogs))
    assert '["dog", "cat"]' in problem
    for other in (None, {}, {"label": cats["label"]}):
        assert differences(schema_with(cats), schema_with(other)) == []


def test_conforming_reorders_and_casts() -> None:
    schema = pa.schema([("n", pa.int64()), ("s", pa.string())], metadata={"k": "v"})
    batch = pa.record_batch({"s": pa.array(["x"], pa.large_string()), "n": pa.array([1])})
    conformed = conform(batch, schema)
    assert conformed.schema.equals(schema, check_metadata=True)
    assert conformed.to_pydict() == {"n": [1], "s": ["x"]}
    assert conform(conformed, schema) is conformed


def test_columns_and_metadata_are_told_as_text() -> None:
    schema = pa.schema([("n", pa.int64())], metadata={"huggingface": '{"info": 1}', "note": "plain"})
    assert columns_of(schema) == {"n": "int64"}
    assert metadata_of(schema) == {"huggingface": {"info": 1}, "note": "plain"}
    assert metadata_of(pa.schema([])) == {}
