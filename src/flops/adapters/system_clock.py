"""The machine's clock."""

from __future__ import annotations

import time


class SystemClock:
    """Implements `flops.ports.Clock`."""

    def now_s(self) -> float:
        """Seconds since the epoch."""
        return time.time()  # noqa: TID251 (the one place that asks)
