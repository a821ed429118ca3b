"""Changes in half precision: how near they come, and what is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flops.trainer.half_precision import changed, changes_between


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float32, np.float64]),
    st.floats(1e-7, 1e3),
    st.floats(1e-3, 1e3),
)
@settings(deadline=None)
def test_what_comes_back_is_as_near_as_half_precision_has_the_change(
    seed: int, dtype: Any, step: float, size: float
) -> None:
    generator = np.random.default_rng(seed)
    begin = (generator.normal(size=(20, 3)) * size).astype(dtype)
    end = (begin + generator.normal(size=begin.shape) * step).astype(dtype)
    (change,) = changes_between([begin], [end])
    assert change.dtype == np.float16
    (found,) = changed([begin], [change])
    assert found.dtype == dtype
    own = np.spacing(np.maximum(abs(begin), abs(end)))  # roundings of the parameters' own type
    assert (abs(found - end) <= 2.0**-11 * abs(end - begin) + 2.0**-25 + 2 * own).all()


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (np.zeros(3, np.int64), np.array([1, 2, 3])),
        (np.zeros(3, np.uint8), np.ones(5, np.uint8)),
        (np.zeros(3, np.float16), np.ones(3, np.float16)),
        (np.zeros(3, np.float32), np.ones(4, np.float32)),
        (np.zeros(3, np.complex64), np.ones(3, np.complex64)),
        (np.zeros(3, np.float32), np.ones(3, np.int64)),
    ],
)
def test_what_has_no_smaller_change_stays(begin: Any, end: Any) -> None:
    (change,) = changes_between([begin], [end])
    assert change is end
    (found,) = changed([begin], [change])
    assert found is end


def test_other_numbers_of_arrays_stay_so() -> None:
    one, two = [np.zeros(3)], [np.ones(3), np.ones(2)]
    assert [change.dtype for change in changes_between(one, two)] == [np.float16, np.float64]
    assert [change.dtype for change in changes_between(two, one)] == [np.float16]


def test_a_change_that_is_too_large_is_infinite() -> None:
    (change,) = changes_between([np.zeros(2)], [np.array([1e5, -1e5])])
    assert np.isinf(change).all()
