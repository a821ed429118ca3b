"""Our grid is one of Flower's, and what is private in Flower is still as we use it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from flops.errors import ErrorCode, FlopsError
from flops.testing.played_learner import PlayedLearner
from flops.trainer.grid import FlightGrid, arrays_of, node_id_of, record_of
from flops.trainer.links import LearnerServer
from flops.wire.training import EVALUATE, REPLY, TRAIN, Message


@pytest.fixture
def server() -> Iterator[LearnerServer]:
    server = LearnerServer("127.0.0.1", 0, "secret")
    yield server
    server.stop()


@pytest.fixture
def learners(server: LearnerServer) -> Iterator[list[PlayedLearner]]:
    learners = [PlayedLearner(server.port, f"learner-{n}") for n in range(2)]
    assert server.wait_until(lambda: len(server.joined()) == 2, 10)
    yield learners
    for learner in learners:
        learner.close()


def message(learner: str, kind: str = MessageType.TRAIN) -> FlowerMessage:
    record = RecordDict(
        {"arrays": ArrayRecord([np.ones(2, np.float32)]), "config": ConfigRecord({"server-round": 4})}
    )
    return FlowerMessage(record, node_id_of(learner), kind)


def test_flowers_own_loop_runs_on_it(server: LearnerServer, learners: list[PlayedLearner]) -> None:
    grid = FlightGrid(server)
    grid.show(server.joined())
    result = FedAvg().start(grid, ArrayRecord([np.arange(3.0)]), num_rounds=2, timeout=10)
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], np.arange(3.0))
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == 0.75
    for learner in learners:
        assert [m.type for m in learner.instructions] == [TRAIN, EVALUATE] * 2
        assert [m.header["round"] for m in learner.instructions] == [1, 1, 2, 2]


def test_messages_can_be_pushed_and_pulled(server: LearnerServer, learners: list[PlayedLearner]) -> None:
    grid = FlightGrid(server)
    grid.show(server.joined())
    ids = list(grid.push_messages([message("learner-0"), message("learner-1", MessageType.EVALUATE)]))
    replies = list(grid.pull_messages(ids))
    assert [reply.metadata.src_node_id for reply in replies] == [
        node_id_of("learner-0"),
        node_id_of("learner-1"),
    ]
    assert all(reply.has_content() for reply in replies)


def test_an_error_of_a_learner_is_an_error_of_flower(server: LearnerServer) -> None:
    error = FlopsError(ErrorCode.USER_CODE_FAILED, "It broke.").to_dict()
    learner = PlayedLearner(server.port, "bad", respond=lambda _: Message(REPLY, {"error": error}))
    assert server.wait_until(lambda: bool(server.joined()), 10)
    grid = FlightGrid(server)
    grid.show(server.joined())
    (reply,) = grid.send_and_receive([message("bad")], timeout=10)
    learner.close()
    assert reply.error.reason == "It broke."
    (gone,) = grid.send_and_receive([message("bad")], timeout=0.1)
    assert gone.has_error()


def test_the_private_parts_of_flower_are_as_we_use_them(server: LearnerServer) -> None:
    grid = FlightGrid(server)
    assert (TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id) == (1, 1, 1)
    made = grid.create_message(RecordDict(), MessageType.TRAIN, 5, "group")
    assert made.metadata.dst_node_id == 5
    assert made.metadata.message_id == ""
    assert "_message_id" in made.metadata.__dict__
    made.metadata.__dict__["_message_id"] = "abc"
    assert made.metadata.message_id == "abc"
    assert FlowerMessage(RecordDict(), reply_to=made).metadata.reply_to_message_id == "abc"
    grid.set_run(grid.run)
    assert grid.run.run_id == 1


def test_ids_are_stable_and_differ() -> None:
    ids = {node_id_of(f"learner-{n}") for n in range(1000)}
    assert len(ids) == 1000
    assert all(0 < number < 2**63 for number in ids)


def test_a_held_array_is_to_flower_what_its_own_are() -> None:
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(2.5), np.array([1, 2], np.int64)]
    record = record_of(arrays)
    assert all(a is b for a, b in zip(arrays_of(record), arrays, strict=True))
    for held, array in zip(record.values(), arrays, strict=True):
        assert isinstance(held, Array)
        flowers = Array(array)
        assert (held.dtype, held.shape, held.stype) == (flowers.dtype, flowers.shape, flowers.stype)
        assert held.data == flowers.data
    copies = record.copy().to_numpy_ndarrays()
    assert [copy.dtype for copy in copies] == [np.float32, np.float64, np.float64]
    for copy, array in zip(copies, arrays, strict=True):
        np.testing.assert_array_equal(copy, array)
        assert not np.shares_memory(copy, array)  # strategies compute in place
