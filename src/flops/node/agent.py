"""Keeps the node joined to its cluster: dials, and dials again after every end, until the node stops."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from flops.errors import ErrorCode, FlopsError
from flops.node.backoff import Backoff
from flops.node.session import ClusterConnection, NodeView, Session
from flops.node.supervisor import Supervisor
from flops.ports import Clock

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 2.0  # after an end of the connection; users see a node that is back within seconds
LONGEST_PAUSE_WHEN_OLD_S = 10.0
OLD_AFTER_S = 120.0  # without the cluster
REFUSED_PAUSE_S = 10.0
GOODBYE_TIMEOUT_S = 3.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinkState:
    """How the node stands with its cluster.

    Args:
        is_connected: whether it has joined.
        detail: why not, one sentence; or the cluster's name.
        since_s: since when, in seconds since the epoch.
    """

    is_connected: bool
    detail: str
    since_s: float


class NodeAgent:
    """Runs sessions one after the other.

    Args:
        dial: makes a connection; raises ``unreachable``.
        view: what the node tells about itself.
        supervisor: what the cluster commands.
        clock: for the report's times.
        must_redial: whether the connection is to be made anew, since something about it has changed.
    """

    def __init__(
        self,
        dial: Callable[[], ClusterConnection],
        view: NodeView,
        supervisor: Supervisor,
        clock: Clock,
        must_redial: Callable[[], bool] = lambda: False,
    ) -> None:
        self._must_redial = must_redial
        self._dial = dial
        self._view = view
        self._supervisor = supervisor
        self._clock = clock
        self._is_stopping = threading.Event()
        self._lost_at_s = time.monotonic()
        self.link = LinkState(
            is_connected=False, detail="It has not been dialled yet.", since_s=clock.now_s()
        )

    def stop(self) -> None:
        """Have `run` return, after the cluster was told goodbye."""
        self._is_stopping.set()

    def run(self) -> None:
        """Keep the node joined until `stop`."""
        pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while not self._is_stopping.is_set():
            started_at_s = time.monotonic()
            try:
                self._run_session()
            except FlopsError as error:
                self._note_end(error)
                if error.code is not ErrorCode.UNREACHABLE and error.code is not ErrorCode.TIMEOUT:
                    self._is_stopping.wait(REFUSED_PAUSE_S)
                    continue
            if time.monotonic() - started_at_s > LONGEST_PAUSE_S * 2:
                pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
            elif time.monotonic() - self._lost_at_s > OLD_AFTER_S:
                pauses = Backoff(LONGEST_PAUSE_WHEN_OLD_S, LONGEST_PAUSE_WHEN_OLD_S)
            self._is_stopping.wait(pauses.next_s())

    def _run_session(self) -> None:
        connection = self._dial()
        try:
            session = Session(connection, self._view, self._supervisor)
            welcome = session.open()
            _log.info("joined the cluster %s", welcome.cluster)
            self._set_link(is_connected=True, detail=welcome.cluster)
            session.serve(lambda: self._is_stopping.is_set() or self._must_redial())
            if self._is_stopping.is_set():
                session.say_goodbye(timeout_s=GOODBYE_TIMEOUT_S)
        finally:
            if self.link.is_connected:
                self._lost_at_s = time.monotonic()
            connection.close()

    def _note_end(self, error: FlopsError) -> None:
        if self.link.is_connected or self.link.detail != error.message:
            _log.warning("not joined: %s", error.message)
        self._set_link(is_connected=False, detail=error.message)

    def _set_link(self, *, is_connected: bool, detail: str) -> None:
        if (is_connected, detail) != (self.link.is_connected, self.link.detail):
            since_s = self._clock.now_s() if is_connected != self.link.is_connected else self.link.since_s
            self.link = LinkState(is_connected=is_connected, detail=detail, since_s=since_s)
