"""The mean that is folded in: right, the same every time, and as large as one model."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flops.trainer.weighted_mean import WeightedMean
from flops.wire.training import Array


def mean_of(updates: list[list[Array]], rows: list[int]) -> list[Array]:
    mean = WeightedMean()
    for arrays, weight in zip(updates, rows, strict=True):
        mean.add(arrays, weight)
    found = mean.result()
    assert found is not None
    return found


@given(
    st.integers(1, 30),
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.bool_, np.complex64]),
)
@settings(deadline=None, max_examples=60)
def test_it_is_as_near_to_the_exact_mean_as_it_says(count: int, seed: int, dtype: Any) -> None:
    generator = np.random.default_rng(seed)
    rows = [int(10 ** generator.uniform(0, 6)) for _ in range(count)]
    updates = [[(generator.normal(size=(3, 7)) * 100).astype(dtype)] for _ in range(count)]
    (found,) = mean_of(updates, rows)
    wide = np.complex128 if dtype is np.complex64 else np.longdouble
    weights = np.array(rows, np.longdouble) / sum(rows)
    stacked = np.stack([arrays[0] for arrays in updates]).astype(wide)
    exact = np.tensordot(weights, stacked, 1)
    size = np.tensordot(weights, abs(stacked), 1)
    epsilon = float(np.finfo(found.dtype).eps)
    assert found.dtype in (np.float32, np.float64, np.complex64)
    assert (abs(found - exact) <= (count + 2) * epsilon * size + 1e-30).all()


def test_the_same_order_gives_the_same_bits() -> None:
    generator = np.random.default_rng(1)
    updates = [[generator.normal(size=200_000).astype(np.float32)] for _ in range(5)]
    rows = [3, 1000, 17, 29, 5]
    assert mean_of(updates, rows)[0].tobytes() == mean_of(updates, rows)[0].tobytes()
    assert mean_of(updates[::-1], rows[::-1])[0].tobytes() != mean_of(updates, rows)[0].tobytes()


def test_shapes_stay_and_updates_are_left_alone() -> None:
    update = [np.array(2.0), np.empty((0, 3)), np.arange(6, dtype=np.float32).reshape(2, 3).T]
    before = [array.copy() for array in update]
    found = mean_of([update, update], [1, 3])
    for array, same, given_before in zip(found, update, before, strict=True):
        assert array.shape == same.shape
        np.testing.assert_array_equal(array, same)
        np.testing.assert_array_equal(same, given_before)


@pytest.mark.parametrize("value", [3e38, -3e38, 1e-38])
def test_many_rows_do_not_push_numbers_out_of_range(value: float) -> None:
    (found,) = mean_of([[np.full(3, value, np.float32)]], [10**9])
    np.testing.assert_array_equal(found, np.full(3, value, np.float32))


def test_nothing_has_no_mean() -> None:
    assert WeightedMean().result() is None


def test_memory_does_not_grow_with_the_number_of_updates() -> None:
    size = 1_000_000
    peaks = []
    for count in (2, 40):
        mean = WeightedMean()
        tracemalloc.start()
        for number in range(count):
            mean.add([np.full(size, number, np.float32)], 10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert mean.result() is not None
    assert peaks[1] < peaks[0] + 100_000
    assert peaks[1] < 3.2 * 4 * size  # the sums, and the old and the new update while one replaces the other
