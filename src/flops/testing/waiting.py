"""Time in tests: conditions that are polled against a deadline, and a clock that stands still."""

from __future__ import annotations

import time
from collections.abc import Callable

_POLL_S = 0.01


def until(is_true: Callable[[], bool], what: str = "it", *, timeout_s: float = 20.0) -> None:
    """Wait until something holds; an assertion fails when it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"{what} did not become true in time"
        time.sleep(_POLL_S)


class StandingClock:
    """Implements `flops.ports.Clock`; moves only when `time_s` is set."""

    def __init__(self) -> None:
        self.time_s = 1_000.0

    def now_s(self) -> float:
        """The time."""
        return self.time_s
