"""Takes in the cluster's events, in order, each at least once, on a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from flops.core.cluster import ClusterEvent
from flops.errors import FlopsError
from flops.ports import Orchestrator, ProjectStore

_log = logging.getLogger(__name__)

_FORGET_EVERY_S = 60.0  # what was taken in is removed from the cluster's log
_LOOK_AGAIN_S = 1.0  # although nobody woke us; also the pause while the store cannot be written


class EventPump:
    """Hands the cluster's events to `take_in`, and moves the store's cursor behind them.

    An event is handed over again when the process is killed before the cursor was moved.

    Args:
        store: keeps the cursor.
        orchestrator: has the events.
        take_in: gets an event of a service, and its node's name. A `FlopsError` from it means that nothing
            can be stored right now, and the event comes again; any other exception is logged, and the event
            is left behind.
    """

    def __init__(
        self, store: ProjectStore, orchestrator: Orchestrator, take_in: Callable[[ClusterEvent, str], None]
    ) -> None:
        self._store = store
        self._orchestrator = orchestrator
        self._take_in = take_in
        self._wake = threading.Event()
        self._is_closed = False
        self._forget_at_s = 0.0
        self._node_names: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="event-pump", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._orchestrator.on_event(self._wake.set)
        self._thread.start()

    def close(self) -> None:
        """End the thread after the event it works on."""
        self._is_closed = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._is_closed:
            self._wake.clear()
            try:
                self._pump()
            except FlopsError:
                _log.exception("events of the cluster cannot be taken in now; trying again")
                self._wake.clear()
            except Exception:  # noqa: BLE001 (the pump must outlive whatever it meets)
                _log.exception("the event pump stumbled")
                self._wake.clear()
            if not self._is_closed:
                self._wake.wait(_LOOK_AGAIN_S)

    def _pump(self) -> None:
        cursor = self._store.cursor()
        seq = cursor
        try:
            for event in self._orchestrator.events(after=cursor):
                if self._is_closed:
                    return
                self._hand_over(event)
                seq = event.seq
        finally:
            if seq > cursor:
                self._store.move_cursor(seq)
        if time.monotonic() >= self._forget_at_s:
            self._forget_at_s = time.monotonic() + _FORGET_EVERY_S
            self._orchestrator.forget_events(seq)

    def _hand_over(self, event: ClusterEvent) -> None:
        if not event.project_id:
            return
        try:
            self._take_in(event, self._name_of(event.node_id))
        except FlopsError:
            raise
        except Exception:  # noqa: BLE001 (one broken project never stops the pump)
            _log.exception("event %d of %s was left behind", event.seq, event.service_id)

    def _name_of(self, node_id: str) -> str:
        if node_id not in self._node_names:
            self._node_names = {node.id: node.name for node in self._orchestrator.nodes()}
        return self._node_names.get(node_id, node_id)
