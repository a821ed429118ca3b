"""A learner in a thread: a real connection, and answers that a test decides."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pyarrow import flight

from flops.wire.flight import bearer
from flops.wire.training import DESCRIPTOR, HELLO, REPLY, SCHEMA, STOP, TRAIN, Message, Stream

Respond = Callable[[Message], Message | None]


def echo(message: Message) -> Message:
    """Return what came, with 10 rows."""
    arrays = message.arrays if message.type == TRAIN else []
    metrics = {} if message.type == TRAIN else {"loss": 0.5, "accuracy": 0.75}
    return Message(REPLY, {"rows": 10, "metrics": metrics, "seconds": 0.01}, arrays)


class PlayedLearner:
    """Dials, says hello, and answers in a thread until ``stop``. Close it at the end.

    Args:
        port: of the aggregator.
        name: the learner's service id.
        token: what it shows.
        respond: makes the answer to an instruction; None leaves it unanswered.
        hello: further fields of the greeting.
    """

    def __init__(
        self,
        port: int,
        name: str,
        *,
        token: str = "secret",  # noqa: S107 (a test's)
        respond: Respond = echo,
        hello: dict[str, Any] | None = None,
    ) -> None:
        self.instructions: list[Message] = []
        self.is_stopped = False
        self._respond = respond
        # As processes do, learners that share one have a connection each.
        alone = [("grpc.use_local_subchannel_pool", 1)]
        self._client = flight.FlightClient(f"grpc://127.0.0.1:{port}", generic_options=alone)
        options = flight.FlightCallOptions(headers=[bearer(token)])
        descriptor = flight.FlightDescriptor.for_command(DESCRIPTOR)
        self._writer, self._reader = self._client.do_exchange(descriptor, options)
        self._writer.begin(SCHEMA)
        self.stream = Stream(self._reader, self._writer)
        greeting = {"learner": name, "node": f"node-of-{name}", "rows": 10, **(hello or {})}
        self.stream.send(Message(HELLO, greeting))
        self._thread = threading.Thread(target=self._serve, name=name)
        self._thread.start()

    def wait(self) -> None:
        """Wait until it has ended by itself."""
        self._thread.join()

    def close(self) -> None:
        """Leave at once, as a killed process does."""
        with contextlib.suppress(flight.FlightError, pa.ArrowException):
            self._reader.cancel()
        self._thread.join()
        with contextlib.suppress(flight.FlightError, pa.ArrowException):
            self._writer.close()
        self._client.close()

    def _serve(self) -> None:
        with contextlib.suppress(flight.FlightError, pa.ArrowException, EOFError, OSError):
            while True:
                message = self.stream.receive()
                self.instructions.append(message)
                if message.type == STOP:
                    self.is_stopped = True
                    return
                answer = self._respond(message)
                if answer is not None:
                    answer.header["id"] = message.header["id"]
                    self.stream.send(answer)
