"""Layers and images that were made once, by the key of what they are made from.

::

    <root>/<key>.json      which blob it is; written last
    <root>/<key>.lock      locked by whoever makes it; the kernel frees the lock of a killed process
    <root>/<key>-…         notes of whoever makes it
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from flops.command import stop_if_needless
from flops.core.images import Layer, OfBlobs
from flops.durable_file import file_error, write_durably
from flops.image_ports import ImageBlobs, Report

_LOCK_POLL_S = 0.1
_NOTES = re.compile(r"(?P<key>[0-9a-f]{64})-.*")
_VERSION = 1  # of how layers are made; another one makes them all anew

Make = Callable[[Path, int], Layer]
Made = TypeVar("Made", bound=OfBlobs)


def key_of(kind: str, *parts: str) -> str:
    """The key of a layer by what it is made from."""
    return hashlib.sha256(json.dumps([_VERSION, kind, *parts]).encode()).hexdigest()


class LayerCache:
    """Finds layers, or has them made; several processes may use one root.

    Args:
        root: where it is written down which layers there are.
        blobs: where layers are.
    """

    def __init__(self, root: Path, blobs: ImageBlobs) -> None:
        self._root = root
        self.blobs = blobs

    def layer(self, key: str, what: str, make: Make, report: Report) -> Layer:
        """The layer of a key; one that is not there, or is damaged, is made.

        Args:
            key: of what it is made from; see `key_of`.
            what: the layer, for people.
            make: makes it; gets an empty folder for its notes, and a file descriptor of the lock, which
                programs it starts keep open, so that the lock holds until the last one has ended.
            report: is told what is waited for and what is made anew.

        Raises:
            FlopsError: ``disk_full``, ``file_unreadable``, and what `make` raises.
        """
        return self.made(Layer, key, what, make, report)

    def made(
        self, kind: type[Made], key: str, what: str, make: Callable[[Path, int], Made], report: Report
    ) -> Made:
        """As `layer`, for what may have several blobs.

        Args:
            kind: of what is made.
            key: as for `layer`, and so the rest.
            what: see there.
            make: see there.
            report: see there.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            if (found := self._find(kind, key, what, report)) is not None:
                return found
            with self._exclusive(key, what, report) as descriptor:
                if (found := self._find(kind, key, what, report)) is not None:
                    return found
                self._sweep(key)
                with tempfile.TemporaryDirectory(
                    dir=self._root, prefix=f"{key}-", ignore_cleanup_errors=True
                ) as notes:
                    made = make(Path(notes), descriptor)
                write_durably(self._record_of(key), made.model_dump_json())
                return made
        except OSError as exc:
            raise file_error(exc, self._root) from exc

    def _record_of(self, key: str) -> Path:
        return self._root / f"{key}.json"

    def _find(self, kind: type[Made], key: str, what: str, report: Report) -> Made | None:
        try:
            made = kind.model_validate_json(self._record_of(key).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        if not all(map(self.blobs.is_intact, made.digests)):
            report(f"{what} is damaged in the cache; it is made anew.")
            return None
        os.utime(self._record_of(key))
        return made

    @contextlib.contextmanager
    def _exclusive(self, key: str, what: str, report: Report) -> Iterator[int]:
        with (self._root / f"{key}.lock").open("ab") as file:
            if not _try_lock(file.fileno()):
                report(f"{what} is being made by another build; waiting for it.")
                while not _try_lock(file.fileno()):
                    stop_if_needless()
                    time.sleep(_LOCK_POLL_S)
            yield file.fileno()

    def _sweep(self, held: str) -> None:
        """Remove notes of builds that were killed, also those of the key whose lock is held here."""
        for path in self._root.iterdir():
            if (found := _NOTES.fullmatch(path.name)) is not None:
                with (self._root / f"{found['key']}.lock").open("ab") as file:
                    if found["key"] == held or _try_lock(file.fileno()):
                        shutil.rmtree(path, ignore_errors=True)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
