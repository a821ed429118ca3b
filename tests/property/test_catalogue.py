"""The catalogue is like a dictionary of rows, whatever is done to it, also over restarts on real files."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flops.adapters.parquet_store import ParquetStore
from flops.core.dataset import Bounds
from flops.dataserver.catalogue import Catalogue
from flops.errors import ErrorCode, FlopsError
from flops.wire.flight import Query, UploadName

TAGS = st.sampled_from(["a", "b"])
NAMES = st.sampled_from(["", "x", "y"])
ROWS = st.lists(st.integers(0, 3), min_size=0, max_size=6)
BOUNDS = st.one_of(st.none(), st.integers(1, 12))
SCHEMA = pa.schema([("n", pa.int64())])


class CatalogueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._open()
        # Per tag: uploads in the order of arrival, each a name ("" for its content) and its rows.
        self.model: dict[str, list[tuple[str, list[int]]]] = {"a": [], "b": []}
        self.retention: dict[str, int | None] = {"a": None, "b": None}
        self.quota: dict[str, int | None] = {"a": None, "b": None}

    def _open(self) -> None:
        self.store = ParquetStore(Path(self._folder.name))
        self.catalogue = Catalogue(self.store)

    def teardown(self) -> None:
        self.store.close()
        self._folder.cleanup()

    @rule(tag=TAGS, name=NAMES, rows=ROWS, cut=st.integers(1, 6))
    def upload(self, tag: str, name: str, rows: list[int], cut: int) -> None:
        upload = self.catalogue.open_upload(UploadName(tag, name), SCHEMA)
        outcome: object
        try:
            for start in range(0, len(rows), cut):
                upload.write(pa.record_batch({"n": rows[start : start + cut]}))
            upload.seal()
            outcome = upload.commit().is_new
        except FlopsError as exc:
            outcome = exc.code
        finally:
            upload.discard()
        assert outcome == self._expected(tag, name, rows)

    def _expected(self, tag: str, name: str, rows: list[int]) -> object:
        uploads = self.model[tag]
        quota, retention = self.quota[tag], self.retention[tag]
        if quota is not None and len(rows) > quota:
            return ErrorCode.QUOTA_EXCEEDED
        if not rows:
            return ErrorCode.DATA_EMPTY
        if any(rows == stored for _, stored in uploads):
            self.model[tag] = [(n, r) for n, r in uploads if not (name and n == name and r != rows)]
            return False
        kept = [(n, r) for n, r in uploads if not (name and n == name)]
        while kept and retention is not None and sum(len(r) for _, r in kept) + len(rows) > retention:
            kept.pop(0)
        if quota is not None and sum(len(r) for _, r in kept) + len(rows) > quota:
            return ErrorCode.QUOTA_EXCEEDED
        self.model[tag] = [*kept, (name, rows)]
        return True

    @rule(tag=TAGS, rows=ROWS)
    def break_off(self, tag: str, rows: list[int]) -> None:
        upload = self.catalogue.open_upload(UploadName(tag), SCHEMA)
        if rows and self.quota[tag] is None:
            upload.write(pa.record_batch({"n": rows}))
        upload.discard()

    @rule(tag=TAGS, rows=BOUNDS)
    def retain(self, tag: str, rows: int | None) -> None:
        self.catalogue.set_retention(tag, Bounds(max_rows=rows))
        self.retention[tag] = rows
        uploads = self.model[tag]
        while rows is not None and len(uploads) > 1 and sum(len(r) for _, r in uploads) > rows:
            uploads.pop(0)

    @rule(tag=TAGS, rows=BOUNDS)
    def limit(self, tag: str, rows: int | None) -> None:
        self.catalogue.set_quota(tag, Bounds(max_rows=rows))
        self.quota[tag] = rows

    @rule(tag=TAGS)
    @precondition(lambda self: any(self.model.values()))
    def drop(self, tag: str) -> None:
        if self.model[tag]:
            assert self.catalogue.drop_tag(tag) == len(self.model[tag])
        self.model[tag] = []

    @rule(tag=TAGS, name=st.sampled_from(["x", "y"]))
    def drop_one(self, tag: str, name: str) -> None:
        is_there = any(n == name for n, _ in self.model[tag])
        if is_there:
            self.catalogue.drop_fragment(UploadName(tag, name))
        else:
            with pytest.raises(FlopsError, match="fragment_not_found"):
                self.catalogue.drop_fragment(UploadName(tag, name))
        self.model[tag] = [(n, r) for n, r in self.model[tag] if n != name]

    @rule()
    def restart(self) -> None:
        self.store.close()
        self._open()

    @invariant()
    def rows_are_those_of_the_model(self) -> None:
        for tag, uploads in self.model.items():
            expected = [row for _, rows in uploads for row in rows]
            assert self._read(tag, 0, 1) == expected
            halves = [self._read(tag, part, 2) for part in range(2)]
            assert Counter(halves[0] + halves[1]) == Counter(expected)
        facts = {tag.name: tag.rows for tag in self.catalogue.tags()}
        assert facts == {t: sum(len(r) for _, r in uploads) for t, uploads in self.model.items() if uploads}

    def _read(self, tag: str, part: int, parts: int) -> list[int]:
        if not self.model[tag]:
            with pytest.raises(FlopsError, match="tag_not_found"):
                self.catalogue.read(Query((tag,), part, parts))
            return []
        schema, batches = self.catalogue.read(Query((tag,), part, parts))
        rows: list[int] = pa.Table.from_batches(batches, schema=schema)["n"].to_pylist()
        return rows


TestCatalogue = CatalogueMachine.TestCase
TestCatalogue.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
