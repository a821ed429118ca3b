"""Federated training of boosted trees: every round, the learners' new trees join the global ensemble.

A model is XGBoost's own JSON, the bytes of `Booster.save_raw("json")`; nothing here needs XGBoost. A learner
goes on boosting from the global model and gives all of it back: what comes after the trees it was given is
new. New trees are kept as they are, but for their leaves, which are multiplied by the learner's share of the
round's rows: the ensemble moves by the weighted mean of what the learners would have added, however many
learners there are, as weights do with FedAvg (docs/adr/0011-federated-trees.md).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from flops.trainer.grid import ROWS
from flops.wire.training import Array

_LEAF = -1
_OF_NODES = ("left_children", "right_children", "split_indices", "split_conditions", "default_left")
_MODEL_WIDE = ("learner_model_param", "objective")


class TreeBagging(flower.FedAvg):
    """Federated bagging of XGBoost's trees, after Flower's `FedXgbBagging`.

    Flower's takes one tree of each learner, whatever it has grown, and adds it at its full size.
    """

    _model: bytes = b""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[FlowerMessage]:
        """Have everybody go on from the global model, which is kept to tell new trees from old ones."""
        self._model = _text_of(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The global model with the new trees of all replies."""
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        if not valid:
            return None, None
        contents = [message.content for message in valid]
        models = [_text_of(next(iter(content.array_records.values()))) for content in contents]
        rows = [_rows_of(content) for content in contents]
        text = bagged(self._model, models, rows)
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return ArrayRecord([np.frombuffer(text, np.uint8)]), metrics


def problem_with_trees(arrays: Sequence[Array], parameters: Sequence[Array]) -> str | None:
    """Why a learner's model cannot join the global one; None when it can."""
    if len(arrays) != 1 or arrays[0].dtype != np.uint8 or arrays[0].ndim != 1:
        return "it returned other parameters than one array of bytes, XGBoost's model as JSON"
    try:
        _new_trees(_parse(parameters[0].tobytes()), _parse(arrays[0].tobytes()))
    except (TypeError, ValueError) as exc:
        return str(exc)
    return None


def bagged(model: bytes, replies: Sequence[bytes], rows: Sequence[float]) -> bytes:
    """The global model with the new trees of replies, each weighted by its learner's share of the rows.

    Raises:
        ValueError: when a model is none, or does not go on from the global one.
    """
    merged = _parse(model)
    found = [_new_trees(merged, _parse(reply)) for reply in replies]
    for (trees, classes, sizes), weight in zip(found, rows, strict=True):
        ensemble = _ensemble(merged)
        for tree, tree_class in zip(trees, classes, strict=True):
            _weaken(tree, weight / sum(rows))
            tree["id"] = len(ensemble["trees"])
            ensemble["trees"].append(tree)
            ensemble["tree_info"].append(tree_class)
        for size in sizes:
            ensemble["iteration_indptr"].append(ensemble["iteration_indptr"][-1] + size)
        ensemble["gbtree_model_param"]["num_trees"] = str(len(ensemble["trees"]))
    return json.dumps(merged, separators=(",", ":")).encode()


def _text_of(record: ArrayRecord) -> bytes:
    """The one array's bytes, which Flower's records carry as floating point numbers."""
    (array,) = record.to_numpy_ndarrays()
    return bytes(array.astype(np.uint8).tobytes())


def _rows_of(content: RecordDict) -> int:
    metrics: Any = next(iter(content.metric_records.values()))
    return int(metrics[ROWS])


def _parse(text: bytes) -> dict[str, Any]:
    """A model of trees.

    Raises:
        ValueError: saying what it is instead.
    """
    try:
        model: dict[str, Any] = json.loads(text, parse_constant=_refuse_constant)
        booster = str(model["learner"]["gradient_booster"]["name"])
        if booster == "gbtree":
            _check(_ensemble(model), int(model["learner"]["learner_model_param"]["num_feature"]))
    except (KeyError, TypeError, IndexError, RecursionError) as exc:
        raise ValueError("its model is not XGBoost's JSON") from exc
    except ValueError as exc:
        raise ValueError(f"its model is not XGBoost's JSON: {exc}") from exc
    if booster != "gbtree":
        raise ValueError(f"its model has the booster {booster}; only gbtree can be federated")
    return model


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it has the value {name}")


def _ensemble(model: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = model["learner"]["gradient_booster"]["model"]
    return found


def _check(ensemble: dict[str, Any], features: int) -> None:
    """Whether every tree can be walked: a broken one would crash or hang whoever predicts with it."""
    trees, bounds = ensemble["trees"], ensemble["iteration_indptr"]
    if len(trees) != len(ensemble["tree_info"]) or bounds[-1] != len(trees) or bounds != sorted(bounds):
        raise ValueError("the numbers of its trees contradict each other")
    for tree in trees:
        if int(tree["tree_param"]["size_leaf_vector"]) > 1:
            raise ValueError("trees with several outputs (multi_strategy) cannot be federated")
        left, right = tree["left_children"], tree["right_children"]
        if len({len(tree[key]) for key in (*_OF_NODES, "base_weights")}) != 1:
            raise ValueError("a tree's nodes are incomplete")
        if not all(map(math.isfinite, (*tree["split_conditions"], *tree["base_weights"]))):
            raise ValueError("a tree has values that are not finite")
        seen: set[int] = set()
        waiting = [0]
        while waiting:
            node = waiting.pop()
            if node in seen or not 0 <= node < len(left):
                raise ValueError("the nodes of a tree are no tree")
            seen.add(node)
            if left[node] != _LEAF:
                if not 0 <= int(tree["split_indices"][node]) < features:
                    raise ValueError("a tree asks for a feature that is not there")
                waiting += [left[node], right[node]]


def _new_trees(
    model: dict[str, Any], reply: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[int], list[int]]:
    """A reply's trees beyond the global model's, the class each is for, and the sizes of their iterations."""
    for name in _MODEL_WIDE:
        if model["learner"][name] != reply["learner"][name]:
            raise ValueError(
                f"its {name} is {reply['learner'][name]}, the global model's is {model['learner'][name]}; "
                "ModelManager() must set base_score, objective and the number of features and classes"
            )
    before, after = _ensemble(model), _ensemble(reply)
    count, iterations = len(before["trees"]), len(before["iteration_indptr"])
    if after.get("cats") != before.get("cats"):
        raise ValueError("it has categories of its own; columns must be numbers")
    is_continued = after["iteration_indptr"][:iterations] == before["iteration_indptr"]
    if not is_continued or not all(map(_is_same, before["trees"], after["trees"])):
        raise ValueError("it does not go on from the trees it was given (xgb_model of xgboost.train)")
    bounds = after["iteration_indptr"][iterations - 1 :]
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    return after["trees"][count:], after["tree_info"][count:], sizes


def _is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether trees predict the same; XGBoost writes numbers in its own way, and computes in float32."""
    return all(
        np.array_equal(np.asarray(one[key], np.float32), np.asarray(other[key], np.float32))
        for key in _OF_NODES
    )


def _weaken(tree: dict[str, Any], factor: float) -> None:
    for node, left in enumerate(tree["left_children"]):
        if left == _LEAF:
            for values in (tree["split_conditions"], tree["base_weights"]):
                values[node] *= factor
