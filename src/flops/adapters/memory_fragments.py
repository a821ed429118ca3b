"""Fragments in memory, for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from flops.core.dataset import Damage, Fragment, TagLimits
from flops.errors import ErrorCode, FlopsError
from flops.ports import Clock


class MemoryFragments:
    """Implements `flops.fragment_ports.FragmentStore`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stored: dict[tuple[str, int], tuple[Fragment, pa.Schema, list[Any]]] = {}
        self._damaged: dict[str, list[Damage]] = {}
        self._limits: dict[str, TagLimits] = {}

    def fragments(self) -> list[tuple[Fragment, Any]]:
        """All fragments with their schemas, by tag and first row."""
        with self._lock:
            return [self._stored[key][:2] for key in sorted(self._stored)]

    def begin(self, tag: str, schema: Any) -> MemoryFragmentUpload:
        """Begin an upload."""
        return MemoryFragmentUpload(self, tag, schema)

    def settle(self, tag: str) -> None:
        """Nothing to do."""

    def path(self, fragment: Fragment) -> str:
        """There is no file."""
        return ""

    def read(self, fragment: Fragment) -> Iterator[Any]:
        """The rows, in the batches they came in.

        Raises:
            FlopsError: ``fragment_not_found``.
        """
        stored = self._stored.get((fragment.tag, fragment.first_row))
        if stored is None:
            raise FlopsError(ErrorCode.FRAGMENT_NOT_FOUND, f"{fragment.id} of {fragment.tag} was removed.")
        yield from stored[2]

    def remove(self, fragment: Fragment) -> None:
        """Remove a fragment; nothing happens if it is gone."""
        with self._lock:
            self._stored.pop((fragment.tag, fragment.first_row), None)

    def set_aside(self, fragment: Fragment, reason: str) -> None:
        """Hide a fragment and remember why."""
        self.remove(fragment)
        with self._lock:
            damage = Damage(name=fragment.id, reason=reason, path="")
            self._damaged.setdefault(fragment.tag, []).append(damage)

    def damaged(self, tag: str) -> list[Damage]:
        """What was set aside."""
        with self._lock:
            return list(self._damaged.get(tag, []))

    def limits(self) -> dict[str, TagLimits]:
        """Limits by tag."""
        with self._lock:
            return dict(self._limits)

    def put_limits(self, tag: str, limits: TagLimits) -> None:
        """Store the limits of a tag."""
        with self._lock:
            self._limits[tag] = limits

    def keep(self, fragment: Fragment, schema: pa.Schema, batches: list[Any]) -> Fragment:
        """Store a fragment with the time of now."""
        stored = fragment.model_copy(update={"stored_at_s": self._clock.now_s()})
        with self._lock:
            self._stored[stored.tag, stored.first_row] = (stored, schema, batches)
        return stored


class MemoryFragmentUpload:
    """Implements `flops.fragment_ports.FragmentUpload`."""

    def __init__(self, store: MemoryFragments, tag: str, schema: pa.Schema) -> None:
        self._store = store
        self._tag = tag
        self._schema = schema
        self._batches: list[Any] = []

    def write(self, batch: Any) -> None:
        """Take in the next rows."""
        self._batches.append(batch)

    def size_bytes(self) -> int:
        """Bytes of the rows in memory."""
        return sum(batch.nbytes for batch in self._batches)

    def seal(self) -> None:
        """Nothing to do."""

    def publish(self, fragment_id: str, digest: str, first_row: int, rows: int) -> Fragment:
        """Make the rows visible."""
        fragment = Fragment(
            tag=self._tag,
            id=fragment_id,
            digest=digest,
            first_row=first_row,
            rows=rows,
            size_bytes=self.size_bytes(),
            stored_at_s=0.0,
        )
        return self._store.keep(fragment, self._schema, self._batches)

    def discard(self) -> None:
        """Forget the rows."""
        self._batches = []
