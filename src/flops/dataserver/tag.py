"""A tag in memory: what it holds, what it may hold, and the lock for changing it."""

from __future__ import annotations

import threading

import pyarrow as pa

from flops.core.cluster import DataTag
from flops.core.dataset import Fragment, TagLimits
from flops.wire.tag_schema import columns_of


class Tag:
    """Fragments in the order of their rows, by id, and the first one's schema.

    Nothing here takes longer with more fragments, but what looks at all of them: an upload pays for each.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.RLock()
        self.fragments: dict[str, Fragment] = {}
        self.schema: pa.Schema | None = None
        self.limits = TagLimits()
        self.rows = 0
        self.size_bytes = 0
        self._by_digest: dict[str, Fragment] = {}

    def with_digest(self, digest: str) -> Fragment | None:
        """The fragment that holds these rows."""
        return self._by_digest.get(digest)

    def next_row(self) -> int:
        """The number of the row that would come next."""
        for last in reversed(self.fragments.values()):
            return last.first_row + last.rows
        return 0

    def add(self, fragment: Fragment, schema: pa.Schema) -> None:
        """Take in a fragment whose rows come after all others; the lock is held. Its id is not there yet."""
        self.fragments[fragment.id] = fragment
        self._by_digest.setdefault(fragment.digest, fragment)
        self.rows += fragment.rows
        self.size_bytes += fragment.size_bytes
        self.schema = self.schema if self.schema is not None else schema

    def forget(self, fragment: Fragment) -> None:
        """Take a fragment out, if it is there; the lock is held. Without any, the schema may change."""
        found = self.fragments.get(fragment.id)
        if found is None or found.first_row != fragment.first_row:
            return
        del self.fragments[fragment.id]
        if self._by_digest[fragment.digest] is found:
            del self._by_digest[fragment.digest]
        self.rows -= fragment.rows
        self.size_bytes -= fragment.size_bytes
        if not self.fragments:
            self.schema = None

    def facts(self) -> DataTag:
        """What may be told about the tag outside of its node."""
        return DataTag(
            name=self.name,
            rows=self.rows,
            size_bytes=self.size_bytes,
            columns=columns_of(self.schema) if self.schema is not None else {},
            last_write_s=max((f.stored_at_s for f in self.fragments.values()), default=0.0),
        )
