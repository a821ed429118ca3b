"""What every `flops.ports.DataCatalog` does."""

from __future__ import annotations

import pyarrow as pa
import pytest

from flops.ports import DataCatalog


class DataCatalogContract:
    """Subclass it, and provide the fixtures `catalog` and `put`, which stores rows with a tag."""

    @pytest.fixture
    def catalog(self) -> DataCatalog:
        raise NotImplementedError

    def put(self, tag: str, table: pa.Table) -> None:
        raise NotImplementedError

    def test_there_are_no_tags_at_first(self, catalog: DataCatalog) -> None:
        assert catalog.tags() == []

    def test_tags_have_their_facts_and_come_by_name(self, catalog: DataCatalog) -> None:
        self.put("b", pa.table({"x": [1, 2, 3]}))
        self.put("a", pa.table({"y": ["text"]}))
        self.put("b", pa.table({"x": [4]}))
        first, second = catalog.tags()
        assert (first.name, first.rows, first.columns) == ("a", 1, {"y": "string"})
        assert (second.name, second.rows, second.columns) == ("b", 4, {"x": "int64"})
        assert second.size_bytes > 0
        assert second.last_write_s > 0
