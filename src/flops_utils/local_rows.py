"""How a learner's rows come from its node's ML data server: from its files, or through it.

From the files there are fewer copies to make, and no other process to wait for. A learner that may not open
them, such as one in a container, asks the server for the rows. So does one that finds anything wrong with
them: the server sets aside what is damaged, and says what is missing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import flight

from flops.wire.flight import Action, Query, RowFile, bearer, ticket_for
from flops.wire.row_batches import merge_small, rows_of_part
from flops.wire.server_trust import dial_options, split_trust
from flops.wire.tag_schema import conform
from flops_utils.local_data import DataSource, note_arrival

_BATCH_ROWS = 1_048_576  # more than a row group has, which is 16 MB


def read_rows(source: DataSource) -> pa.Table:
    """All rows of a learner.

    Raises:
        ArrowException: with a `FlopsError` in its text when the server refuses; OSError.
    """
    query = Query(source.data_tags, source.part, source.parts)
    token, trust = split_trust(source.token)
    location, dial = dial_options(source.address, trust)
    with flight.FlightClient(location, **dial) as client:
        options = flight.FlightCallOptions(headers=[bearer(token)])
        try:
            return _from_files(client, options, query)
        except (pa.ArrowException, OSError, ValueError):
            return _from_server(client, options, query)


def _from_server(client: flight.FlightClient, options: flight.FlightCallOptions, query: Query) -> pa.Table:
    batches = client.do_get(flight.Ticket(ticket_for(query)), options).to_reader()
    return pa.Table.from_batches(_counted(batches), schema=batches.schema)


def _from_files(client: flight.FlightClient, options: flight.FlightCallOptions, query: Query) -> pa.Table:
    (answer,) = client.do_action(flight.Action(Action.LOCATE, ticket_for(query)), options)
    located = json.loads(answer.body.to_pybytes())
    schema = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(located["schema"])))
    rows = (batch for found in located["files"] for batch in _rows(RowFile(*found), query, schema))
    return pa.Table.from_batches(_counted(merge_small(rows)), schema=schema)


def _rows(found: RowFile, query: Query, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The file's rows that belong to the part; as many as there should be, with their checksums verified."""
    row = found.first_row
    with (
        pa.memory_map(found.path) as mapped,
        pq.ParquetFile(mapped, page_checksum_verification=True, pre_buffer=False) as file,
    ):
        for batch in file.iter_batches(_BATCH_ROWS, use_threads=True):
            yield rows_of_part(conform(batch, schema), row, query.part, query.parts)
            row += batch.num_rows
    if row != found.first_row + found.rows:
        raise ValueError(f"{found.path} has {row - found.first_row} rows instead of {found.rows}")


def _counted(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches as they come; each shows that the loading goes on."""
    for batch in batches:
        note_arrival(batch.num_rows)
        yield batch
