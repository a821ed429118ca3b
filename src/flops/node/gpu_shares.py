"""Which of a node's GPUs each service uses."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from flops.core.ids import ServiceId
from flops.errors import ErrorCode, FlopsError


class GpuShares:
    """Deals GPUs out; thread-safe, one for all services of a node.

    A service gets those that the fewest others use. Placement gives no node more learners of one project than
    its GPUs allow; learners of several projects share them.

    Args:
        numbers: of the GPUs that there are.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = tuple(numbers)
        self._lock = threading.Lock()
        self._held: dict[ServiceId, tuple[int, ...]] = {}

    def take(self, service_id: ServiceId, count: int) -> tuple[int, ...]:
        """Give GPUs to a service; what it had before is given back.

        Raises:
            FlopsError: ``service_failed`` when the node has fewer.
        """
        with self._lock:
            self._held.pop(service_id, None)
            if count > len(self._numbers):
                raise FlopsError(
                    ErrorCode.SERVICE_FAILED,
                    f"{service_id} needs {count} GPU{'s' if count > 1 else ''}, and its node has "
                    f"{len(self._numbers) or 'none'}.",
                    hint="Look at the driver on the node (`nvidia-smi`), then start its NodeEngine again.",
                )
            used = [number for numbers in self._held.values() for number in numbers]
            chosen = tuple(sorted(sorted(self._numbers, key=used.count)[:count]))
            if chosen:
                self._held[service_id] = chosen
            return chosen

    def keep(self, service_id: ServiceId, numbers: Sequence[int]) -> None:
        """Note what a service has that an earlier daemon started."""
        if numbers:
            with self._lock:
                self._held[service_id] = tuple(numbers)

    def give_back(self, service_id: ServiceId) -> None:
        """Note that a service has ended."""
        with self._lock:
            self._held.pop(service_id, None)
