"""The weighted mean of updates that are folded in one by one: it is as large as one, however many come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from flwr.serverapp import strategy as flower

from flops.trainer.grid import record_of
from flops.wire.training import Array

_PIECE = 2**16  # numbers that are scaled and added at a time, within the processor's cache


class WeightedMean:
    """A mean of lists of arrays of the same shapes.

    Sums of floating point numbers depend on their order: the same updates in the same order give the same
    bits. Each number is within ``(n + 2) * eps`` times the mean of the absolute values of the exact one, with
    the precision of the parameters' own type, of float32 for smaller ones and of float64 for integers.
    """

    def __init__(self) -> None:
        self._sums: list[Array] = []
        self._unit = 0.0  # the first weight: sums stay near the parameters' own size
        self._weight = 0.0

    def add(self, arrays: Sequence[Array], weight: float) -> None:
        """Fold in one list of arrays, which is not kept; the weight is above 0."""
        if not self._weight:
            self._unit = float(weight)
            self._sums = [np.zeros(array.shape, _type_of_sums(array.dtype)) for array in arrays]
        share = weight / self._unit
        for total, array in zip(self._sums, arrays, strict=True):
            _add_scaled(total.reshape(-1), np.asarray(array).reshape(-1), share)
        self._weight += share

    def result(self) -> list[Array] | None:
        """The mean, once: it is computed in place. None when there is nothing to take the mean of."""
        if not self._weight:
            return None
        for total in self._sums:
            total /= self._weight
        return self._sums


class FoldedMean(flower.FedAvg):
    """Flower's FedAvg with the mean folded in before it is asked for.

    Mixed into a strategy of Flower's that goes on from FedAvg's mean, it is where that comes from.
    """

    mean: WeightedMean  # of the round; set anew for each

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of what was folded in; there are no replies."""
        arrays = self.mean.result()
        return (None if arrays is None else record_of(arrays)), None


def _type_of_sums(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64) if dtype.kind in "iub" else np.result_type(dtype, np.float32)


def _add_scaled(total: Array, array: Array, share: float) -> None:
    scaled = np.empty(min(_PIECE, total.size), total.dtype)
    for start in range(0, total.size, _PIECE):
        piece = array[start : start + _PIECE]
        np.multiply(piece, share, out=scaled[: piece.size], dtype=total.dtype)
        total[start : start + _PIECE] += scaled[: piece.size]
