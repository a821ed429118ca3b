"""Runs effects on threads: those of one lane in order, a failed one again after a while."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from flops.core.effects import Effect, EffectKind

_log = logging.getLogger(__name__)

_AFTER_DEFECT_S = 5.0  # pause after an attempt that raised: the store could not be written, for example

Perform = Callable[[Effect, int, float], float | None]


class EffectExecutor:
    """Runs each effect until it is done.

    The effects of one project run in the order they were requested, so that a stop never overtakes a start.
    Those that touch no service and may take long, when a Git server or MLflow hangs or nodes are looked for,
    have threads of their own, so that no project's stop waits for them.

    Args:
        perform: does an effect; gets it with the number of attempts before, and the seconds since the
            first; returns None when it is done, or in how many seconds to try again.
        workers: number of threads for the services of projects, and as many for their repositories.
    """

    def __init__(self, perform: Perform, workers: int) -> None:
        self._services = _Lanes(perform, workers, "effects")
        repositories = _Lanes(perform, workers, "repositories")
        tracking = _Lanes(perform, 1, "tracking")
        looking = _Lanes(perform, 1, "late-nodes")
        self._special = {
            EffectKind.LOOK_FOR_NODES: looking,
            EffectKind.RESOLVE_REPOSITORY: repositories,
            EffectKind.END_TRACKING: tracking,
            EffectKind.DELETE_TRACKING: tracking,
        }
        self._all = (self._services, repositories, tracking, looking)

    def start(self) -> None:
        """Start the threads."""
        for lanes in self._all:
            lanes.start()

    def submit(self, effects: Iterable[Effect]) -> None:
        """Have effects run, those of a project in this order."""
        for effect in effects:
            self._special.get(effect.kind, self._services).add(effect)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Let running effects end; the others are left for the next start."""
        for lanes in self._all:
            lanes.tell_end()
        deadline = time.monotonic() + timeout_s
        for lanes in self._all:
            lanes.join(deadline)


class _Lanes:
    """Tasks by project, and the threads that take them."""

    def __init__(self, perform: Perform, workers: int, name: str) -> None:
        self._perform = perform
        self._changed = threading.Condition()
        self._lanes: dict[str, deque[_Task]] = {}
        self._due: list[tuple[float, int, str]] = []
        self._entries: dict[str, int] = {}  # by lane, its valid entry in `_due`; none while its task runs
        self._counter = itertools.count()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(workers)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def add(self, effect: Effect) -> None:
        with self._changed:
            name = effect.project_id or effect.key
            lane = self._lanes.setdefault(name, deque())
            lane.append(_Task(effect))
            if len(lane) == 1 or name in self._entries:
                # What waits to be tried again may have lost its meaning: what is new does not wait for it.
                self._schedule(name, 0.0)

    def tell_end(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def join(self, deadline: float) -> None:
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _schedule(self, lane: str, delay_s: float) -> None:
        entry = self._entries[lane] = next(self._counter)
        heapq.heappush(self._due, (time.monotonic() + delay_s, entry, lane))
        self._changed.notify()

    def _work(self) -> None:
        while (lane := self._next_lane()) is not None:
            count = len(self._lanes[lane])
            delay_s = self._attempt(self._lanes[lane][0])
            with self._changed:
                if delay_s is not None:
                    self._schedule(lane, delay_s if len(self._lanes[lane]) == count else 0.0)
                    continue
                self._lanes[lane].popleft()
                if self._lanes[lane]:
                    self._schedule(lane, 0.0)
                else:
                    del self._lanes[lane]

    def _next_lane(self) -> str | None:
        """Wait for a lane whose first effect is due; None when closed."""
        with self._changed:
            while not self._is_closed:
                while self._due and self._entries.get(self._due[0][2]) != self._due[0][1]:
                    heapq.heappop(self._due)  # it was scheduled anew
                wait_s = self._due[0][0] - time.monotonic() if self._due else None
                if wait_s is not None and wait_s <= 0:
                    lane = heapq.heappop(self._due)[2]
                    del self._entries[lane]
                    return lane
                self._changed.wait(wait_s)
            return None

    def _attempt(self, task: _Task) -> float | None:
        try:
            delay_s = self._perform(task.effect, task.attempts, time.monotonic() - task.first_at_s)
        except Exception:  # noqa: BLE001 (logged whole; one effect must not end the thread of all)
            _log.exception("effect %s could not be carried through", task.effect.key)
            delay_s = _AFTER_DEFECT_S
        task.attempts += 1
        return delay_s


class _Task:
    def __init__(self, effect: Effect) -> None:
        self.effect = effect
        self.attempts = 0
        self.first_at_s = time.monotonic()
