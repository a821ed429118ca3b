"""A small client for devices and data owners: send data to a node, list, describe, read and drop them.

from flops.data import DataClient

with DataClient("node-7.local:11027", token) as client:
    client.push(table, tag="turbines")
    for tag in client.tags():
        print(tag.name, tag.rows)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import pyarrow as pa

from flops.adapters.data_files import DataSource, open_data
from flops.adapters.flight_client import ANSWER_TIMEOUT_S, FlightDataClient
from flops.core.cluster import DataTag
from flops.core.dataset import Stored, TagDescription, TagLimits
from flops.errors import ErrorCode, FlopsError

Pushable: TypeAlias = pa.Table | pa.RecordBatch | pa.RecordBatchReader | str | Path


class DataClient:
    """Talks to one node's ML data server. Every failure is a `FlopsError` with a code and a hint.

    Args:
        address: ``host`` or ``host:port``; the port is 11027 by default.
        token: the server's admin token, or one that `flops data token` made from it.
        timeout_s: how long to wait for answers that carry no rows.
    """

    def __init__(self, address: str, token: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._client = FlightDataClient(address, token, timeout_s=timeout_s)

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def push(self, data: Pushable, tag: str, *, name: str = "") -> Stored:
        """Send data. When this returns, they are stored durably; when it raises, nothing of them is stored.

        Args:
            data: a ``pyarrow`` table, batch or reader, or the path of a Parquet, Arrow, CSV or NPZ file or
                of a folder with one sub-folder of images per label.
            tag: the data tag.
            name: a name for the upload in its tag; a later one with the same name replaces it. Without a
                name, the same content sent twice is stored once.

        Raises:
            FlopsError: ``file_unreadable``, ``data_format_unknown``, ``schema_mismatch``, ``data_empty``,
                ``quota_exceeded``, ``disk_full``, ``upload_incomplete``, ``unreachable``.
        """
        source = _source_of(data)
        return self._client.push(source.schema, source.batches, tag, fragment_id=name)

    def tags(self) -> list[DataTag]:
        """The tags of the node, with rows, bytes, columns and last write."""
        return self._client.tags()

    def describe(self, tag: str, *, is_with_statistics: bool = False) -> TagDescription:
        """Everything known about a tag; with statistics, its node scans all its rows.

        Raises:
            FlopsError: ``tag_not_found``.
        """
        return self._client.describe(tag, is_with_statistics=is_with_statistics)

    def read(self, *tags: str, part: int = 0, parts: int = 1) -> pa.Table:
        """The rows of some tags as one table in memory; `stream` holds no more than a batch.

        Raises:
            FlopsError: ``tag_not_found``, ``schema_mismatch``.
        """
        schema, batches = self._client.read(tags, part=part, parts=parts)
        return pa.Table.from_batches(batches, schema=schema)

    def stream(self, *tags: str, part: int = 0, parts: int = 1) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """The schema of some tags, and their rows batch by batch.

        Raises:
            FlopsError: ``tag_not_found``, ``schema_mismatch``.
        """
        return self._client.read(tags, part=part, parts=parts)

    def drop(self, tag: str, name: str = "") -> None:
        """Remove a tag's data, or one upload of it.

        Raises:
            FlopsError: ``tag_not_found``, ``fragment_not_found``, ``forbidden``.
        """
        if name:
            self._client.drop_fragment(tag, name)
        else:
            self._client.drop_tag(tag)

    def retain(self, tag: str, *, max_rows: int | None = None, max_bytes: int | None = None) -> TagLimits:
        """Keep only the newest uploads of a tag within these bounds; none stands for unlimited."""
        return self._client.set_retention(tag, max_rows=max_rows, max_bytes=max_bytes)

    def limit(self, tag: str, *, max_rows: int | None = None, max_bytes: int | None = None) -> TagLimits:
        """Have uploads refused that would make the tag larger than this; none stands for unlimited."""
        return self._client.set_quota(tag, max_rows=max_rows, max_bytes=max_bytes)


def _source_of(data: Pushable) -> DataSource:
    match data:
        case pa.Table():
            return DataSource(data.schema, data.to_batches())
        case pa.RecordBatch():
            return DataSource(data.schema, [data])
        case pa.RecordBatchReader():
            return DataSource(data.schema, data)
        case str() | Path():
            return open_data(Path(data))
    raise FlopsError(
        ErrorCode.DATA_FORMAT_UNKNOWN,
        f"{type(data).__name__} cannot be sent.",
        hint="Give a pyarrow table, batch or reader, or the path of a file or folder.",
    )
