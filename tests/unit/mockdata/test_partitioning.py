"""Partitions are disjoint, complete, and the same on every node."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from flops.core.sla import Partitioner, PartitionerName
from flops.errors import ErrorCode, FlopsError
from flops.mockdata.partitioning import partition_rows, take_rows

ROWS = 600
TABLE = pa.table(
    {
        "value": np.arange(ROWS),
        "label": np.repeat(np.arange(6), ROWS // 6),
        "who": [f"person {n % 9}" for n in range(ROWS)],
    }
)


@pytest.mark.parametrize("name", list(PartitionerName))
@pytest.mark.parametrize("partitions", [1, 3])
def test_partitions_share_nothing_and_miss_nothing(name: PartitionerName, partitions: int) -> None:
    partitioner = Partitioner(name=name, column="label")
    rows = partition_rows(TABLE, partitioner, partitions, seed=7)
    assert len(rows) == partitions
    assert sorted(np.concatenate(rows)) == list(range(ROWS))
    again = partition_rows(TABLE, partitioner, partitions, seed=7)
    assert all(np.array_equal(one, other) for one, other in zip(rows, again, strict=True))


@pytest.mark.parametrize("name", [PartitionerName.IID, PartitionerName.DIRICHLET, PartitionerName.SHARD])
def test_the_seed_decides(name: PartitionerName) -> None:
    first, second = (partition_rows(TABLE, Partitioner(name=name), 3, seed=seed)[0] for seed in (1, 2))
    assert not np.array_equal(first, second)


def _labels(rows: np.ndarray) -> np.ndarray:
    return np.bincount(TABLE["label"].to_numpy()[rows], minlength=6)


def test_iid_partitions_have_all_labels_alike() -> None:
    for rows in partition_rows(TABLE, Partitioner(), 3, seed=42):
        assert len(rows) == ROWS // 3
        assert _labels(rows).min() > 15


def test_dirichlet_is_the_more_uneven_the_smaller_alpha_is() -> None:
    def unevenness(alpha: float) -> float:
        partitioner = Partitioner(name=PartitionerName.DIRICHLET, alpha=alpha)
        return float(np.mean([_labels(rows).std() for rows in partition_rows(TABLE, partitioner, 3, seed=1)]))

    assert unevenness(0.1) > 2 * unevenness(100)


def test_shards_give_few_labels_to_each() -> None:
    partitioner = Partitioner(name=PartitionerName.SHARD, shards_per_partition=2)
    for rows in partition_rows(TABLE, partitioner, 3, seed=42):
        assert np.count_nonzero(_labels(rows)) <= 3


def test_natural_groups_stay_together() -> None:
    partitioner = Partitioner(name=PartitionerName.NATURAL, column="who")
    groups = [set(TABLE["who"].take(rows).to_pylist()) for rows in partition_rows(TABLE, partitioner, 4, 0)]
    assert sorted(len(group) for group in groups) == [2, 2, 2, 3]
    assert len(set.union(*groups)) == 9


@pytest.mark.parametrize(
    ("partitioner", "partitions", "part"),
    [
        (Partitioner(), ROWS + 1, "600 rows"),
        (Partitioner(name=PartitionerName.NATURAL), 2, "needs a column"),
        (Partitioner(name=PartitionerName.NATURAL, column="who"), 10, "9 groups"),
        (
            Partitioner(name=PartitionerName.DIRICHLET, column="nope"),
            2,
            "'nope'; there are value, label, who",
        ),
        (Partitioner(name=PartitionerName.SHARD, shards_per_partition=700), 2, "1400 shards"),
        (Partitioner(name=PartitionerName.DIRICHLET, alpha=0.0001), 300, "attempts"),
    ],
)
def test_what_cannot_be_is_told(partitioner: Partitioner, partitions: int, part: str) -> None:
    with pytest.raises(FlopsError) as caught:
        partition_rows(TABLE, partitioner, partitions, seed=1)
    assert caught.value.code is ErrorCode.PARTITIONING_INVALID
    assert part in caught.value.message


@pytest.mark.parametrize("values", [[1, None, 2], [[1], [2], [3]]], ids=["missing", "nested"])
def test_a_column_must_have_plain_values(values: list[object]) -> None:
    with pytest.raises(FlopsError) as caught:
        partition_rows(pa.table({"label": values}), Partitioner(name=PartitionerName.SHARD), 1, seed=1)
    assert caught.value.code is ErrorCode.PARTITIONING_INVALID


def test_taken_rows_come_in_order_and_in_batches() -> None:
    table = pa.table({"x": [bytes([n]) * 1_000_000 for n in range(20)]})
    batches = list(take_rows(table, np.array([7, 3, 19, 0, 5, 6])))
    assert len(batches) > 1
    assert [value[0] for batch in batches for value in batch["x"].to_pylist()] == [7, 3, 19, 0, 5, 6]
