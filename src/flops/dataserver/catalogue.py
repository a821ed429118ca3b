"""The data of a node by tag: what may be stored, what is the same, what has to go, who reads which rows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

import pyarrow as pa

from flops.core.cluster import DataTag
from flops.core.dataset import Bounds, Fragment, Stored, TagDescription, TagLimits, fragments_to_drop
from flops.dataserver.statistics import scan
from flops.dataserver.tag import Tag
from flops.errors import ErrorCode, FlopsError
from flops.fragment_ports import FragmentStore, FragmentUpload
from flops.wire.content_digest import ContentDigest
from flops.wire.flight import Query, RowFile, UploadName, fragment_name
from flops.wire.row_batches import merge_small, rows_of_part
from flops.wire.tag_schema import check_fit, conform, metadata_of, storable_schema

_log = logging.getLogger(__name__)


class Catalogue:
    """All tags of a store. Any number of threads may use it.

    Args:
        store: where the fragments are; nobody else changes it.
    """

    def __init__(self, store: FragmentStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._tags: dict[str, Tag] = {}
        for fragment, schema in store.fragments():
            self._take_in(fragment, schema)
        for name, limits in store.limits().items():
            self._tag(name).limits = limits

    def tags(self) -> list[DataTag]:
        """Tags that hold data, by name."""
        with self._lock:
            tags = sorted(self._tags.items())
        found = []
        for _, tag in tags:
            with tag.lock:
                if tag.fragments:
                    found.append(tag.facts())
        return found

    def describe(self, name: str, *, is_with_statistics: bool = False) -> TagDescription:
        """Everything known about a tag.

        Args:
            name: the tag.
            is_with_statistics: scan all its rows.

        Raises:
            FlopsError: ``tag_not_found``.
        """
        damaged = tuple(self._store.damaged(name))
        with self._lock:
            tag = self._tags.get(name, Tag(name))
        with tag.lock:
            description = TagDescription(
                tag=tag.facts(),
                fragments=tuple(tag.fragments.values()),
                limits=tag.limits,
                damaged=damaged,
                metadata=metadata_of(tag.schema) if tag.schema is not None else {},
            )
        if not (description.fragments or damaged or description.limits != TagLimits()):
            raise _tag_not_found(name)
        if is_with_statistics and description.fragments:
            description = description.model_copy(update={"statistics": scan(*self.read(Query((name,))))})
        return description

    def schema(self, names: Sequence[str]) -> pa.Schema:
        """The one schema of several tags; those without data do not count.

        Raises:
            FlopsError: ``tag_not_found`` when none has data; ``schema_mismatch``.
        """
        tags = [tag for tag in map(self._find, names) if tag is not None]
        if not tags:
            raise _tag_not_found(*names)
        first = tags[0]
        for tag in tags[1:]:
            check_fit(f"{first.name} as those of {tag.name} do", first.schema, tag.schema)
        return first.schema

    def fragments(self, names: Sequence[str] = ()) -> list[tuple[Fragment, pa.Schema]]:
        """Fragments of these tags, or of all, with their tag's schema."""
        with self._lock:
            wanted = sorted(self._tags) if not names else [name for name in names if name in self._tags]
            tags = [self._tags[name] for name in wanted]
        found: list[tuple[Fragment, pa.Schema]] = []
        for tag in tags:
            with tag.lock:
                found += [(fragment, tag.schema) for fragment in tag.fragments.values()]
        return found

    def fragment(self, name: UploadName) -> tuple[Fragment, pa.Schema]:
        """A fragment with its tag's schema.

        Raises:
            FlopsError: ``fragment_not_found``.
        """
        tag = self._find(name.tag)
        found = tag.fragments.get(name.id) if tag is not None else None
        if tag is None or found is None:
            raise FlopsError(
                ErrorCode.FRAGMENT_NOT_FOUND,
                f"This node has no {fragment_name(name.tag, name.id)}.",
                hint=f"`flops data describe {name.tag}` lists the fragments of the tag.",
            )
        return found, tag.schema

    def read(self, query: Query) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """The rows of a part of all data under some tags, without holding them in memory.

        A row's part never changes as long as the tags asked for and the number of parts are the same: data
        that arrive or go in the meantime do not move others from one part to another.

        Raises:
            FlopsError: ``tag_not_found`` when no tag has data; ``schema_mismatch`` when the tags do not fit.
        """
        schema = self.schema(query.data_tags)
        return schema, merge_small(self._rows(self._asked_for(query), query, schema))

    def locate(self, query: Query) -> tuple[pa.Schema, list[RowFile]]:
        """Where the rows are that `read` would give, for readers on this node.

        Raises:
            FlopsError: ``tag_not_found`` when no tag has data; ``schema_mismatch`` when the tags do not fit.
        """
        schema = self.schema(query.data_tags)
        files = [RowFile(self._store.path(f), row, f.rows) for row, f in self._asked_for(query)]
        return schema, files

    def read_fragment(self, name: UploadName) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """All rows of one fragment.

        Raises:
            FlopsError: ``fragment_not_found``; ``fragment_damaged`` while it is read.
        """
        fragment, schema = self.fragment(name)
        return schema, self._read_or_set_aside(fragment, schema)

    def open_upload(self, name: UploadName, schema: pa.Schema) -> Upload:
        """Begin an upload.

        Raises:
            FlopsError: ``schema_mismatch``, ``disk_full``.
        """
        return Upload(self._store, self._tag(name.tag), name, schema)

    def drop_tag(self, name: str) -> int:
        """Remove all data of a tag, not its limits; returns how many fragments there were.

        Raises:
            FlopsError: ``tag_not_found``.
        """
        tag = self._existing(name)
        with tag.lock:
            dropped = list(tag.fragments.values())
            remove(self._store, tag, dropped)
        return len(dropped)

    def drop_fragment(self, name: UploadName) -> None:
        """Remove one fragment.

        Raises:
            FlopsError: ``fragment_not_found``.
        """
        fragment, _ = self.fragment(name)
        tag = self._tag(name.tag)
        with tag.lock:
            remove(self._store, tag, [fragment])

    def set_retention(self, name: str, bounds: Bounds) -> TagLimits:
        """Keep no more than this of a tag, from now on and at once; the newest fragment stays in any case."""
        return self._set_limits(name, retention=bounds)

    def set_quota(self, name: str, bounds: Bounds) -> TagLimits:
        """Refuse uploads that would make the tag larger than this."""
        return self._set_limits(name, quota=bounds)

    def _set_limits(self, name: str, **changed: Bounds) -> TagLimits:
        tag = self._tag(name)
        with tag.lock:
            limits = tag.limits.model_copy(update=changed)
            self._store.put_limits(name, limits)
            tag.limits = limits
            fragments = list(tag.fragments.values())
            for newest in fragments[-1:]:
                excess = fragments_to_drop(
                    fragments[:-1], limits.retention, rows=newest.rows, size_bytes=newest.size_bytes
                )
                remove(self._store, tag, excess)
        return limits

    def _asked_for(self, query: Query) -> list[tuple[int, Fragment]]:
        """Fragments with the numbers of their first rows, by which rows belong to parts."""
        return [
            (fragment.first_row + position, fragment)
            for position, name in enumerate(sorted(query.data_tags))
            for fragment, _ in self.fragments([name])
        ]

    def _rows(
        self, fragments: list[tuple[int, Fragment]], query: Query, schema: pa.Schema
    ) -> Iterator[pa.RecordBatch]:
        for first_row, fragment in fragments:
            row = first_row
            try:
                for batch in self._read_or_set_aside(fragment, schema):
                    yield rows_of_part(batch, row, query.part, query.parts)
                    row += batch.num_rows
            except FlopsError as exc:
                # Removed meanwhile, or set aside just now: the other fragments are read all the same.
                if exc.code not in {ErrorCode.FRAGMENT_NOT_FOUND, ErrorCode.FRAGMENT_DAMAGED}:
                    raise

    def _read_or_set_aside(self, fragment: Fragment, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        try:
            for batch in self._store.read(fragment):
                yield conform(batch, schema)
        except FlopsError as exc:
            if exc.code is ErrorCode.FRAGMENT_DAMAGED:
                _log.error("%s", exc.message)
                tag = self._tag(fragment.tag)
                with tag.lock:
                    self._store.set_aside(fragment, exc.message)
                    tag.forget(fragment)
            raise

    def _take_in(self, fragment: Fragment, schema: pa.Schema) -> None:
        tag = self._tag(fragment.tag)
        if tag.schema is None:
            tag.schema = schema
        try:
            check_fit(tag.name, tag.schema, schema)
        except FlopsError as exc:
            self._store.set_aside(fragment, exc.message)
            return
        replaced = tag.fragments.get(fragment.id)
        if replaced is not None:  # the server was killed between storing the new one and removing the old
            remove(self._store, tag, [replaced])
        tag.add(fragment, schema)

    def _tag(self, name: str) -> Tag:
        with self._lock:
            return self._tags.setdefault(name, Tag(name))

    def _find(self, name: str) -> Tag | None:
        with self._lock:
            tag = self._tags.get(name)
        return tag if tag is not None and tag.fragments else None

    def _existing(self, name: str) -> Tag:
        tag = self._find(name)
        if tag is None:
            raise _tag_not_found(name)
        return tag


class Upload:
    """Rows on their way into a tag. For one thread.

    Args:
        store: where they go.
        tag: their tag.
        name: what the uploader calls them.
        schema: what the uploader announced.
    """

    def __init__(self, store: FragmentStore, tag: Tag, name: UploadName, schema: pa.Schema) -> None:
        self._store = store
        self._tag = tag
        self._name = name
        self._label = fragment_name(name.tag, name.id) if name.id else name.tag
        own = storable_schema(schema, self._label)
        known = tag.schema
        self._schema = known if known is not None else own
        check_fit(tag.name, self._schema, own)
        self._digest = ContentDigest(self._schema)
        self._writer: FragmentUpload = store.begin(tag.name, self._schema)
        self.rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Take in the next rows.

        Raises:
            FlopsError: ``schema_mismatch`` when values do not fit; ``quota_exceeded``, ``disk_full``.
        """
        try:
            conformed = conform(batch, self._schema)
        except pa.ArrowException as exc:
            raise FlopsError(
                ErrorCode.SCHEMA_MISMATCH, f"A value of the upload {self._label} does not fit: {exc}."
            ) from exc
        self._digest.update(conformed)
        self._writer.write(conformed)
        self.rows += batch.num_rows
        if not self._tag.limits.quota.admit(self.rows, self._writer.size_bytes()):
            raise self._quota_exceeded(self.rows, self._writer.size_bytes())

    def seal(self) -> None:
        """Make the rows durable, but not yet visible; no more follow.

        Raises:
            FlopsError: ``data_empty``, ``disk_full``.
        """
        if self.rows == 0:
            raise FlopsError(ErrorCode.DATA_EMPTY, f"The upload {self._label} has no row.")
        self._writer.seal()

    def commit(self) -> Stored:
        """Make the sealed rows visible, unless they are there already.

        Raises:
            FlopsError: ``schema_mismatch``, ``quota_exceeded``, ``disk_full``.
        """
        digest = self._digest.hexdigest()
        tag = self._tag
        with tag.lock:
            if tag.schema is not None:  # another first upload may have been faster
                check_fit(tag.name, tag.schema, self._schema)
            fragment_id = self._name.id or digest
            same = tag.with_digest(digest)
            replaced = [f for f in [tag.fragments.get(fragment_id)] if f is not None and f is not same]
            dropped = self._make_room(replaced) if same is None else []
            fragment = same or self._writer.publish(fragment_id, digest, tag.next_row(), self.rows)
            if dropped or replaced:  # they stay until what comes in their place is durable
                self._settle(fragment, is_new=same is None)
                remove(self._store, tag, [*dropped, *replaced])
            if same is None:
                tag.add(fragment, self._schema)
        self._settle(fragment, is_new=same is None)
        return Stored(fragment=fragment, is_new=same is None, dropped=len(dropped))

    def discard(self) -> None:
        """Forget the rows; nothing happens after `commit`."""
        self._writer.discard()

    def _settle(self, fragment: Fragment, *, is_new: bool) -> None:
        """Have it on disk. Uploads that end at the same time wait for this together, without the lock."""
        try:
            self._store.settle(fragment.tag)
        except FlopsError:
            if is_new:
                with self._tag.lock:
                    remove(self._store, self._tag, [fragment])
            raise

    def _make_room(self, replaced: list[Fragment]) -> list[Fragment]:
        """What retention removes in exchange for this upload; refuse it if the quota is exceeded even so."""
        tag, limits, size_bytes = self._tag, self._tag.limits, self._writer.size_bytes()
        dropped: list[Fragment] = []
        if limits.retention != Bounds():
            older = [f for f in tag.fragments.values() if f not in replaced]
            dropped = fragments_to_drop(older, limits.retention, rows=self.rows, size_bytes=size_bytes)
        gone = [*dropped, *replaced]
        rows = self.rows + tag.rows - sum(f.rows for f in gone)
        size_bytes += tag.size_bytes - sum(f.size_bytes for f in gone)
        if not limits.quota.admit(rows, size_bytes):
            raise self._quota_exceeded(rows, size_bytes)
        return dropped

    def _quota_exceeded(self, rows: int, size_bytes: int) -> FlopsError:
        return FlopsError(
            ErrorCode.QUOTA_EXCEEDED,
            f"With the upload {self._label}, tag {self._tag.name} would have {rows} rows and {size_bytes} "
            f"bytes; its quota is {self._tag.limits.quota}.",
            details={"tag": self._tag.name},
        )


def remove(store: FragmentStore, tag: Tag, fragments: Sequence[Fragment]) -> None:
    """Remove fragments from the store and from their tag, whose lock is held."""
    for fragment in fragments:
        store.remove(fragment)
        tag.forget(fragment)


def _tag_not_found(*names: str) -> FlopsError:
    return FlopsError(ErrorCode.TAG_NOT_FOUND, f"This node has no data with the tag {' or '.join(names)}.")
