"""Ends services that fill the node's disk, before it is full."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

from flops.core.ids import ServiceId
from flops.errors import ErrorCode, FlopsError

RESERVE_BYTES = 512 * 1024**2  # kept free; of a disk below 5 GiB, a tenth
MEASURE_INTERVAL_S = 0.25
_FRESH_S = 5.0  # how long a measured size counts


class DiskGuard:
    """Watches the disk under the services' work folders; thread-safe, one for all services of a node.

    While enough is free, a look costs a system call. Only below the reserve are folders measured. Then the
    service with the largest folder is to be ended, if that gives back at least as much as the reserve: else
    it is not a service that fills the disk.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes: dict[ServiceId, tuple[float, int]] = {}  # when measured, and how large

    def problem_of(
        self, service_id: ServiceId, work_dir: Path, *, has_failed: bool = False
    ) -> FlopsError | None:
        """Why a service has to be ended now; None when it may go on. To be asked often while it runs.

        Args:
            service_id: the service.
            work_dir: its work folder.
            has_failed: it has ended by itself: was that because it filled the disk?
        """
        try:
            disk = shutil.disk_usage(work_dir)
        except OSError:
            return None
        reserve = reserve_bytes(disk.total)
        now_s = time.monotonic()
        with self._lock:
            before_s, _ = self._sizes.get(service_id, (None, 0))
        if disk.free >= reserve:
            self.forget(service_id)
            return None
        if not has_failed and before_s is not None and now_s - before_s < MEASURE_INTERVAL_S:
            return None
        size = folder_bytes(work_dir)
        with self._lock:
            self._sizes[service_id] = (now_s, size)
            known = [other for at_s, other in self._sizes.values() if now_s - at_s < _FRESH_S]
        is_first_look = before_s is None and not has_failed  # the others are measured before the next one
        if is_first_look or size < reserve or size < max(known):
            return None
        self.forget(service_id)
        return FlopsError(
            ErrorCode.DISK_FULL,
            f"{service_id} filled the disk of its node: {size // 1024**2} MB in its work folder, "
            f"{disk.free // 1024**2} MB free, of which {reserve // 1024**2} MB are kept for the node.",
            hint="Have the code write less, or free space on the node; what it wrote was removed.",
        )

    def forget(self, service_id: ServiceId) -> None:
        """Drop what was measured of a service."""
        with self._lock:
            self._sizes.pop(service_id, None)


def reserve_bytes(disk_bytes: int) -> int:
    """What is kept free of a disk."""
    return min(RESERVE_BYTES, disk_bytes // 10)


def folder_bytes(folder: Path, seen: set[tuple[int, int]] | None = None) -> int:
    """What the files below a folder take on the disk; links are not followed.

    Args:
        folder: the folder.
        seen: files of several names (hard links) that were counted before; they are left out, and those
            counted now are added.
    """
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(parent, name))  # noqa: PTH118 (many files)
            except OSError:
                continue  # gone meanwhile
            if seen is not None and found.st_nlink > 1:
                identity = (found.st_dev, found.st_ino)
                if identity in seen:
                    continue
                seen.add(identity)
            total += found.st_blocks * 512
    return total
