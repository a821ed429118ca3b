"""When uploads fit together under one tag: the same columns with the same kind of values.

The first upload decides the schema of its tag, with its metadata. Others may differ in what carries no
meaning: the order of columns, nullability, 32- or 64-bit offsets, dictionary encoding.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow as pa

from flops.errors import ErrorCode, FlopsError


def storable_schema(schema: pa.Schema, name: str) -> pa.Schema:
    """The schema as it is stored: values plain instead of encoded, all columns nullable, metadata kept.

    Args:
        schema: what an upload announces.
        name: the upload, for the error.

    Raises:
        FlopsError: ``schema_mismatch`` when no tag can have such columns.
    """
    if not schema.names:
        raise FlopsError(ErrorCode.SCHEMA_MISMATCH, f"The upload {name} has no column.")
    twice = [column for column, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise FlopsError(
            ErrorCode.SCHEMA_MISMATCH,
            f"The upload {name} has more than one column called {twice[0]!r}.",
            hint="Give every column its own name.",
        )
    for field in schema:
        if pa.types.is_union(field.type):
            raise FlopsError(
                ErrorCode.SCHEMA_MISMATCH,
                f"Column {field.name!r} of the upload {name} is a union, which Parquet cannot store.",
                hint="Use one type per column.",
            )
    fields = [pa.field(f.name, _decoded(f.type), metadata=f.metadata) for f in schema]
    return pa.schema(fields, metadata=schema.metadata)


def differences(expected: pa.Schema, found: pa.Schema) -> list[str]:
    """Why data with the schema `found` do not fit to those with `expected`, column by column."""
    problems: list[str] = []
    if expected.equals(found, check_metadata=True):  # as nearly always
        return problems
    for field in expected:
        index = found.get_field_index(field.name)
        if index < 0:
            problems.append(f"column {field.name!r} ({field.type}) is missing")
        elif _essence(found.field(index).type) != _essence(field.type):
            problems.append(f"column {field.name!r} is {found.field(index).type} instead of {field.type}")
    known = set(expected.names)
    problems += [f"column {f.name!r} ({f.type}) is not in the tag" for f in found if f.name not in known]
    if not problems:
        problems = _feature_differences(_features(expected), _features(found))
    return problems


def check_fit(tag: str, expected: pa.Schema, found: pa.Schema) -> None:
    """Refuse data that do not fit.

    Raises:
        FlopsError: ``schema_mismatch``, with every difference.
    """
    problems = differences(expected, found)
    if problems:
        raise FlopsError(
            ErrorCode.SCHEMA_MISMATCH,
            f"The data do not fit to tag {tag}: {'; '.join(problems[:20])}.",
            details={"tag": tag, "differences": problems[:100]},
        )


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with the columns of a schema that it fits to."""
    if batch.schema.equals(schema, check_metadata=False):
        return batch
    columns = []
    for field in schema:
        column = batch.column(batch.schema.get_field_index(field.name))
        columns.append(column if column.type.equals(field.type) else _cast(column, field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def columns_of(schema: pa.Schema) -> dict[str, str]:
    """Column names with their types as text."""
    return {field.name: str(field.type) for field in schema}


def metadata_of(schema: pa.Schema) -> dict[str, Any]:
    """The schema's metadata as JSON, where it is JSON, and as text elsewhere."""
    found: dict[str, Any] = {}
    for key, value in (schema.metadata or {}).items():
        text = value.decode(errors="replace")
        try:
            found[key.decode(errors="replace")] = json.loads(text)
        except ValueError:
            found[key.decode(errors="replace")] = text
    return found


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    decoded = _decoded(column.type)
    return (column if column.type.equals(decoded) else column.cast(decoded)).cast(kind)


def _decoded(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _decoded(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def _essence(kind: pa.DataType) -> str:
    """The type without what carries no meaning."""
    kind = _decoded(kind)
    if isinstance(kind, pa.BaseExtensionType):
        return f"{kind.extension_name}<{_essence(kind.storage_type)}>"
    if pa.types.is_large_string(kind):
        return "string"
    if pa.types.is_large_binary(kind):
        return "binary"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {_essence(field.type)}' for field in kind)}>"
    if pa.types.is_fixed_size_list(kind):
        return f"list<{_essence(kind.value_type)}>[{kind.list_size}]"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list<{_essence(kind.value_type)}>"
    return str(kind)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The Hugging Face features of a schema; empty when it has none."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        features = json.loads(raw)["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _feature_differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    # Class names matter most: label 3 must not be a cat in one upload and a dog in the next.
    return [
        f"column {column!r} means {json.dumps(found[column])[:200]} instead of {json.dumps(feature)[:200]}"
        for column, feature in expected.items()
        if column in found and found[column] != feature
    ]
