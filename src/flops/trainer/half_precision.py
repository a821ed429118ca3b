"""Updates of half the size: what a learner has changed, in half precision.

Differences, since half precision has eleven bits: of a parameter they would be its size's, of a change they
are the change's, and what training adds up keeps the precision of the parameters.

This module is part of the actor kit: it imports the standard library and numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

HALF_UPDATES = "half-updates"  # config key: answer with changes in half precision


def changes_between(begin: Sequence[Array], end: Sequence[Array]) -> list[Array]:
    """What has to be added to the first parameters to get the second ones, in half precision.

    Arrays that are no larger floating point numbers, or have other shapes than before, stay as they are.
    A change beyond 65,504 becomes infinite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return [
            (new - old).astype(np.float16) if _has_change(old, new) else new
            for old, new in zip_longest(begin[: len(end)], end)
        ]


def changed(begin: Sequence[Array], changes: Sequence[Array]) -> list[Array]:
    """The parameters that `changes_between` was told the end of, as far as half precision has them."""
    return [
        old + change.astype(old.dtype) if change.dtype == np.float16 and _has_change(old, change) else change
        for old, change in zip(begin, changes, strict=True)
    ]


def _has_change(old: Array | None, new: Array) -> bool:
    if old is None or old.shape != new.shape:
        return False
    return old.dtype.kind == new.dtype.kind == "f" and old.dtype.itemsize > np.dtype(np.float16).itemsize
