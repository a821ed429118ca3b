"""A learner: trains and evaluates the user's model on its node's data, whenever its aggregator asks.

Runs in the project's environment with the kit on PYTHONPATH: ``python -m flops.trainer.learner CONTEXT``.
Code and data are loaded once; the connection is dialled again, by itself, whenever it is gone.

This module is part of the actor kit: it imports the standard library, numpy and pyarrow only.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from flops.actor import ActorContext, EventLog, log_failure, run_actor
from flops.errors import ErrorCode, FlopsError
from flops.trainer.dialling import Dial
from flops.trainer.half_precision import HALF_UPDATES, changes_between
from flops.trainer.loading import heartbeats
from flops.trainer.ml_repo import MLRepo, describe_thread
from flops.wire.training import EVALUATE, REPLY, STOP, TRAIN, Array, Message, Stream
from flops_utils.local_data import DataSource

MEASURE_LOSS = "measure-loss"  # config key: evaluate the received parameters before training on them
_FOR_LEARNERS = frozenset({MEASURE_LOSS, HALF_UPDATES})  # of the config; the rest is for users' code


def main(context: ActorContext, events: EventLog) -> None:
    """Learn until the aggregator says that the training is over.

    Raises:
        FlopsError: ``user_code_failed``, ``no_matching_data`` or ``unreachable`` when code or data cannot be
            loaded, ``unauthenticated`` when the aggregator refuses the token.
    """
    config = context.config
    names = (context.service_id, context.node_name, context.project_id, context.authority)
    dial = Dial(config["aggregator"], config["learner_token"], *names)
    patience_s = float(config["load_timeout_s"])
    give_up = functools.partial(_give_up, dial, context, events, threading.get_ident())
    try:
        with heartbeats(functools.partial(dial.connect, {"is_loading": True}), patience_s, give_up):
            repo, rows = _load(context, events)
    except FlopsError as exc:
        _tell_failure(dial, events, context.disclosed(exc))
        raise
    events.tell("progress", message=f"Loaded {rows:,} rows; joining the aggregator at {dial.address}.")
    dial.stay(lambda: {"rows": rows}, lambda stream: _serve(stream, repo, context))


def _load(context: ActorContext, events: EventLog) -> tuple[MLRepo, int]:
    config = context.config
    tags = tuple(config["data_tags"])
    events.tell("progress", message=f"Loading the code and the data ({', '.join(tags)}).")
    seed = config.get("seed")
    part = int(config.get("part", 0))
    repo = MLRepo(
        Path(context.repo_dir), node=context.node_name, seed=None if seed is None else int(seed) + part
    )
    source = DataSource(
        context.data_address,
        context.data_token,
        tags,
        part,
        int(config.get("parts", 1)),
        context.node_name,
    )
    return repo, repo.load_data(source)


def _give_up(dial: Dial, context: ActorContext, events: EventLog, loading_thread: int) -> None:
    """End this process, which loads without end; who is told gets the lines of the code that it is in."""
    error = FlopsError(
        ErrorCode.TIMEOUT,
        f"{dial.learner} on {dial.node} loaded its code and data for "
        f"{float(context.config['load_timeout_s']):g} s without a new row, and was ended.",
        hint="Look for an endless loop in what it loads. FLOPS_LOAD_TIMEOUT_S of `flops up` sets the limit.",
        details={
            "node": dial.node,
            "phase": "load",
            "traceback": describe_thread(loading_thread, context.repo_dir),
        },
    )
    log_failure(error)
    _tell_failure(dial, events, context.disclosed(error))
    os._exit(error.spec.exit_code)


def _tell_failure(dial: Dial, events: EventLog, error: FlopsError) -> None:
    """Tell users, and then the aggregator, if it is there: it may be waiting for this learner."""
    events.tell_failure(error)
    dial.tell_failure(error)


def _serve(stream: Stream, repo: MLRepo, context: ActorContext) -> None:
    """Answer instructions until ``stop``."""
    while True:
        instruction = stream.receive()
        if instruction.type == STOP:
            return
        stream.send(_answer(instruction, repo, context))


def _answer(instruction: Message, repo: MLRepo, context: ActorContext) -> Message:
    """Do what is asked; a failure is answered, and the learner stays for the next instruction.

    The failure is logged whole here, on the learner's node; the answer has what the node reveals.
    """
    header = {"id": instruction.header["id"]}
    parameters = instruction.arrays
    if instruction.type == EVALUATE:  # user code may change them, and the next training may go out from them
        parameters = [np.array(array) for array in parameters]
    started = time.perf_counter()
    try:
        reply = _obey(instruction, parameters, repo)
        reply.header.update(header, seconds=time.perf_counter() - started)
        return reply
    except FlopsError as exc:
        exc.details.setdefault("round", instruction.header.get("round"))
        log_failure(exc)
        return Message(REPLY, {**header, "error": context.disclosed(exc).to_dict()})


def _obey(instruction: Message, parameters: list[Array], repo: MLRepo) -> Message:
    config = instruction.header.get("config", {})
    if instruction.type == TRAIN:
        metrics: dict[str, Any] = {}
        if config.get(MEASURE_LOSS):
            metrics["train_loss"] = repo.evaluate([np.array(array) for array in parameters]).loss
        is_half = config.get(HALF_UPDATES)
        begin = [np.array(array) for array in parameters] if is_half else []  # user code may train in place
        rows, arrays = repo.fit(parameters, {k: v for k, v in config.items() if k not in _FOR_LEARNERS})
        if is_half:
            arrays = changes_between(begin, arrays)
        return Message(REPLY, {"rows": rows, "metrics": metrics}, arrays)
    if instruction.type == EVALUATE:
        result = repo.evaluate(parameters)
        numbers = {"loss": result.loss, "accuracy": result.accuracy, **result.metrics}
        return Message(REPLY, {"rows": result.rows, "metrics": numbers})
    raise FlopsError(ErrorCode.INTERNAL, f"The learner does not know the instruction {instruction.type!r}.")


if __name__ == "__main__":
    sys.exit(run_actor(main))
