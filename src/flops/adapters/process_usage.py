"""What the processes of a service use, all together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from flops.core.cluster import ServiceUsage
from flops.core.ids import ServiceId


@dataclass(frozen=True)
class _CpuSample:
    at_s: float
    cpu_s: float


class UsageMeter:
    """Measures services; CPU counts since a service was measured last."""

    def __init__(self) -> None:
        self._samples: dict[ServiceId, _CpuSample] = {}

    def measure(self, service_id: ServiceId, pids: Iterable[int]) -> ServiceUsage:
        """What these processes use now."""
        memory_bytes, cpu_s, count = 0, 0.0, 0
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                with process.oneshot():
                    times = process.cpu_times()
                    memory_bytes += process.memory_info().rss
                    cpu_s += times.user + times.system + times.children_user + times.children_system
                    count += 1
        now = _CpuSample(time.monotonic(), cpu_s)
        before = self._samples.get(service_id, now)
        self._samples[service_id] = now
        pause_s = now.at_s - before.at_s
        percent = max(0.0, now.cpu_s - before.cpu_s) / pause_s * 100 if pause_s > 0 else 0.0
        return ServiceUsage(
            memory_mb=round(memory_bytes / 1024**2, 1), cpu_percent=round(percent, 1), processes=count
        )

    def forget(self, service_id: ServiceId) -> None:
        """The service is gone."""
        self._samples.pop(service_id, None)
