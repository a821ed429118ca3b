"""Ends services that write more than they may, or fill the node's disk before it is full."""

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
_SPACING = 20  # of the time, measuring takes at most one part in so many
_FRESH_S = 5.0  # how long a measured size counts


class DiskGuard:
    """Watches the disk under the services' work folders; thread-safe, one for all services of a node.

    While enough is free, a look costs a system call, unless the service has a limit. Only below the reserve
    are all folders measured. Then the service with the largest folder is to be ended, if that gives back at
    least as much as the reserve: else it is not a service that fills the disk.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes: dict[ServiceId, tuple[float, int]] = {}  # when measured, and how large
        self._next_s: dict[ServiceId, float] = {}  # when those with a limit are to be measured again

    def problem_of(
        self,
        service_id: ServiceId,
        work_dir: Path,
        limit_mb: int | None = None,
        *,
        has_failed: bool = False,
    ) -> FlopsError | None:
        """Why a service has to be ended now; None when it may go on. To be asked often while it runs.

        Args:
            service_id: the service.
            work_dir: its work folder.
            limit_mb: what that may hold at most; None for all that is free.
            has_failed: it has ended by itself: was that because it filled the disk?
        """
        if limit_mb is not None and not has_failed:
            problem = self._overrun(service_id, work_dir, limit_mb)
            if problem is not None:
                return problem
        try:
            disk = shutil.disk_usage(work_dir)
        except OSError:
            return None
        reserve = reserve_bytes(disk.total)
        now_s = time.monotonic()
        with self._lock:
            before_s, _ = self._sizes.get(service_id, (None, 0))
        if disk.free >= reserve:
            with self._lock:
                self._sizes.pop(service_id, None)
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

    def _overrun(self, service_id: ServiceId, work_dir: Path, limit_mb: int) -> FlopsError | None:
        """Measure the folder of a service with a limit, however much is free; seldom if that takes long."""
        begun_s = time.monotonic()
        with self._lock:
            if begun_s < self._next_s.get(service_id, begun_s):
                return None
        size_mb = folder_bytes(work_dir) / 1024**2
        now_s = time.monotonic()
        with self._lock:
            self._next_s[service_id] = now_s + max(MEASURE_INTERVAL_S, _SPACING * (now_s - begun_s))
        if size_mb <= limit_mb:
            return None
        self.forget(service_id)
        return FlopsError(
            ErrorCode.OUT_OF_STORAGE,
            f"{service_id} wrote {size_mb:.0f} MB into its work folder, of which it may use {limit_mb} MB; "
            "what it wrote was removed.",
        )

    def forget(self, service_id: ServiceId) -> None:
        """Drop what was measured of a service."""
        with self._lock:
            self._sizes.pop(service_id, None)
            self._next_s.pop(service_id, None)


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
