"""Which rows of a data set each of its partitions has, by the partitioners of Flower Datasets.

Providers on several nodes load the same data set and use the same seed: they agree on every row.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    ShardPartitioner,
)
from numpy.typing import NDArray

from flops.core.sla import Partitioner, PartitionerName
from flops.errors import ErrorCode, FlopsError

_DEFAULT_COLUMN = "label"
_ROW = "row"
_KEY = "key"
_BATCH_BYTES = 4 * 1_048_576


def partition_rows(
    table: pa.Table, partitioner: Partitioner, partitions: int, seed: int
) -> list[NDArray[np.int64]]:
    """Numbers of the rows of each partition.

    Args:
        table: the data set.
        partitioner: how to split it.
        partitions: how many there are to be.
        seed: decides what is left to chance.

    Raises:
        FlopsError: ``partitioning_invalid``.
    """
    if partitions > table.num_rows:
        raise _invalid(f"{table.num_rows} rows cannot be split into {partitions} partitions")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about draws that are repeated
            if partitioner.name is PartitionerName.NATURAL:
                return _by_groups(table, partitioner, partitions)
            return _by_partitioner(table, partitioner, partitions, seed)
    except (ValueError, TypeError, pa.ArrowException) as exc:
        raise _invalid(str(exc).rstrip(".")) from exc


def take_rows(table: pa.Table, rows: NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
    """The rows with these numbers, in batches of a few MB."""
    step = int(max(1, table.num_rows * _BATCH_BYTES // max(1, table.nbytes)))
    for start in range(0, len(rows), step):
        yield from table.take(pa.array(rows[start : start + step])).combine_chunks().to_batches()


def _by_partitioner(
    table: pa.Table, partitioner: Partitioner, partitions: int, seed: int
) -> list[NDArray[np.int64]]:
    made: IidPartitioner | DirichletPartitioner | ShardPartitioner
    match partitioner.name:
        case PartitionerName.DIRICHLET:
            made = DirichletPartitioner(
                num_partitions=partitions,
                partition_by=_KEY,
                alpha=partitioner.alpha,
                min_partition_size=1,
                seed=seed,
            )
        case PartitionerName.SHARD:
            shards = partitions * partitioner.shards_per_partition
            if shards > table.num_rows:
                raise _invalid(f"{table.num_rows} rows cannot be cut into {shards} shards")
            made = ShardPartitioner(
                num_partitions=partitions,
                partition_by=_KEY,
                num_shards_per_partition=partitioner.shards_per_partition,
                seed=seed,
            )
        case _:
            made = IidPartitioner(num_partitions=partitions)
    numbered = {_ROW: np.arange(table.num_rows)}
    if partitioner.name is not PartitionerName.IID:
        numbered[_KEY] = table[_column_of(table, partitioner)]
    dataset = datasets.Dataset(pa.table(numbered))
    # The IID partitioner cuts the rows as they lie; the others draw by themselves.
    made.dataset = dataset.shuffle(seed=seed) if partitioner.name is PartitionerName.IID else dataset
    return [np.asarray(made.load_partition(index)[_ROW], dtype=np.int64) for index in range(partitions)]


def _by_groups(table: pa.Table, partitioner: Partitioner, partitions: int) -> list[NDArray[np.int64]]:
    """The natural groups in turn: with more groups than partitions, some of these have several."""
    if partitioner.column is None:
        raise _invalid(f"the partitioner natural needs a column; there are {', '.join(table.column_names)}")
    column = _column_of(table, partitioner)
    numbered = {_ROW: np.arange(table.num_rows), _KEY: table[column]}
    made = NaturalIdPartitioner(partition_by=_KEY)
    made.dataset = datasets.Dataset(pa.table(numbered))
    groups = made.num_partitions
    if groups < partitions:
        raise _invalid(f"the column {column} has {groups} groups, too few for {partitions} partitions")
    rows = [np.asarray(made.load_partition(index)[_ROW], dtype=np.int64) for index in range(groups)]
    return [np.concatenate(rows[index::partitions]) for index in range(partitions)]


def _column_of(table: pa.Table, partitioner: Partitioner) -> str:
    column = partitioner.column or _DEFAULT_COLUMN
    if column not in table.column_names:
        raise _invalid(
            f"the partitioner {partitioner.name.value} needs the column {column!r}; there are "
            f"{', '.join(table.column_names)}"
        )
    if pa.types.is_nested(table[column].type) or pc.any(pc.is_null(table[column])).as_py():
        raise _invalid(f"the column {column!r} has nested or missing values")
    return column


def _invalid(reason: str) -> FlopsError:
    return FlopsError(ErrorCode.PARTITIONING_INVALID, f"The data set cannot be partitioned: {reason}.")
