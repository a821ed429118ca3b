"""Flower's `Grid` over our own connections, and every touch of what Flower does not publish.

Flower's strategies make Messages and read Messages; a `Grid` carries them. What is private in Flower is used
here and nowhere else: the identity of the process, which a Message takes its sender from, the message id in a
Message's metadata, and that an Array may be made otherwise than by Flower. `tests/unit/trainer/test_grid.py`
fails when a version of Flower changes them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, Error, MessageType, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from flops.trainer.links import Instruction, LearnerServer, Link, Request
from flops.wire.training import EVALUATE, TRAIN, Array, Encoded, Message, encode_arrays

ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"
ROWS = "num-examples"  # Flower's default name of the weight
_KINDS = {MessageType.TRAIN: TRAIN, MessageType.EVALUATE: EVALUATE}
_ERROR_CODE = 1
_STYPE = "numpy.ndarray"  # Flower's name of its serialisation
_FOREVER_S = 7 * 86_400.0

logging.getLogger("flwr").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Asked:
    """A learner's instruction that is on its way, or worked on."""

    instruction: FlowerMessage
    request: Request


@dataclass(frozen=True)
class Answer:
    """What came of asking one learner: its message, or why there is none."""

    learner: str
    node: str
    instruction: FlowerMessage
    reply: Message | None
    reason: str  # of no reply; empty when the time was up


class FlightGrid(Grid):
    """Carries a strategy's messages to joined learners.

    Args:
        server: where the learners join.
    """

    def __init__(self, server: LearnerServer) -> None:
        self._server = server
        self._present: dict[int, Link] = {}
        self._pushed: dict[str, FlowerMessage] = {}
        self._encoded: tuple[list[Array], Encoded] = [], encode_arrays([])  # the last arrays sent
        self._run = Run.create_empty(run_id=1)
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

    def show(self, links: Iterable[Link]) -> None:
        """Set which learners strategies see: they ask all that they see."""
        self._present = {node_id_of(link.learner): link for link in links}

    def send(self, messages: Iterable[FlowerMessage]) -> list[Asked]:
        """Ask the learners these messages are for."""
        instructions: list[tuple[Link, Instruction]] = []
        sent: list[FlowerMessage] = []
        for number, message in enumerate(messages):
            link = self._present[message.metadata.dst_node_id]
            record = message.content
            config = dict(next(iter(record.config_records.values()), {}))
            header = {"round": config.get("server-round", 0), "config": config}
            _set_message_id(message, f"{link.learner}/{number}")
            kind = _KINDS[message.metadata.message_type]
            instructions.append((link, Instruction(kind, header, self._encode(record))))
            sent.append(message)
        return [
            Asked(message, request)
            for message, request in zip(sent, self._server.send(instructions), strict=True)
        ]

    def answer(self, asked: Asked) -> Answer:
        """What came of asking; no reply and no reason when the learner still works on it."""
        link = asked.request.link
        return Answer(link.learner, link.node, asked.instruction, *self._server.take(asked.request))

    def _encode(self, record: RecordDict) -> Encoded:
        """Encode a record's arrays once for all learners, and for both phases when they are the same."""
        arrays = arrays_of(next(iter(record.array_records.values())))
        last, encoded = self._encoded
        if len(arrays) != len(last) or any(a is not b for a, b in zip(arrays, last, strict=True)):
            encoded = encode_arrays(arrays)
            self._encoded = arrays, encoded
        return encoded

    # --- what Flower's Grid asks for ---

    def set_run(self, run: Run) -> None:
        """Set the run, which nothing of ours reads."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> FlowerMessage:
        """Make a message to a learner."""
        return FlowerMessage(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Flower's ids of the learners that were shown."""
        return list(self._present)

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        """Keep messages until they are pulled: sending and waiting are one step here."""
        ids = []
        for number, message in enumerate(messages, len(self._pushed)):
            ids.append(f"pushed-{number}")
            self._pushed[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[FlowerMessage]:
        """Send pushed messages, and wait for their replies."""
        return self.send_and_receive([self._pushed.pop(key) for key in message_ids])

    def send_and_receive(
        self, messages: Iterable[FlowerMessage], *, timeout: float | None = None
    ) -> Iterable[FlowerMessage]:
        """Ask the learners; replies that are errors or missing carry a Flower error."""
        asked = self.send(messages)
        self._server.wait_until(
            lambda: all(one.request.is_settled for one in asked), _FOREVER_S if timeout is None else timeout
        )
        return [_flower_reply(self.answer(one)) for one in asked]


def node_id_of(learner: str) -> int:
    """Flower's id for a learner: the same after it has joined anew."""
    return int.from_bytes(hashlib.sha256(learner.encode()).digest()[:7], "big") + 1


def reply_with(
    instruction: FlowerMessage, arrays: list[Array] | None, metrics: dict[str, Any]
) -> FlowerMessage:
    """A Flower reply with a learner's parameters and numbers."""
    records: dict[str, Any] = {METRICS: MetricRecord(metrics)}
    if arrays is not None:
        records[ARRAYS] = record_of(arrays)
    return FlowerMessage(RecordDict(records), reply_to=instruction)


class HeldArray(FlowerArray):
    """An array in one of Flower's records that stays as it is: Flower's own are serialised and copied twice.

    Strategies get a copy with `numpy`, which is theirs: integers as float64, since they scale parameters.
    """

    def __init__(self, array: Array) -> None:
        self.held = array
        self.dtype, self.shape, self.stype = str(array.dtype), array.shape, _STYPE

    @property
    def data(self) -> bytes:  # type: ignore[override]  # an attribute in Flower
        """The array as Flower serialises it."""
        return bytes(FlowerArray(self.held).data)

    def numpy(self) -> Array:
        """A copy to compute with."""
        return self.held.astype(np.float64 if self.held.dtype.kind in "iub" else self.held.dtype)


def record_of(arrays: Iterable[Array]) -> ArrayRecord:
    """One of Flower's records with these arrays, which must not change while it is in use."""
    record = ArrayRecord()
    for index, array in enumerate(arrays):
        record[str(index)] = HeldArray(array)
    return record


def arrays_of(record: ArrayRecord) -> list[Array]:
    """The arrays of a record: those that it was made of, or what a strategy has put there."""
    return [array.held if isinstance(array, HeldArray) else array.numpy() for array in record.values()]


def _flower_reply(answer: Answer) -> FlowerMessage:
    reply = answer.reply
    if reply is None or reply.header.get("error"):
        reason = answer.reason or "it did not answer in time"
        if reply is not None:
            reason = str(reply.header["error"].get("message", reason))
        return FlowerMessage(Error(code=_ERROR_CODE, reason=reason), reply_to=answer.instruction)
    metrics = {key: value for key, value in reply.header["metrics"].items() if value is not None}
    metrics[ROWS] = int(reply.header["rows"])
    is_training = answer.instruction.metadata.message_type == MessageType.TRAIN
    return reply_with(answer.instruction, reply.arrays if is_training else None, metrics)


def _set_message_id(message: FlowerMessage, value: str) -> None:
    """Replies name what they reply to by this id; Flower lets only its own server set it."""
    message.metadata.__dict__["_message_id"] = value
