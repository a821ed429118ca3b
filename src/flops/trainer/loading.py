"""While a learner loads its code and data: its aggregator knows, and a loading that stands still is ended.

A heartbeat tells how many rows have come from the node's ML data server. As long as more come, loading may
take any time; without a new row it has a deadline, also when the code lets no other thread run.

This module is part of the actor kit: it imports the standard library, numpy and pyarrow only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pyarrow as pa
from pyarrow import flight

from flops.errors import FlopsError
from flops.wire.training import LOADED, LOADING, Message, Stream
from flops_utils.local_data import rows_arrived

GRACE_S = 5.0  # beyond the deadline, for a learner to tell of its end by itself
_BEAT_S = 0.5
_DIAL_S = 5.0  # how long loading waits for the aggregator to know of it
_LOST = (flight.FlightError, pa.ArrowException, EOFError, OSError, FlopsError)


@contextlib.contextmanager
def heartbeats(
    connect: Callable[[], AbstractContextManager[Stream]], patience_s: float, give_up: Callable[[], None]
) -> Iterator[None]:
    """Tell the aggregator that this learner loads while the block within runs.

    Args:
        connect: opens a stream on which the aggregator takes this learner for a loading one.
        patience_s: longest time without a new row.
        give_up: called in another thread when that time is over; it ends the process.
    """
    beats = _Beats(connect, patience_s, give_up)
    thread = threading.Thread(target=beats.run, name="loading", daemon=True)
    thread.start()
    beats.has_dialled.wait(_DIAL_S)  # what comes may let no other thread run
    try:
        yield
    finally:
        beats.end()
        thread.join(2 * _BEAT_S)  # not for good: it may be dialling an aggregator that is not there


class _Beats:
    """The heartbeats, and the deadline: a timer that needs no interpreter, set anew with every new row."""

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[Stream]],
        patience_s: float,
        give_up: Callable[[], None],
    ) -> None:
        self.has_dialled = threading.Event()  # the aggregator knows, or did not answer
        self._connect = connect
        self._patience_s = patience_s
        self._give_up = give_up
        self._is_done = threading.Event()
        self._lock = threading.Lock()  # no deadline is set after the end
        self._rows = rows_arrived()
        self._progressed_s = time.monotonic()
        self._set_deadline()

    def end(self) -> None:
        """The loading is done."""
        with self._lock:
            self._is_done.set()
            faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        """Beat until the loading is done; without an aggregator, look for one."""
        while not self._is_done.is_set():
            with contextlib.suppress(*_LOST), self._connect() as stream:
                self.has_dialled.set()
                while not self._is_done.wait(_BEAT_S):
                    self._look()
                    stream.send(Message(LOADING, {"rows": self._rows}))
                stream.send(Message(LOADED))
                return
            self.has_dialled.set()
            self._look()
            self._is_done.wait(_BEAT_S)

    def _look(self) -> None:
        rows, now_s = rows_arrived(), time.monotonic()
        with self._lock:
            if self._is_done.is_set():
                return
            if rows != self._rows:
                self._rows, self._progressed_s = rows, now_s
                self._set_deadline()
            elif now_s - self._progressed_s > self._patience_s:
                self._give_up()

    def _set_deadline(self) -> None:
        faulthandler.dump_traceback_later(self._patience_s + GRACE_S, exit=True)
