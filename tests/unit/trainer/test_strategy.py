"""Every strategy of the SLA, as Flower computes it, on our grid's messages."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import strategy as flower

from flops.actor import ActorContext, EventLog
from flops.adapters.memory_tracker import MemoryTracker
from flops.core.sla import Strategy, StrategyName, UpdatePrecision
from flops.core.strategies import STRATEGY_PARAMETERS
from flops.errors import ErrorCode, FlopsError
from flops.trainer.aggregator import main
from flops.trainer.grid import FlightGrid
from flops.trainer.half_precision import HALF_UPDATES, changes_between
from flops.trainer.links import LearnerServer, Link
from flops.trainer.strategy import RoundStrategy
from flops.wire.training import REPLY, Array, Message, Stream

NEEDED = {"QFedAvg": {"client_learning_rate": 0.1}}


@pytest.fixture
def grid() -> Iterator[FlightGrid]:
    server = LearnerServer("127.0.0.1", 0, "secret")
    grid = FlightGrid(server)
    grid.show([Link(f"learner-{n}", "node", 0, Stream(None, None)) for n in range(4)])  # type: ignore[arg-type]
    yield grid
    server.stop()


def make(name: str, **parameters: float) -> RoundStrategy:
    return RoundStrategy(Strategy(name=StrategyName(name), parameters={**NEEDED.get(name, {}), **parameters}))


def play_round(
    strategy: RoundStrategy, grid: FlightGrid, number: int, parameters: list[Array], steps: list[float]
) -> list[Array]:
    """Four learners add a step each to every parameter; the first has twice the rows."""
    strategy.begin(parameters)
    messages = strategy.configure_train(number, parameters, grid)
    assert len(messages) == 4
    for index, (message, step) in enumerate(zip(messages, steps, strict=True)):
        arrays = [np.asarray(array + np.asarray(step, array.dtype)) for array in parameters]
        header = {"rows": 20 if index == 0 else 10, "metrics": {"train_loss": 1.0}}
        strategy.take(message, Message(REPLY, header, arrays))
    return strategy.aggregate_train(number)


def parameters() -> list[Array]:
    return [np.zeros((2, 3), np.float32), np.array(1.0), np.array([3], np.int64)]


@pytest.mark.parametrize("name", [n.value for n in StrategyName if n is not StrategyName.FED_XGB_BAGGING])
def test_every_strategy_of_weights_keeps_types_and_shapes(grid: FlightGrid, name: str) -> None:
    strategy = make(name)
    current = parameters()
    for number in (1, 2, 3):
        current = play_round(strategy, grid, number, current, [1.0, 2.0, 3.0, 4.0])
    for array, expected in zip(current, parameters(), strict=True):
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        assert np.isfinite(array).all()
    assert (current[0] > 0).all()


def test_fedavg_weighs_by_rows(grid: FlightGrid) -> None:
    result = play_round(make("FedAvg"), grid, 1, parameters(), [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(result[0], (2 * 1 + 2 + 3 + 4) / 5, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("FedAvg", {}, 1e-6),
        ("FedProx", {"proximal_mu": 0.1}, 1e-6),
        ("FedAvgM", {"server_momentum": 0.9, "server_learning_rate": 0.5}, 1e-6),
        # These divide a step of the mean by its size: roundings of a small step grow by 1 / tau, 1,000.
        ("FedAdagrad", {"eta": 0.5}, 5e-4),
        ("FedAdam", {"eta": 0.5, "beta_1": 0.9, "beta_2": 0.99}, 5e-4),
        ("FedYogi", {"eta": 0.5, "beta_1": 0.9, "beta_2": 0.99}, 5e-4),
    ],
)
def test_what_is_folded_in_agrees_with_flowers_own_code(
    grid: FlightGrid, name: str, options: dict[str, float], tolerance: float
) -> None:
    ours, theirs = make(name, **options), getattr(flower, name)(**options)
    assert ours.is_folding
    generator = np.random.default_rng(0)
    current = [generator.normal(size=(50, 70)).astype(np.float32), generator.normal(size=3)]
    for number in (1, 2, 3):
        ours.begin(current)
        record = ArrayRecord(current)
        messages = list(theirs.configure_train(number, record, ConfigRecord(), grid))
        replies = []
        for message, rows in zip(messages, (7, 160, 31, 1), strict=True):
            arrays = [(array + generator.normal(size=array.shape)).astype(array.dtype) for array in current]
            ours.take(message, Message(REPLY, {"rows": rows, "metrics": {}}, arrays))
            content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": rows})}
            replies.append(FlowerMessage(RecordDict(content), reply_to=message))
        ours.configure_train(number, current, grid)
        current = ours.aggregate_train(number)
        expected = theirs.aggregate_train(number, replies)[0].to_numpy_ndarrays()
        for array, other in zip(current, expected, strict=True):
            np.testing.assert_allclose(array, other, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("name", [n.value for n in StrategyName if n is not StrategyName.FED_XGB_BAGGING])
def test_updates_in_half_precision_lead_to_nearly_the_same(grid: FlightGrid, name: str) -> None:
    asked = Strategy(name=StrategyName(name), parameters=NEEDED.get(name, {}))
    generator = np.random.default_rng(0)
    begin = [generator.normal(size=(20, 5)).astype(np.float32), np.array([3, 4], np.int64)]
    updates = [[begin[0] + generator.normal(size=(20, 5)).astype(np.float32), begin[1] + 1] for _ in range(4)]
    found = []
    for precision in UpdatePrecision:
        strategy = RoundStrategy(asked, precision)
        strategy.begin(begin)
        messages = strategy.configure_train(1, begin, grid)
        for message, update in zip(messages, updates, strict=True):
            config = dict(message.content["config"])
            assert bool(config.get(HALF_UPDATES)) == (precision is UpdatePrecision.HALF)
            arrays = changes_between(begin, update) if config.get(HALF_UPDATES) else update
            assert strategy.problem_with(arrays, begin) is None
            header = {"rows": 10, "metrics": {"train_loss": 1.0}}
            strategy.take(message, Message(REPLY, header, list(arrays)))
        found.append(strategy.aggregate_train(1))
    for full, half in zip(*found, strict=True):
        assert half.dtype == full.dtype
        np.testing.assert_allclose(half, full, atol=2e-3)


def test_fedmedian_is_not_moved_by_an_outlier(grid: FlightGrid) -> None:
    result = play_round(make("FedMedian"), grid, 1, parameters(), [1.0, 1.0, 1.0, 1e6])
    np.testing.assert_allclose(result[0], 1.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("FedAvgM", {"server_momentum": 0.9}), ("FedAdam", {}), ("FedYogi", {}), ("FedAdagrad", {})],
)
def test_a_restored_strategy_goes_on_as_if_nothing_had_happened(
    grid: FlightGrid, name: str, options: dict[str, float]
) -> None:
    undisturbed = make(name, **options)
    current = parameters()
    for number in (1, 2):
        current = play_round(undisturbed, grid, number, current, [1.0, 2.0, 3.0, 4.0])
    restored = make(name, **options)
    restored.restore(undisturbed.state())
    assert undisturbed.state()
    expected = play_round(undisturbed, grid, 3, current, [4.0, 3.0, 2.0, 1.0])
    result = play_round(restored, grid, 3, current, [4.0, 3.0, 2.0, 1.0])
    for array, other in zip(result, expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-6)


def test_parameters_that_explode_are_an_error(grid: FlightGrid) -> None:
    strategy = make("FedAvgM", server_learning_rate=1e30)
    with pytest.raises(FlopsError) as caught, np.errstate(over="ignore"):
        play_round(strategy, grid, 1, parameters(), [1e10] * 4)
    assert caught.value.code is ErrorCode.AGGREGATION_FAILED
    assert "not finite" in caught.value.message


def test_no_reply_is_an_error(grid: FlightGrid) -> None:
    strategy = make("FedAvg")
    strategy.begin(parameters())
    strategy.configure_train(1, parameters(), grid)
    with pytest.raises(FlopsError) as caught:
        strategy.aggregate_train(1)
    assert caught.value.code is ErrorCode.AGGREGATION_FAILED


@pytest.mark.parametrize("name", [name.value for name in StrategyName])
def test_parameters_are_flowers(name: str) -> None:
    """Every parameter that users may give is one of Flower's, and required ones are required there."""
    signature = inspect.signature(getattr(flower, name).__init__).parameters
    for key, parameter in STRATEGY_PARAMETERS[name].items():
        assert key in signature
        assert parameter.is_required == (signature[key].default is inspect.Parameter.empty)
    numeric = {
        key
        for key, parameter in signature.items()
        if isinstance(parameter.default, float | int) and not key.startswith(("fraction_", "min_"))
    }
    assert numeric <= set(STRATEGY_PARAMETERS[name])


def test_a_configuration_with_a_wrong_strategy_is_refused(tmp_path: Path) -> None:
    raw = {
        "project_id": "p1",
        "customer_id": "Admin",
        "flavor": "sklearn",
        "rounds": 1,
        "min_available_clients": 1,
        "min_fit_clients": 1,
        "min_evaluate_clients": 1,
        "learner_token": "secret",
        "tracking_uri": "memory",
        "model_name": "model",
        "strategy": {"name": "FedProx", "parameters": {"mu": 1.0}},
    }
    context = ActorContext("aggregator-p1", "p1", "node", str(tmp_path), config=raw)
    with pytest.raises(FlopsError) as caught:
        main(context, EventLog(tmp_path), lambda _: MemoryTracker(), {})
    assert caught.value.code is ErrorCode.STRATEGY_INVALID
    assert "FedProx has no parameter 'mu'" in caught.value.message
