"""A cluster aggregator's connection to the one above: dialled anew at once, also while a cycle is trained.

Only the last instruction counts. One that comes again over a new connection is the same work; another one
makes the work that goes on needless, which `Uplink.is_wanted` says.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flops.errors import FlopsError
from flops.trainer.dialling import LOST, Dial
from flops.wire.training import STOP, Message, Stream


class _Connection:
    """A stream that may end while another thread is about to answer over it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._lock = threading.Lock()
        self._is_open = True

    def send(self, message: Message) -> None:
        with self._lock:
            if self._is_open:
                self.stream.send(message)

    def close(self) -> None:
        with self._lock:
            self._is_open = False


@dataclass(frozen=True)
class Asked:
    """An instruction, and where its answer goes."""

    instruction: Message
    connection: _Connection

    @property
    def work(self) -> tuple[str, int]:
        """What is asked: the same again after the connection was lost is the same work."""
        return self.instruction.type, int(self.instruction.header.get("round", 0))


class Uplink:
    """Stays connected to the aggregator above, in a thread of its own.

    Args:
        dial: how it is reached.
        hello: further fields of the greeting.
        tell: is told in one sentence when the connection is lost, and when there is one again.
    """

    def __init__(self, dial: Dial, hello: Callable[[], dict[str, Any]], tell: Callable[[str], None]) -> None:
        self._dial = dial
        self._hello = hello
        self._tell = tell
        self._changed = threading.Condition()
        self._last: Asked | None = None
        self._is_taken = False
        self._is_over = False
        self._error: FlopsError | None = None
        self._is_lost = False
        self._thread = threading.Thread(target=self._run, name="uplink", daemon=True)
        self._thread.start()

    def next(self) -> Asked | None:
        """Wait for the next instruction; None when the training is over.

        Raises:
            FlopsError: ``unauthenticated``.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or (self._last is not None and not self._is_taken))
            if self._error is not None:
                raise self._error
            if self._is_over:
                return None
            self._is_taken = True
            return self._last

    def is_wanted(self, asked: Asked) -> bool:
        """Whether somebody still waits, or may come back to wait, for what was asked."""
        with self._changed:
            return not self._is_over and self._last is not None and self._last.work == asked.work

    def answer(self, asked: Asked, reply: Message) -> None:
        """Send an answer; over a connection that is lost it goes nowhere, and is asked for again."""
        with contextlib.suppress(*LOST):
            asked.connection.send(reply)

    def _run(self) -> None:
        try:
            self._dial.stay(self._hello, self._serve)
        except FlopsError as exc:
            self._error = exc
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _serve(self, stream: Stream) -> None:
        if self._is_lost:
            self._tell(f"Connected to the aggregator above at {self._dial.address} again.")
        self._is_lost = False
        connection = _Connection(stream)
        try:
            while (instruction := stream.receive()).type != STOP:
                with self._changed:
                    self._last, self._is_taken = Asked(instruction, connection), False
                    self._changed.notify_all()
        except LOST:
            self._is_lost = True
            self._tell(
                f"The connection to the aggregator above at {self._dial.address} is lost; dialling it."
            )
            raise
        finally:
            connection.close()
