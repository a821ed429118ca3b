"""Flower's strategies, made from a project's SLA, with a state that can be kept over a restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies

from flops.core.sla import Strategy, StrategyName, UpdatePrecision
from flops.errors import ErrorCode, FlopsError
from flops.trainer.grid import ROWS, FlightGrid, arrays_of, record_of, reply_with
from flops.trainer.half_precision import HALF_UPDATES, changed
from flops.trainer.learner import MEASURE_LOSS
from flops.trainer.tree_bagging import TreeBagging, problem_with_trees
from flops.trainer.weighted_mean import FoldedMean, WeightedMean
from flops.wire.training import Array, Message


class _FedAvgM(flower.FedAvgM, FoldedMean): ...


class _FedProx(flower.FedProx, FoldedMean): ...


class _FedAdagrad(flower.FedAdagrad, FoldedMean): ...


class _FedAdam(flower.FedAdam, FoldedMean): ...


class _FedYogi(flower.FedYogi, FoldedMean): ...


_CLASSES: Mapping[StrategyName, type[flower.FedAvg]] = {
    StrategyName.FED_AVG: FoldedMean,
    StrategyName.FED_AVG_M: _FedAvgM,
    StrategyName.FED_PROX: _FedProx,
    StrategyName.FED_ADAGRAD: _FedAdagrad,
    StrategyName.FED_ADAM: _FedAdam,
    StrategyName.FED_YOGI: _FedYogi,
    StrategyName.FED_MEDIAN: flower.FedMedian,
    StrategyName.FED_TRIMMED_AVG: flower.FedTrimmedAvg,
    StrategyName.KRUM: flower.Krum,
    StrategyName.QFED_AVG: flower.QFedAvg,
    StrategyName.FED_XGB_BAGGING: TreeBagging,
}
_FLOWERS = (AggregationError, InconsistentMessageReplies, ArithmeticError, TypeError, ValueError)
_WHOLE = frozenset({"num_malicious_nodes"})
# What strategies remember from round to round; `current_arrays` is set anew from the parameters of the round.
_STATE_LISTS = ("momentum_vector",)
_STATE_MAPPINGS = ("m_t", "v_t")


class RoundStrategy:
    """A Flower strategy, driven hook by hook.

    All joined learners take part in every round; how many are needed is decided by `flops.core.rounds`.

    Args:
        asked: the strategy of the SLA.
        precision: in which updates come.

    Raises:
        FlopsError: ``strategy_invalid``.
    """

    def __init__(self, asked: Strategy, precision: UpdatePrecision = UpdatePrecision.FULL) -> None:
        self._name = asked.name
        parameters: dict[str, Any] = {
            key: int(value) if key in _WHOLE else value for key, value in asked.parameters.items()
        }
        try:
            self._flower = _CLASSES[asked.name](
                min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1, **parameters
            )
        except (TypeError, ValueError) as exc:
            raise FlopsError(
                ErrorCode.STRATEGY_INVALID, f"The strategy {asked.name} cannot be used: {exc}."
            ) from exc
        self._train_config: dict[str, Any] = {}
        if asked.name is StrategyName.QFED_AVG:
            self._train_config[MEASURE_LOSS] = True
        if precision is UpdatePrecision.HALF:
            self._train_config[HALF_UPDATES] = True
        self._parameters: list[Array] = []  # that the round begins with
        self._replies: list[FlowerMessage] = []
        self._find_problem = (
            problem_with_trees if asked.name is StrategyName.FED_XGB_BAGGING else _problem_with_arrays
        )

    @property
    def is_folding(self) -> bool:
        """Whether an update that was taken takes no memory any more."""
        return isinstance(self._flower, FoldedMean)

    def begin(self, parameters: Sequence[Array]) -> None:
        """Begin a round from these parameters."""
        self._parameters = list(parameters)
        self._replies = []
        if isinstance(self._flower, FoldedMean):
            self._flower.mean = WeightedMean()
        if isinstance(self._flower, flower.FedAvgM):
            # It would go on from its own last result, which is not where a new cycle of a cluster begins.
            self._flower.current_arrays = None

    def problem_with(self, arrays: Sequence[Array], parameters: Sequence[Array]) -> str | None:
        """Why what a learner made of the parameters cannot be aggregated; None when it can."""
        return self._find_problem(arrays, parameters)

    def configure_train(
        self, number: int, parameters: Sequence[Array], grid: FlightGrid
    ) -> list[FlowerMessage]:
        """Messages that ask the learners shown by the grid to train from these parameters."""
        config = ConfigRecord(self._train_config)
        return list(self._flower.configure_train(number, record_of(parameters), config, grid))

    def take(self, instruction: FlowerMessage, update: Message) -> None:
        """Take in a learner's update; the result depends on their order."""
        rows, arrays = int(update.header["rows"]), update.arrays
        if HALF_UPDATES in self._train_config:
            arrays = changed(self._parameters, arrays)
        if isinstance(self._flower, FoldedMean):
            self._flower.mean.add(arrays, rows)
            return
        metrics = {key: float(value) for key, value in update.header["metrics"].items() if value is not None}
        self._replies.append(reply_with(instruction, arrays, {ROWS: rows, **metrics}))

    def aggregate_train(self, number: int) -> list[Array]:
        """The new global parameters after all updates, of the types the model's parameters have.

        Raises:
            FlopsError: ``aggregation_failed``.
        """
        try:
            arrays, _ = self._flower.aggregate_train(number, self._replies)
        except _FLOWERS as exc:
            raise self._failed(number, str(exc)) from exc
        finally:
            self._replies = []
        if arrays is None:
            raise self._failed(number, "the strategy gave no parameters")
        raw = arrays_of(arrays)
        with np.errstate(all="ignore"):  # what does not fit becomes infinite, and is looked for here
            result = [_to_dtype(new, old.dtype) for new, old in zip(raw, self._parameters, strict=True)]
        if not all(np.isfinite(array).all() for array in {id(a): a for a in (*raw, *result)}.values()):
            raise self._failed(
                number, "the aggregated parameters are not finite; smaller learning rates may help"
            )
        return result

    def configure_evaluate(
        self, number: int, parameters: Sequence[Array], grid: FlightGrid
    ) -> list[FlowerMessage]:
        """Messages that ask the learners shown by the grid to evaluate these parameters."""
        config = ConfigRecord({})
        return list(self._flower.configure_evaluate(number, record_of(parameters), config, grid))

    def aggregate_evaluate(self, number: int, replies: Sequence[FlowerMessage]) -> dict[str, float]:
        """The global model's numbers, each the mean over the learners weighted by their held-out rows.

        Raises:
            FlopsError: ``aggregation_failed``.
        """
        try:
            metrics: MetricRecord | None = self._flower.aggregate_evaluate(number, replies)
        except _FLOWERS as exc:
            raise self._failed(number, str(exc)) from exc
        return {key: float(value) for key, value in (metrics or {}).items() if isinstance(value, int | float)}

    def state(self) -> dict[str, Array]:
        """What the strategy remembers from round to round, as named arrays."""
        found: dict[str, Array] = {}
        for name in _STATE_LISTS:
            for index, array in enumerate(getattr(self._flower, name, None) or ()):
                found[f"{name}/{index}"] = np.asarray(array)
        for name in _STATE_MAPPINGS:
            for key, array in (getattr(self._flower, name, None) or {}).items():
                found[f"{name}/{key}"] = np.asarray(array)
        return found

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over what `state` gave before a restart."""
        for name in _STATE_LISTS:
            own = {int(key.partition("/")[2]): v for key, v in state.items() if key.startswith(f"{name}/")}
            if own:
                setattr(self._flower, name, [own[index] for index in sorted(own)])
        for name in _STATE_MAPPINGS:
            named = {key.partition("/")[2]: v for key, v in state.items() if key.startswith(f"{name}/")}
            if named:
                setattr(self._flower, name, named)

    def _failed(self, number: int, why: str) -> FlopsError:
        return FlopsError(
            ErrorCode.AGGREGATION_FAILED,
            f"{self._name} failed in round {number}: {why}.",
            details={"round": number},
        )


def _problem_with_arrays(arrays: Sequence[Array], parameters: Sequence[Array]) -> str | None:
    if len(arrays) != len(parameters):
        return f"it returned {len(arrays)} arrays, the model has {len(parameters)}"
    for index, (array, expected) in enumerate(zip(arrays, parameters, strict=True)):
        if array.shape != expected.shape:
            return f"its array {index} has the shape {array.shape}, the model's has {expected.shape}"
        if not np.isfinite(array).all():
            return f"its array {index} has values that are NaN or infinite"
    return None


def _to_dtype(array: Array, dtype: np.dtype[Any]) -> Array:
    """The type the model has: strategies compute in float64 where they multiply by numpy's scalars."""
    if array.dtype == dtype:
        return array
    if dtype.kind in "iu":
        array = np.rint(array)
    return array.astype(dtype)
