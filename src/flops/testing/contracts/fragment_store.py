"""What every `flops.fragment_ports.FragmentStore` does."""

from __future__ import annotations

import pyarrow as pa
import pytest

from flops.core.dataset import Bounds, Fragment, TagLimits
from flops.errors import ErrorCode, FlopsError
from flops.fragment_ports import FragmentStore

DIGESTS = ("a" * 64, "b" * 64, "c" * 64)
SCHEMA = pa.schema(
    [("number", pa.int64()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))],
    metadata={"huggingface": '{"info": {}}'},
)


def some_rows(count: int, start: int = 0) -> pa.RecordBatch:
    """Rows of `SCHEMA`, each one different."""
    rows = [{"number": n, "image": {"bytes": b"%d" % n, "path": None}} for n in range(start, start + count)]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def store_rows(
    store: FragmentStore, tag: str, batch: pa.RecordBatch, digest: str, first_row: int
) -> Fragment:
    """Store rows under the id ``id-<first row>``."""
    upload = store.begin(tag, batch.schema)
    upload.write(batch)
    upload.seal()
    fragment = upload.publish(f"id-{first_row}", digest, first_row, batch.num_rows)
    store.settle(tag)
    upload.discard()
    return fragment


def read_rows(store: FragmentStore, fragment: Fragment) -> pa.Table:
    """All rows of a fragment."""
    return pa.Table.from_batches(list(store.read(fragment)))


class FragmentStoreContract:
    """Subclass it, and provide the fixture `store`, which is empty."""

    @pytest.fixture
    def store(self) -> FragmentStore:
        raise NotImplementedError

    def test_is_empty_at_first(self, store: FragmentStore) -> None:
        assert store.fragments() == []
        assert store.limits() == {}
        assert store.damaged("t") == []

    def test_what_is_published_can_be_read_with_its_metadata(self, store: FragmentStore) -> None:
        batch = some_rows(100)
        fragment = store_rows(store, "t", batch, DIGESTS[0], 0)
        table = read_rows(store, fragment)
        assert table.equals(pa.Table.from_batches([batch]))
        assert table.schema.metadata == SCHEMA.metadata
        assert (fragment.tag, fragment.id, fragment.digest) == ("t", "id-0", DIGESTS[0])
        assert (fragment.first_row, fragment.rows) == (0, 100)
        assert fragment.size_bytes > 0
        assert fragment.stored_at_s > 0

    def test_fragments_come_by_tag_and_first_row(self, store: FragmentStore) -> None:
        for tag, digest, first_row in (("b", DIGESTS[0], 0), ("a", DIGESTS[1], 20), ("a", DIGESTS[2], 3)):
            store_rows(store, tag, some_rows(2, first_row), digest, first_row)
        found = store.fragments()
        assert [(fragment.tag, fragment.first_row) for fragment, _ in found] == [
            ("a", 3),
            ("a", 20),
            ("b", 0),
        ]
        assert all(schema.equals(SCHEMA, check_metadata=True) for _, schema in found)

    def test_an_upload_is_not_there_before_it_is_published(self, store: FragmentStore) -> None:
        upload = store.begin("t", SCHEMA)
        upload.write(some_rows(3))
        upload.seal()
        assert store.fragments() == []
        upload.discard()
        upload.discard()
        assert store.fragments() == []

    def test_many_batches_are_one_fragment(self, store: FragmentStore) -> None:
        upload = store.begin("t", SCHEMA)
        for start in range(0, 50, 5):
            upload.write(some_rows(5, start))
        upload.seal()
        size_bytes = upload.size_bytes()
        fragment = upload.publish("x", DIGESTS[0], 0, 50)
        assert fragment.size_bytes == size_bytes
        assert read_rows(store, fragment)["number"].to_pylist() == list(range(50))

    def test_what_is_removed_is_gone(self, store: FragmentStore) -> None:
        kept = store_rows(store, "t", some_rows(2), DIGESTS[0], 0)
        gone = store_rows(store, "t", some_rows(2), DIGESTS[1], 2)
        store.remove(gone)
        store.remove(gone)
        assert [fragment for fragment, _ in store.fragments()] == [kept]
        with pytest.raises(FlopsError) as caught:
            read_rows(store, gone)
        assert caught.value.code is ErrorCode.FRAGMENT_NOT_FOUND

    def test_what_is_set_aside_is_told_and_hides_nothing(self, store: FragmentStore) -> None:
        kept = store_rows(store, "t", some_rows(2), DIGESTS[0], 0)
        damaged = store_rows(store, "t", some_rows(2), DIGESTS[1], 2)
        store.set_aside(damaged, "It smells.")
        store.set_aside(damaged, "It smells.")
        assert [fragment for fragment, _ in store.fragments()] == [kept]
        assert {damage.reason for damage in store.damaged("t")} == {"It smells."}
        assert store.damaged("other") == []

    def test_limits_are_kept(self, store: FragmentStore) -> None:
        limits = TagLimits(retention=Bounds(max_rows=7), quota=Bounds(max_bytes=9))
        store.put_limits("t", TagLimits())
        store.put_limits("t", limits)
        assert store.limits() == {"t": limits}
        assert store.fragments() == []
