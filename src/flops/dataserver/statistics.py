"""Statistics of a tag's columns, by one scan with bounded memory. They never leave the node by themselves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from flops.core.dataset import ColumnStatistics

MOST_VALUES = 50  # above this many different values of a column, they are not counted


def scan(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> dict[str, ColumnStatistics]:
    """Statistics by column name."""
    columns = {field.name: _Column(field.type) for field in schema}
    for batch in batches:
        for name, values in zip(schema.names, batch.columns, strict=True):
            columns[name].add(values)
    return {name: column.result() for name, column in columns.items()}


class _Column:
    def __init__(self, kind: pa.DataType) -> None:
        self._is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        is_countable = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or is_text
        self._counts: Counter[str] | None = Counter() if is_countable else None
        self._nulls = 0
        self._numbers = 0
        self._sum = 0.0
        self._minimum = math.inf
        self._maximum = -math.inf

    def add(self, values: pa.Array) -> None:
        self._nulls += values.null_count
        if self._counts is not None:
            self._counts = _counted(self._counts, values)
        if self._is_number:
            numbers = values.drop_null().cast(pa.float64(), safe=False)
            numbers = numbers.filter(pc.is_finite(numbers))
            if len(numbers):
                bounds = pc.min_max(numbers).as_py()
                self._numbers += len(numbers)
                self._sum += pc.sum(numbers).as_py()
                self._minimum = min(self._minimum, bounds["min"])
                self._maximum = max(self._maximum, bounds["max"])

    def result(self) -> ColumnStatistics:
        counts = dict(sorted(self._counts.items())) if self._counts is not None else None
        if not self._numbers:
            return ColumnStatistics(nulls=self._nulls, counts=counts)
        return ColumnStatistics(
            nulls=self._nulls,
            minimum=self._minimum,
            maximum=self._maximum,
            mean=self._sum / self._numbers,
            counts=counts,
        )


def _counted(counts: Counter[str], values: pa.Array) -> Counter[str] | None:
    """The counts with those of more values; None when there are too many different ones."""
    for pair in pc.value_counts(values.drop_null()).to_pylist():
        counts[str(pair["values"])[:100]] += pair["counts"]
    return counts if len(counts) <= MOST_VALUES else None
