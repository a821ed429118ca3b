"""Boosted trees of several learners become one ensemble; what does not continue it is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flops.core.sla import Strategy, StrategyName
from flops.errors import ErrorCode, FlopsError
from flops.trainer.grid import FlightGrid
from flops.trainer.links import LearnerServer, Link
from flops.trainer.strategy import RoundStrategy
from flops.trainer.tree_bagging import bagged, problem_with_trees
from flops.wire.training import REPLY, Array, Message, Stream

Model = dict[str, Any]


def stump(low: float, high: float, feature: int = 0) -> Model:
    """A tree with one question, as XGBoost 3.2 writes it."""
    return {
        "base_weights": [0.0, low, high],
        "categories": [],
        "default_left": [0, 0, 0],
        "id": 0,
        "left_children": [1, -1, -1],
        "right_children": [2, -1, -1],
        "split_conditions": [0.5, low, high],
        "split_indices": [feature, 0, 0],
        "tree_param": {"num_deleted": "0", "num_feature": "4", "num_nodes": "3", "size_leaf_vector": "1"},
    }


def model(*iterations: list[Model]) -> Model:
    """A model of four features; of the trees of an iteration each is for one class."""
    trees = [tree for iteration in iterations for tree in iteration]
    sizes = [len(iteration) for iteration in iterations]
    ensemble = {
        "cats": {"enc": []},
        "gbtree_model_param": {"num_parallel_tree": "1", "num_trees": str(len(trees))},
        "iteration_indptr": [sum(sizes[:count]) for count in range(len(sizes) + 1)],
        "tree_info": [number for iteration in iterations for number in range(len(iteration))],
        "trees": [{**copy.deepcopy(tree), "id": number} for number, tree in enumerate(trees)],
    }
    return {
        "learner": {
            "gradient_booster": {"model": ensemble, "name": "gbtree"},
            "learner_model_param": {"base_score": "[5E-1]", "num_class": "0", "num_feature": "4"},
            "objective": {"name": "binary:logistic"},
        },
        "version": [3, 2, 0],
    }


def text(content: Any) -> bytes:
    return json.dumps(content).encode()


def array(content: Any) -> Array:
    return np.frombuffer(text(content), np.uint8)


def ensemble_of(content: bytes) -> Model:
    found: Model = json.loads(content)["learner"]["gradient_booster"]["model"]
    return found


OLD = stump(-1.0, 1.0)


def test_new_trees_of_all_learners_join_weighted_by_rows() -> None:
    first = model([OLD], [stump(-4.0, 4.0)], [stump(-8.0, 8.0)])
    second = model([OLD], [stump(2.0, -2.0, feature=3)])
    found = ensemble_of(bagged(text(model([OLD])), [text(first), text(second)], [30, 10]))
    leaves = [tree["split_conditions"][1:] for tree in found["trees"]]
    assert leaves == [[-1.0, 1.0], [-3.0, 3.0], [-6.0, 6.0], [0.5, -0.5]]
    assert [tree["split_conditions"][0] for tree in found["trees"]] == [0.5] * 4  # questions stay
    assert [tree["split_indices"][0] for tree in found["trees"]] == [0, 0, 0, 3]
    assert [tree["id"] for tree in found["trees"]] == [0, 1, 2, 3]
    assert found["iteration_indptr"] == [0, 1, 2, 3, 4]
    assert found["gbtree_model_param"]["num_trees"] == "4"


def test_trees_stay_with_their_classes() -> None:
    grown = model([stump(1, 2), stump(3, 4), stump(5, 6)])
    found = ensemble_of(bagged(text(model()), [text(grown), text(grown)], [1, 1]))
    assert found["tree_info"] == [0, 1, 2, 0, 1, 2]
    assert found["iteration_indptr"] == [0, 3, 6]


def test_what_was_joined_is_gone_on_from() -> None:
    """XGBoost reads numbers as float32, and writes them in its own way."""
    joined = json.loads(bagged(text(model()), [text(model([stump(0.1, 0.7)]))] * 3, [1, 1, 1]))
    written = copy.deepcopy(joined)
    for tree in written["learner"]["gradient_booster"]["model"]["trees"]:
        tree["split_conditions"] = [float(str(np.float32(value))) for value in tree["split_conditions"]]
    assert written != joined
    assert problem_with_trees([array(written)], [array(joined)]) is None


def changed(change: str) -> Model:
    """A continuation of the global model that has something wrong with it."""
    found = model([OLD], [stump(-1.0, 1.0)])
    learner = found["learner"]
    ensemble = learner["gradient_booster"]["model"]
    new = ensemble["trees"][1]
    changes = {
        "a tree of others": lambda: ensemble["trees"][0]["split_conditions"].__setitem__(1, 9.0),
        "another start": lambda: learner["learner_model_param"].update(base_score="[3E-1]"),
        "another booster": lambda: learner["gradient_booster"].update(name="dart"),
        "categories": lambda: ensemble["cats"].update(enc=[1]),
        "a loop": lambda: new["left_children"].__setitem__(1, 0),
        "a feature too many": lambda: new["split_indices"].__setitem__(0, 4),
        "no number": lambda: new["split_conditions"].__setitem__(1, float("nan")),
        "no finite number": lambda: new["base_weights"].__setitem__(1, float("inf")),
        "half a tree": lambda: new["split_conditions"].pop(),
        "two outputs": lambda: new["tree_param"].update(size_leaf_vector="2"),
        "a tree too few": lambda: ensemble["trees"].pop(),
        "no trees": lambda: ensemble.pop("trees"),
        "a text as child": lambda: new["left_children"].__setitem__(0, "1"),
    }
    changes[change]()
    return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("a tree of others", "does not go on from the trees it was given"),
        ("another start", "base_score"),
        ("another booster", "dart; only gbtree"),
        ("categories", "columns must be numbers"),
        ("a loop", "are no tree"),
        ("a feature too many", "a feature that is not there"),
        ("no number", "NaN"),
        ("no finite number", "Infinity"),
        ("half a tree", "incomplete"),
        ("two outputs", "multi_strategy"),
        ("a tree too few", "contradict"),
        ("no trees", "not XGBoost's JSON"),
        ("a text as child", "not XGBoost's JSON"),
    ],
)
def test_what_cannot_join_is_refused_with_the_reason(change: str, reason: str) -> None:
    problem = problem_with_trees([array(changed(change))], [array(model([OLD]))])
    assert problem is not None
    assert reason in problem


@pytest.mark.parametrize("arrays", [[], [np.zeros(3)], [np.zeros((2, 2), np.uint8)], [array([])], [array(1)]])
def test_what_is_no_model_is_refused(arrays: list[Array]) -> None:
    assert problem_with_trees(arrays, [array(model())])


@pytest.fixture
def grid() -> Iterator[FlightGrid]:
    server = LearnerServer("127.0.0.1", 0, "secret")
    grid = FlightGrid(server)
    grid.show([Link(f"learner-{n}", "node", 0, Stream(None, None)) for n in range(2)])  # type: ignore[arg-type]
    yield grid
    server.stop()


def test_the_strategy_bags_what_learners_answer(grid: FlightGrid) -> None:
    strategy = RoundStrategy(Strategy(name=StrategyName.FED_XGB_BAGGING))
    start = array(model([OLD]))
    strategy.begin([start])
    asked = strategy.configure_train(1, [start], grid)
    grown = array(model([OLD], [stump(-4.0, 4.0)]))
    assert strategy.problem_with([grown], [start]) is None  # although it is longer
    for message, rows in zip(asked, (10, 30), strict=True):
        strategy.take(message, Message(REPLY, {"rows": rows, "metrics": {}}, [grown]))
    (result,) = strategy.aggregate_train(1)
    assert result.dtype == np.uint8
    found = ensemble_of(result.tobytes())
    assert [tree["split_conditions"][2] for tree in found["trees"]] == [1.0, 1.0, 3.0]


def test_no_answer_is_an_error(grid: FlightGrid) -> None:
    strategy = RoundStrategy(Strategy(name=StrategyName.FED_XGB_BAGGING))
    strategy.begin([array(model())])
    strategy.configure_train(1, [array(model())], grid)
    with pytest.raises(FlopsError) as caught:
        strategy.aggregate_train(1)
    assert caught.value.code is ErrorCode.AGGREGATION_FAILED
