"""What may be stored, what is the same, what has to go, and who reads which rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pyarrow as pa
import pytest

from flops.adapters.memory_fragments import MemoryFragments
from flops.core.dataset import Bounds, Fragment, Stored
from flops.dataserver.catalogue import Catalogue
from flops.errors import ErrorCode, FlopsError
from flops.wire.flight import Query, UploadName


class CountingClock:
    def __init__(self) -> None:
        self._now_s = 1_000.0

    def now_s(self) -> float:
        self._now_s += 1
        return self._now_s


@pytest.fixture
def store() -> MemoryFragments:
    return MemoryFragments(CountingClock())


@pytest.fixture
def catalogue(store: MemoryFragments) -> Catalogue:
    return Catalogue(store)


def put(catalogue: Catalogue, tag: str, table: pa.Table, *, name: str = "", chunk: int = 1_000) -> Stored:
    upload = catalogue.open_upload(UploadName(tag, name), table.schema)
    try:
        for batch in table.to_batches(max_chunksize=chunk):
            upload.write(batch)
        upload.seal()
        return upload.commit()
    finally:
        upload.discard()


def numbers(start: int, end: int) -> pa.Table:
    return pa.table({"n": range(start, end)})


def read(catalogue: Catalogue, *tags: str, part: int = 0, parts: int = 1) -> list[int]:
    schema, batches = catalogue.read(Query(tags, part, parts))
    return pa.Table.from_batches(batches, schema=schema)["n"].to_pylist()


def fails(code: ErrorCode, action: Callable[[], object]) -> FlopsError:
    with pytest.raises(FlopsError) as caught:
        action()
    assert caught.value.code is code
    return caught.value


def test_uploads_of_a_tag_are_read_in_the_order_they_came(catalogue: Catalogue) -> None:
    put(catalogue, "t", numbers(0, 3))
    put(catalogue, "t", numbers(10, 12))
    put(catalogue, "other", numbers(100, 101))
    assert read(catalogue, "t") == [0, 1, 2, 10, 11]
    assert read(catalogue, "t", "unknown", "other") == [100, 0, 1, 2, 10, 11]
    other, tag = catalogue.tags()
    assert (other.name, other.rows) == ("other", 1)
    assert (tag.name, tag.rows, tag.columns, tag.last_write_s) == ("t", 5, {"n": "int64"}, 1_002.0)


def test_the_same_content_is_stored_once_however_it_is_cut_and_named(catalogue: Catalogue) -> None:
    first = put(catalogue, "t", numbers(0, 10), name="a")
    again = put(catalogue, "t", numbers(0, 10), chunk=3)
    other_tag = put(catalogue, "u", numbers(0, 10))
    assert (first.is_new, again.is_new, other_tag.is_new) == (True, False, True)
    assert again.fragment == first.fragment
    assert read(catalogue, "t") == list(range(10))


def test_a_later_upload_of_a_name_replaces_the_earlier(catalogue: Catalogue) -> None:
    put(catalogue, "t", numbers(0, 3), name="a")
    put(catalogue, "t", numbers(3, 5), name="b")
    put(catalogue, "t", numbers(7, 9), name="a")
    assert read(catalogue, "t") == [3, 4, 7, 8]
    put(catalogue, "t", numbers(3, 5), name="a")  # now the same as b
    assert read(catalogue, "t") == [3, 4]


def test_two_uploads_of_the_same_at_once_are_stored_once(catalogue: Catalogue) -> None:
    uploads = [catalogue.open_upload(UploadName("t"), numbers(0, 1).schema) for _ in range(8)]
    for upload in uploads:
        for batch in numbers(0, 100).to_batches():
            upload.write(batch)
        upload.seal()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda upload: upload.commit(), uploads))
    assert sum(result.is_new for result in results) == 1
    assert read(catalogue, "t") == list(range(100))


def test_nothing_is_visible_before_the_commit(catalogue: Catalogue) -> None:
    upload = catalogue.open_upload(UploadName("t"), numbers(0, 1).schema)
    upload.write(numbers(0, 5).to_batches()[0])
    upload.seal()
    assert catalogue.tags() == []
    fails(ErrorCode.TAG_NOT_FOUND, lambda: read(catalogue, "t"))
    upload.discard()


def test_an_upload_without_rows_is_refused(catalogue: Catalogue) -> None:
    error = fails(ErrorCode.DATA_EMPTY, lambda: put(catalogue, "t", numbers(0, 0), name="x"))
    assert "t.x.parquet" in error.message


def test_a_difference_of_schemas_is_spelled_out(catalogue: Catalogue) -> None:
    put(catalogue, "t", pa.table({"a": [1], "b": ["x"], "c": [1.0]}))
    error = fails(
        ErrorCode.SCHEMA_MISMATCH, lambda: put(catalogue, "t", pa.table({"a": ["1"], "b": ["x"], "d": [1]}))
    )
    for part in (
        "tag t",
        "'a' is string instead of int64",
        "'c' (double) is missing",
        "'d' (int64) is not in",
    ):
        assert part in error.message


def test_what_carries_no_meaning_makes_no_difference(catalogue: Catalogue) -> None:
    put(catalogue, "t", pa.table({"n": [1], "s": ["x"]}))
    put(catalogue, "t", pa.table({"s": pa.array(["y"], pa.large_string()), "n": [2]}))
    put(catalogue, "t", pa.table({"n": [3], "s": pa.array(["z"]).dictionary_encode()}))
    schema, batches = catalogue.read(Query(("t",)))
    assert pa.Table.from_batches(batches, schema=schema).to_pydict() == {"n": [1, 2, 3], "s": ["x", "y", "z"]}


def test_of_two_first_uploads_the_faster_decides_the_schema(catalogue: Catalogue) -> None:
    slow = catalogue.open_upload(UploadName("t"), pa.schema([("n", pa.string())]))
    slow.write(pa.record_batch({"n": ["x"]}))
    slow.seal()
    put(catalogue, "t", numbers(0, 1))
    fails(ErrorCode.SCHEMA_MISMATCH, slow.commit)
    slow.discard()
    assert read(catalogue, "t") == [0]


def test_a_tag_gets_a_new_schema_when_it_was_dropped(catalogue: Catalogue) -> None:
    put(catalogue, "t", numbers(0, 1))
    assert catalogue.drop_tag("t") == 1
    fails(ErrorCode.TAG_NOT_FOUND, lambda: catalogue.drop_tag("t"))
    put(catalogue, "t", pa.table({"other": ["x"]}))
    assert catalogue.tags()[0].columns == {"other": "string"}


def test_tags_of_different_schemas_are_not_read_together(catalogue: Catalogue) -> None:
    put(catalogue, "t", numbers(0, 1))
    put(catalogue, "u", pa.table({"n": ["x"]}))
    error = fails(ErrorCode.SCHEMA_MISMATCH, lambda: read(catalogue, "t", "u"))
    assert "'n' is string instead of int64" in error.message


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_disjoint_balanced_and_cover_everything(catalogue: Catalogue, parts: int) -> None:
    for start, end in ((0, 1), (1, 12), (12, 13), (13, 40)):
        put(catalogue, "t", numbers(start, end), chunk=5)
    put(catalogue, "u", numbers(100, 150))
    found = [read(catalogue, "t", "u", part=part, parts=parts) for part in range(parts)]
    assert sorted(chain.from_iterable(found)) == [*range(40), *range(100, 150)]
    assert max(map(len, found)) - min(map(len, found)) <= 2


def test_rows_do_not_move_between_parts_when_others_come_or_go(catalogue: Catalogue) -> None:
    put(catalogue, "t", numbers(0, 5), name="a")
    put(catalogue, "t", numbers(5, 12), name="b")
    before = set(read(catalogue, "t", part=0, parts=2))
    put(catalogue, "t", numbers(12, 20))
    catalogue.drop_fragment(UploadName("t", "a"))
    assert {n for n in read(catalogue, "t", part=0, parts=2) if n < 12} == {n for n in before if n >= 5}


def test_parts_have_labels_mixed(catalogue: Catalogue) -> None:
    put(catalogue, "t", pa.table({"n": [label for label in range(10) for _ in range(20)]}))
    assert set(read(catalogue, "t", part=1, parts=2)) == set(range(10))


def test_little_uploads_are_read_in_large_batches(catalogue: Catalogue) -> None:
    for n in range(200):
        put(catalogue, "t", numbers(n, n + 1))
    _, batches = catalogue.read(Query(("t",)))
    assert [batch.num_rows for batch in batches] == [200]


def test_a_quota_refuses_and_stores_nothing(catalogue: Catalogue) -> None:
    catalogue.set_quota("t", Bounds(max_rows=5))
    put(catalogue, "t", numbers(0, 3))
    error = fails(ErrorCode.QUOTA_EXCEEDED, lambda: put(catalogue, "t", numbers(3, 6)))
    assert "6 rows" in error.message
    assert "quota is 5 rows" in error.message
    fails(ErrorCode.QUOTA_EXCEEDED, lambda: put(catalogue, "t", numbers(0, 100)))
    put(catalogue, "t", numbers(3, 5))
    assert read(catalogue, "t") == [0, 1, 2, 3, 4]


def test_retention_drops_the_oldest_and_keeps_the_newest(catalogue: Catalogue) -> None:
    for start in (0, 4, 8):
        put(catalogue, "t", numbers(start, start + 4))
    catalogue.set_retention("t", Bounds(max_rows=9))
    assert read(catalogue, "t") == [4, 5, 6, 7, 8, 9, 10, 11]
    assert put(catalogue, "t", numbers(20, 22)).dropped == 1
    assert read(catalogue, "t") == [8, 9, 10, 11, 20, 21]
    put(catalogue, "t", numbers(30, 50))
    assert read(catalogue, "t") == list(range(30, 50))
    catalogue.set_retention("t", Bounds(max_bytes=1))
    assert read(catalogue, "t") == list(range(30, 50))


def test_retention_makes_room_within_a_quota(catalogue: Catalogue) -> None:
    catalogue.set_quota("t", Bounds(max_rows=5))
    catalogue.set_retention("t", Bounds(max_rows=5))
    put(catalogue, "t", numbers(0, 4))
    put(catalogue, "t", numbers(4, 8))
    assert read(catalogue, "t") == [4, 5, 6, 7]


def test_limits_outlive_restarts_and_drops(store: MemoryFragments, catalogue: Catalogue) -> None:
    catalogue.set_quota("t", Bounds(max_rows=1))
    put(catalogue, "t", numbers(0, 1))
    catalogue.drop_tag("t")
    again = Catalogue(store)
    fails(ErrorCode.QUOTA_EXCEEDED, lambda: put(again, "t", numbers(0, 2)))
    assert again.describe("t").limits.quota == Bounds(max_rows=1)


def test_a_restart_finds_everything(store: MemoryFragments, catalogue: Catalogue) -> None:
    put(catalogue, "t", numbers(0, 3))
    put(catalogue, "t", numbers(3, 5))
    again = Catalogue(store)
    assert again.tags() == catalogue.tags()
    assert read(again, "t", part=1, parts=2) == read(catalogue, "t", part=1, parts=2)


def test_a_kill_between_replacing_and_removing_leaves_the_newer(store: MemoryFragments) -> None:
    for first_row, row in ((0, 7), (1, 8)):
        upload = store.begin("t", numbers(0, 1).schema)
        upload.write(numbers(row, row + 1).to_batches()[0])
        upload.publish("same", str(row) * 64, first_row, 1)
    assert read(Catalogue(store), "t") == [8]
    assert len(store.fragments()) == 1


def test_a_fragment_is_read_and_dropped_by_its_name(catalogue: Catalogue) -> None:
    put(catalogue, "t", numbers(0, 3), name="a")
    put(catalogue, "t", numbers(5, 6), name="b")
    schema, batches = catalogue.read_fragment(UploadName("t", "a"))
    assert pa.Table.from_batches(batches, schema=schema)["n"].to_pylist() == [0, 1, 2]
    catalogue.drop_fragment(UploadName("t", "a"))
    assert read(catalogue, "t") == [5]
    for name in (UploadName("t", "a"), UploadName("u", "a")):
        fails(ErrorCode.FRAGMENT_NOT_FOUND, lambda name=name: catalogue.drop_fragment(name))


class BrittleFragments(MemoryFragments):
    """A store in which one fragment turns out to be damaged after its first batch."""

    def read(self, fragment: Fragment) -> Iterator[pa.RecordBatch]:
        for batch in super().read(fragment):
            yield batch
            if fragment.id == "bad":
                raise FlopsError(ErrorCode.FRAGMENT_DAMAGED, "The fragment bad cannot be read.")


def test_a_damaged_fragment_hides_nothing_and_is_told() -> None:
    catalogue = Catalogue(BrittleFragments(CountingClock()))
    put(catalogue, "t", numbers(0, 3), name="good")
    put(catalogue, "t", numbers(3, 9), name="bad", chunk=2)
    put(catalogue, "t", numbers(9, 12), name="fine")
    assert [n for n in read(catalogue, "t") if not 3 <= n < 9] == [0, 1, 2, 9, 10, 11]
    assert read(catalogue, "t") == [0, 1, 2, 9, 10, 11]
    description = catalogue.describe("t")
    assert description.tag.rows == 6
    assert [damage.reason for damage in description.damaged] == ["The fragment bad cannot be read."]


def test_damage_of_the_only_fragment_is_told_when_it_is_asked_for_by_name() -> None:
    catalogue = Catalogue(BrittleFragments(CountingClock()))
    put(catalogue, "t", numbers(3, 9), name="bad")
    fails(ErrorCode.FRAGMENT_DAMAGED, lambda: list(catalogue.read_fragment(UploadName("t", "bad"))[1]))
    fails(ErrorCode.TAG_NOT_FOUND, lambda: read(catalogue, "t"))
    assert len(catalogue.describe("t").damaged) == 1


def test_what_is_dropped_while_it_is_read_is_left_out(catalogue: Catalogue) -> None:
    put(catalogue, "t", numbers(0, 3), name="a")
    put(catalogue, "t", numbers(3, 6), name="b")
    _, batches = catalogue.read(Query(("t",)))
    catalogue.drop_fragment(UploadName("t", "b"))
    assert sum(batch.num_rows for batch in batches) == 3


def test_statistics_come_when_they_are_asked_for(catalogue: Catalogue) -> None:
    table = pa.table(
        {"x": [1.0, None, 4.0, float("nan")], "label": [0, 1, 1, 1], "name": ["a", "b", "b", None]}
    )
    put(catalogue, "t", table, chunk=2)
    assert catalogue.describe("t").statistics is None
    statistics = catalogue.describe("t", is_with_statistics=True).statistics
    assert statistics is not None
    x = statistics["x"]
    assert (x.nulls, x.minimum, x.maximum, x.mean, x.counts) == (1, 1.0, 4.0, 2.5, None)
    assert statistics["label"].counts == {"0": 1, "1": 3}
    assert (statistics["name"].counts, statistics["name"].nulls) == ({"a": 1, "b": 2}, 1)


def test_columns_with_many_values_are_not_counted(catalogue: Catalogue) -> None:
    put(catalogue, "t", numbers(0, 51))
    statistics = catalogue.describe("t", is_with_statistics=True).statistics
    assert statistics is not None
    assert statistics["n"].counts is None


def test_an_unknown_tag_is_not_described(catalogue: Catalogue) -> None:
    fails(ErrorCode.TAG_NOT_FOUND, lambda: catalogue.describe("nope"))


class UnsureDisk(MemoryFragments):
    """Cannot say that what was published is durable, as long as `is_failing`."""

    is_failing = False

    def settle(self, tag: str) -> None:
        if self.is_failing:
            raise FlopsError(ErrorCode.FILE_UNREADABLE, f"The folder of {tag} cannot be synced.")


@pytest.mark.parametrize("name", ["", "kept"])
def test_what_may_not_be_durable_is_taken_back_and_nothing_goes_for_it(name: str) -> None:
    store = UnsureDisk(CountingClock())
    catalogue = Catalogue(store)
    put(catalogue, "t", numbers(0, 5), name="kept")
    store.is_failing = True
    fails(ErrorCode.FILE_UNREADABLE, lambda: put(catalogue, "t", numbers(5, 9), name=name))
    store.is_failing = False
    assert read(catalogue, "t") == read(Catalogue(store), "t") == list(range(5))
    assert put(catalogue, "t", numbers(5, 9), name=name).is_new
