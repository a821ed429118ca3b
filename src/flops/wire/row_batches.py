"""Which rows a reader gets, and in batches of which size.

This module is part of the actor kit: it imports the standard library, numpy and pyarrow only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

_SMALL_BYTES = 1_048_576
_MANY_ROWS = 65_536


def rows_of_part(batch: pa.RecordBatch, first_row: int, part: int, parts: int) -> pa.RecordBatch:
    """Every `parts`-th row, so that each part has as many rows of each label as the others.

    Args:
        batch: rows that follow each other.
        first_row: number of its first row.
        part: row r belongs to part ``r % parts``.
        parts: how many parts there are.
    """
    if parts == 1:
        return batch
    return batch.take(pa.array(np.arange((part - first_row) % parts, batch.num_rows, parts)))


def merge_small(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Merge small batches into larger ones: thousands of little uploads are read as fast as a large one."""
    pending: list[pa.RecordBatch] = []
    rows = size_bytes = 0
    for batch in batches:
        if batch.num_rows == 0:
            continue
        pending.append(batch)
        rows += batch.num_rows
        size_bytes += batch.nbytes
        if rows >= _MANY_ROWS or size_bytes >= _SMALL_BYTES:
            yield _merged(pending)
            pending, rows, size_bytes = [], 0, 0
    if pending:
        yield _merged(pending)


def _merged(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)
