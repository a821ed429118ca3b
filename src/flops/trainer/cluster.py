"""The aggregator of a cluster: a learner to the aggregator above it, and an aggregator to its own learners.

Asked to train, it runs the rounds of a cycle with its learners, and answers with the cluster's model, the
rows it was trained on, and the record of the rounds: one update a cycle. Asked to evaluate, it has its
learners evaluate, and answers with means over their held-out rows. Streams stay up from the first cycle to
the last.

A cycle is known by its number and by a digest of the parameters it goes out from. Asked again for one that
it has begun, after a kill of its own, of the aggregator above, or of the connection, it goes on where it
stands.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

from flops.actor import ActorContext, EventLog
from flops.errors import ErrorCode, FlopsError
from flops.trainer.dialling import Dial
from flops.trainer.gathering import JOIN_PATIENCE_S
from flops.trainer.half_precision import HALF_UPDATES, changes_between
from flops.trainer.learner import MEASURE_LOSS
from flops.trainer.tier import Tier
from flops.trainer.uplink import Asked, Uplink
from flops.wire.services import AggregatorConfig, ParentAggregator
from flops.wire.training import REPLY, TRAIN, Array, Message


class _SupersededError(Exception):
    """Nobody waits for this cycle any more."""


def train_cluster(context: ActorContext, config: AggregatorConfig, events: EventLog) -> None:
    """Aggregate a cluster until the aggregator above says that the training is over.

    Raises:
        FlopsError: why the cluster cannot take part.
    """
    training = ClusterTraining(context, config, events)
    is_over = False
    try:
        training.run()
        is_over = True
    finally:
        training.close(is_over=is_over)


class ClusterTraining:
    """A cluster's part in a training.

    Args:
        context: of the service.
        config: what to train; it has a parent.
        events: where progress is told.
        join_patience_s: longest time in which nobody loads and too few have joined.
    """

    def __init__(
        self,
        context: ActorContext,
        config: AggregatorConfig,
        events: EventLog,
        *,
        join_patience_s: float = JOIN_PATIENCE_S,
    ) -> None:
        if config.parent is None:
            raise FlopsError(ErrorCode.INTERNAL, f"{context.service_id} has no aggregator above it.")
        self._config = config
        self._events = events
        self._dial = _dial(config.parent, context)
        self._tier = Tier(context, config, events, join_patience_s=join_patience_s)
        self._parameters: list[Array] = []  # after the last round
        self._origin = ""  # of the cycle that the last round belongs to

    def run(self) -> None:
        """Wait for the learners, and do what the aggregator above asks.

        Raises:
            FlopsError: ``too_few_learners``, what keeps a learner from loading, ``unauthenticated``.
        """
        self._begin()
        uplink = Uplink(self._dial, self._hello, self._tier.tell)
        self._tier.tell(f"Joining the aggregator above at {self._dial.address}.")
        while (asked := uplink.next()) is not None:
            reply = self._answer(asked, uplink)
            if reply is not None:
                uplink.answer(asked, reply)

    def close(self, *, is_over: bool) -> None:
        """End the learners' connections, and the learners themselves when the training is over."""
        self._tier.server.stop(is_over=is_over)

    def _begin(self) -> None:
        checkpoint = self._tier.restore()
        if checkpoint is not None:
            self._parameters, self._origin = checkpoint.parameters, checkpoint.origin
            self._tier.tell(f"Going on after round {checkpoint.history[-1].number}.")
            self._tier.await_return()
            return
        try:
            self._tier.gathering.wait(lambda: False)
        except FlopsError as exc:
            self._events.tell_failure(exc)
            self._dial.tell_failure(exc)
            raise
        except KeyboardInterrupt:  # stopped: the aggregator above need not wait until it is started again
            self._dial.tell_failure(
                FlopsError(ErrorCode.TOO_FEW_LEARNERS, "The cluster's aggregator was stopped.")
            )
            raise

    def _hello(self) -> dict[str, Any]:
        rows = sum(link.rows for link in self._tier.server.joined())
        return {"rows": rows}

    # --- what is asked ---

    def _answer(self, asked: Asked, uplink: Uplink) -> Message | None:
        """Do what is asked; a failure is answered, and the cluster stays. None when nobody waits any more."""
        header = asked.instruction.header
        about = {"id": header["id"], "cluster": self._config.cluster}
        started = time.perf_counter()
        try:
            reply = self._train(asked, uplink) if asked.instruction.type == TRAIN else self._evaluate(asked)
        except _SupersededError:
            self._tier.tell(f"Cycle {header['round']} goes on without this cluster; its rounds end here.")
            return None
        except FlopsError as exc:
            self._tier.tell(f"Cycle {header['round']} failed in this cluster: {exc.message}")
            return Message(REPLY, {**about, "error": exc.to_dict()})
        reply.header.update(about, seconds=time.perf_counter() - started)
        return reply

    def _train(self, asked: Asked, uplink: Uplink) -> Message:
        """Run the rounds of a cycle, those that are missing."""
        header, arrays = asked.instruction.header, asked.instruction.arrays
        cycle, rounds = int(header["round"]), self._config.rounds
        before = (cycle - 1) * rounds  # the number of the last round that an earlier cycle can have
        metrics: dict[str, float] = {}
        if header.get("config", {}).get(MEASURE_LOSS):
            metrics["train_loss"] = self._tier.runner.evaluate(cycle, arrays).metrics["loss"]
        origin = f"{cycle}:{_digest(arrays)}"
        if origin != self._origin:
            del self._tier.history[_count_up_to(before, self._tier) :]
            self._parameters, self._origin = arrays, origin
        done = max(before, self._tier.history[-1].number if self._tier.history else 0)
        for number in range(done + 1, before + rounds + 1):
            if not uplink.is_wanted(asked):
                raise _SupersededError
            self._parameters = self._tier.run_round(number, self._parameters, origin).parameters
        records = [record for record in self._tier.history if record.number > before]
        rows = sum(part.rows for part in records[-1].participants)
        told = [record.model_dump(mode="json") for record in records]
        is_half = header.get("config", {}).get(HALF_UPDATES)
        update = changes_between(arrays, self._parameters) if is_half else self._parameters
        return Message(REPLY, {"rows": rows, "metrics": metrics, "rounds": told}, update)

    def _evaluate(self, asked: Asked) -> Message:
        """Have the learners evaluate; the means and their weight are what sums over all rows need."""
        number = int(asked.instruction.header["round"])
        evaluation = self._tier.runner.evaluate(number, asked.instruction.arrays)
        return Message(REPLY, {"rows": evaluation.rows, "metrics": evaluation.metrics})


def _count_up_to(number: int, tier: Tier) -> int:
    return sum(record.number <= number for record in tier.history)


def _dial(parent: ParentAggregator, context: ActorContext) -> Dial:
    names = (context.service_id, context.node_name, context.project_id, context.authority)
    return Dial(parent.address, parent.token, *names)


def _digest(arrays: Sequence[Array]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
