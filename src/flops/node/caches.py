"""Keeps what a node caches within its limit: environments, bundles, whatever can be made or fetched again."""

from __future__ import annotations

import functools
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flops.command import stopped_when
from flops.core.model import Value
from flops.core.retention import Entry, Limits, bytes_allowed, choose_victims, keep_order
from flops.errors import FlopsError
from flops.node.disk_guard import folder_bytes, reserve_bytes
from flops.ports import Clock
from flops.retention_ports import Cache, Cached

_LOOK_EVERY_S = 1.0
_RETRY_S = 30.0  # after a look that found too much, and could give nothing back
_LOW_RESERVES = 2  # caches give way while less than so many of the disk guard's reserves are free
_SHRINK_EVERY_S = 600.0
_MB = 1024**2

_log = logging.getLogger(__name__)


class CacheLine(Value):
    """A cache as operators see it. A file that several entries share counts once."""

    name: str
    entries: int
    size_bytes: int


class NodeCaches:
    """Removes what was used least recently while all caches together are too large, or the disk gets low.

    A look costs a listing. Folders are measured only when there is something new, or too much: an environment
    has tens of thousands of files. Caches give way before the disk guard has to end services.

    Args:
        caches: what is cached.
        in_use: keys of what services of this node need now, or will need when they go on.
        max_bytes: what all caches together may take on the disk.
        home: a folder on that disk.
        clock: says since when something was not used.
        shrink_downloads: makes the caches of tools smaller that builds use; is told whether the disk is low.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        in_use: Callable[[], frozenset[str]],
        max_bytes: int,
        home: Path,
        clock: Clock,
        shrink_downloads: Callable[[bool], None] = lambda _is_disk_low: None,
    ) -> None:
        self._caches = tuple(caches)
        self._in_use = in_use
        self.max_bytes = max_bytes
        self._home = home
        self._clock = clock
        self._shrink_downloads = shrink_downloads
        self._shrunk_at_s = -_SHRINK_EVERY_S
        self._is_low = False
        self._sizes: dict[str, int] = {}  # as measured last; a key is that of `_found`
        self._stuck: tuple[float, frozenset[str]] = (0.0, frozenset())  # until when, with what in use
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="caches", daemon=True)

    def start(self) -> None:
        """Look after the caches, in a thread, until `close`; first remove what kills left behind."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; what it removes right now is removed at the next start."""
        self._is_closed.set()

    def lines(self) -> tuple[CacheLine, ...]:
        """How large the caches were when they were measured last."""
        sizes = self._sizes.copy()
        lines = []
        for cache in self._caches:
            own = [size for key, size in sizes.items() if key.startswith(f"{cache.name}/")]
            lines.append(CacheLine(name=cache.name, entries=len(own), size_bytes=sum(own)))
        return tuple(lines)

    def tend(self) -> None:
        """Have one look, and remove what is too much.

        Raises:
            OSError: a cache cannot be read or written.
        """
        found, in_use = self._found(), self._in_use()
        if found.keys() == self._sizes.keys() and (not self._is_too_much() or self._is_stuck(in_use)):
            return
        entries = self._measure(found, in_use)
        self._sizes = {entry.key: entry.size_bytes for entry in entries}
        limits = Limits(max_bytes=self._bytes_allowed())
        has_dropped = False
        for victim in choose_victims(entries, limits, self._clock.now_s()):
            cache, item = found[victim.key]
            if self._is_closed.is_set() or not cache.drop(item.key, functools.partial(self._needs, item.key)):
                continue
            has_dropped = True
            del self._sizes[victim.key]
            unused_s = self._clock.now_s() - victim.used_at_s
            _log.info(
                "removed from the %s: %s, %d MB, not used for %d s; %d MB may be cached now",
                cache.name,
                item.key[:12],
                victim.size_bytes // _MB,
                unused_s,
                (limits.max_bytes or 0) // _MB,
            )
        if self._is_too_much() and not has_dropped:
            self._stuck = (time.monotonic() + _RETRY_S, in_use)

    def _run(self) -> None:
        for cache in self._caches:
            try:
                cache.sweep()
            except OSError as exc:
                _log.warning("what is left over of %s cannot be removed: %s", cache.name, exc)
        while not self._is_closed.is_set():
            try:
                self.tend()
                self._tend_downloads()
            except (OSError, FlopsError) as exc:
                _log.warning("the caches cannot be looked after now: %s", exc)
                self._is_closed.wait(_RETRY_S)
            self._is_closed.wait(_LOOK_EVERY_S)

    def _tend_downloads(self) -> None:
        disk = shutil.disk_usage(self._home)
        is_low = disk.free < _LOW_RESERVES * reserve_bytes(disk.total)
        has_become_low, self._is_low = is_low and not self._is_low, is_low
        if not has_become_low and time.monotonic() - self._shrunk_at_s < _SHRINK_EVERY_S:
            return
        self._shrunk_at_s = time.monotonic()
        with stopped_when(self._is_closed.is_set):
            self._shrink_downloads(is_low)

    def _found(self) -> dict[str, tuple[Cache, Cached]]:
        return {
            f"{cache.name}/{item.key}": (cache, item) for cache in self._caches for item in cache.cached()
        }

    def _needs(self, key: str) -> bool:
        return key in self._in_use()

    def _measure(self, found: dict[str, tuple[Cache, Cached]], in_use: frozenset[str]) -> list[Entry]:
        """Everything with its size: a file that others share, too, counts for the one that goes last."""
        order = keep_order(
            Entry(key=key, used_at_s=item.used_at_s, is_in_use=item.key in in_use)
            for key, (_, item) in found.items()
        )
        seen: set[tuple[int, int]] = set()
        return [
            entry.model_copy(update={"size_bytes": folder_bytes(found[entry.key][1].folder, seen)})
            for entry in order
        ]

    def _is_stuck(self, in_use: frozenset[str]) -> bool:
        until_s, with_in_use = self._stuck
        return with_in_use == in_use and time.monotonic() < until_s

    def _is_too_much(self) -> bool:
        return sum(self._sizes.values()) > self._bytes_allowed()

    def _bytes_allowed(self) -> int:
        disk = shutil.disk_usage(self._home)
        return bytes_allowed(
            self.max_bytes,
            kept=sum(self._sizes.values()),
            free=disk.free,
            wanted_free=_LOW_RESERVES * reserve_bytes(disk.total),
        )
