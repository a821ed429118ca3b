"""The mock data provider: a service that stands in for the devices of its node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from flops.actor import ActorContext, EventLog
from flops.core.dataset import Stored
from flops.core.ids import Digest
from flops.core.sla import MockDataConfiguration
from flops.errors import ErrorCode, FlopsError
from flops.mockdata.partitioning import partition_rows, take_rows
from flops.mockdata.shipped import SHIPPED, load_shipped
from flops.wire.services import MockProviderConfig

TEST_SHARE = 10  # of a shipped data set, the last of ten parts is its test split
PATIENCE_S = 60.0  # how long the node's data server may be away, such as while it restarts
_RETRY_AFTER_S = 1.0
_WORTH_ANOTHER_TRY = {ErrorCode.UNREACHABLE, ErrorCode.UPLOAD_INCOMPLETE, ErrorCode.TIMEOUT}


class Sink(Protocol):
    """Where partitions are sent to."""

    def push(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], tag: str) -> Stored:
        """Send rows; what was stored before under the same name changes nothing."""
        ...


class MockDataProvider:
    """Pushes partitions of a data set to its node's data server, as devices would.

    Args:
        open_sink: connects to a data server, given its address and a token.
        fetch_blob: brings a blob of the cluster into a file, given the blobs' URL.
        read_file: reads a data file of any known format into a table.
        load_from_hub: loads a data set that is not shipped, given its name and split.
        patience_s: how long the data server may be away.
    """

    def __init__(
        self,
        open_sink: Callable[[str, str], Sink],
        fetch_blob: Callable[[str, Digest, Path], None],
        read_file: Callable[[Path], pa.Table],
        load_from_hub: Callable[[str, str], pa.Table],
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._open_sink = open_sink
        self._fetch_blob = fetch_blob
        self._read_file = read_file
        self._load_from_hub = load_from_hub
        self._patience_s = patience_s

    def run(self, context: ActorContext, events: EventLog) -> None:
        """Do the work of a service; doing it again after a restart stores nothing twice.

        Raises:
            FlopsError: ``dataset_unknown``, ``partitioning_invalid``, and what the data server refuses.
        """
        config = MockProviderConfig.model_validate(context.config)
        wanted = config.configuration
        if not context.data_address:
            raise FlopsError(
                ErrorCode.ADDON_UNHEALTHY,
                f"The node {context.node_name} has no ML data server to send data to.",
            )
        events.tell("progress", message=f"Loading the data set {wanted.dataset_name}.")
        table = self._load(config, context)
        rows = partition_rows(table, wanted.partitioner, wanted.number_of_partitions, wanted.seed)
        sink = self._open_sink(context.data_address, context.data_token)
        for count, partition in enumerate(config.partitions, start=1):
            if not 0 <= partition < len(rows):
                raise FlopsError(
                    ErrorCode.PARTITIONING_INVALID, f"There is no partition {partition} of {len(rows)}."
                )
            events.tell(
                "progress",
                message=f"Sending partition {count} of {len(config.partitions)} to the node's data server.",
            )
            stored = self._push(sink, wanted.data_tag, table, rows[partition])
            pushed = {"data_tag": wanted.data_tag, "partition": partition, "rows": stored.fragment.rows}
            events.tell("data_pushed", **pushed)

    def _load(self, config: MockProviderConfig, context: ActorContext) -> pa.Table:
        wanted = config.configuration
        if config.dataset_blob is not None:
            path = Path(context.work_dir) / "dataset"
            self._fetch_blob(context.blobs_url, Digest(config.dataset_blob), path)
            table = _split_of(wanted, {"train": self._read_file(path)})
        elif wanted.dataset_name in SHIPPED:
            whole = load_shipped(wanted.dataset_name)
            cut = whole.num_rows - whole.num_rows // TEST_SHARE
            table = _split_of(wanted, {"train": whole.slice(0, cut), "test": whole.slice(cut)})
        else:
            table = self._load_from_hub(wanted.dataset_name, wanted.split)
        return table if wanted.max_rows is None else table.slice(0, wanted.max_rows)

    def _push(self, sink: Sink, tag: str, table: pa.Table, rows: Any) -> Stored:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return sink.push(table.schema, take_rows(table, rows), tag)  # named by its content there
            except FlopsError as exc:
                if exc.code not in _WORTH_ANOTHER_TRY or time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_AFTER_S)


def _split_of(wanted: MockDataConfiguration, splits: Mapping[str, pa.Table]) -> pa.Table:
    if wanted.split not in splits:
        raise FlopsError(
            ErrorCode.DATASET_UNKNOWN,
            f"The data set {wanted.dataset_name} has no split {wanted.split!r}, but {', '.join(splits)}.",
            hint="Name one of these in `split`.",
        )
    return splits[wanted.split]
