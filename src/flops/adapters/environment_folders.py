"""Folders of environments: which are whole, which are being built, and how they go. No part of it builds.

``<root>/<digest of the lock>`` is an environment, whole when it has the file ``.complete``, whose time is
that of its last use. ``<digest>.lock`` is locked by whoever builds or removes it, and shared for a moment by
whoever begins to use it; the kernel frees the lock of a killed process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from flops.command import stop_if_needless
from flops.durable_file import sync_folder, write_durably
from flops.retention_ports import Cached

BUILDING = ".building-"  # notes of a build: this, the digest, and "-"
_REMOVED = ".removed-"
_COMPLETE = ".complete"
_LOCK_POLL_S = 0.1
_DIGEST = re.compile(r"[0-9a-f]{64}")


class EnvironmentFolders:
    """Implements `flops.retention_ports.Cache`; several processes may use one root.

    Args:
        root: where the folders are.
    """

    name = "environments"

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder_of(self, digest: str) -> Path:
        """Where the environment of a lock is, or is to be."""
        return self._root / digest

    def begin_use(self, digest: str) -> bool:
        """Whether the environment is whole; if so, it counts as used now."""
        try:
            with (self._root / f"{digest}.lock").open("rb") as file:
                return _try_lock(file.fileno(), fcntl.LOCK_SH) and _mark_used(self._root / digest)
        except OSError:
            return False

    @contextlib.contextmanager
    def exclusive(self, digest: str, report: Callable[[str], None]) -> Iterator[int]:
        """Hold the environment's lock, which others, also uv when we are killed, keep until they end.

        Yields:
            The lock's descriptor.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / f"{digest}.lock").open("ab") as file:
            if not _try_lock(file.fileno()):
                report("Waiting for another build of the same environment.")
                while not _try_lock(file.fileno()):
                    stop_if_needless()
                    time.sleep(_LOCK_POLL_S)
            yield file.fileno()

    def is_whole(self, digest: str) -> bool:
        """Whether the environment is whole, for the holder of its lock; it counts as used now."""
        return _mark_used(self._root / digest)

    def complete(self, digest: str) -> None:
        """Make the environment whole, durably; for the holder of its lock.

        Raises:
            FlopsError: ``disk_full``, ``file_unreadable``.
        """
        write_durably(self._root / digest / _COMPLETE, "")
        sync_folder(self._root)

    def cached(self) -> list[Cached]:
        """The environments that are whole."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for folder in self._root.iterdir():
                if _DIGEST.fullmatch(folder.name):
                    with contextlib.suppress(OSError):
                        found.append(Cached(folder.name, folder, (folder / _COMPLETE).stat().st_mtime))
        return found

    def drop(self, key: str, is_in_use: Callable[[], bool]) -> bool:
        """Remove an environment; False when it is in use or being built."""
        aside = self._root / f"{_REMOVED}{key}-{uuid.uuid4().hex}"
        with (self._root / f"{key}.lock").open("ab") as file:
            if not _try_lock(file.fileno()) or is_in_use():
                return False
            try:
                (self._root / key).rename(aside)
            except FileNotFoundError:
                return False
        shutil.rmtree(aside, ignore_errors=True)
        return True

    def sweep(self) -> None:
        """Remove what nobody builds any more, of environments and notes, and the half-removed."""
        with contextlib.suppress(FileNotFoundError):
            for path in self._root.iterdir():
                if path.name.startswith(_REMOVED):
                    shutil.rmtree(path, ignore_errors=True)
                    continue
                digest = path.name.removeprefix(BUILDING).partition("-")[0]
                if not _DIGEST.fullmatch(digest) or not path.is_dir() or (path / _COMPLETE).exists():
                    continue
                with (self._root / f"{digest}.lock").open("ab") as file:
                    if _try_lock(file.fileno()) and not (path / _COMPLETE).exists():
                        shutil.rmtree(path, ignore_errors=True)


def _mark_used(folder: Path) -> bool:
    try:
        os.utime(folder / _COMPLETE)
    except PermissionError:
        pass
    except OSError:
        return False
    return (folder / "bin" / "python").exists()  # not when the Python it was made from is gone


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
