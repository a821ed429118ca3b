"""The Flight client keeps the contract of catalogs, against a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from flops.adapters.flight_client import FlightDataClient
from flops.adapters.memory_fragments import MemoryFragments
from flops.adapters.system_clock import SystemClock
from flops.core.dataset import Fragment, Stored
from flops.dataserver.catalogue import Catalogue
from flops.dataserver.server import DataServer
from flops.errors import ErrorCode, FlopsError
from flops.ports import DataCatalog
from flops.testing.contracts.data_catalog import DataCatalogContract
from flops.wire.flight import TAKEN


class TestFlightDataClient(DataCatalogContract):
    @pytest.fixture
    def catalog(self) -> Iterator[DataCatalog]:
        with (
            DataServer(Catalogue(MemoryFragments(SystemClock())), "secret", "127.0.0.1", 0) as server,
            FlightDataClient(f"127.0.0.1:{server.port}", "secret") as client,
        ):
            self._client = client
            yield client

    def put(self, tag: str, table: pa.Table) -> None:
        self._client.push(table.schema, table.to_batches(), tag)


def test_a_server_that_is_away_is_unreachable() -> None:
    with DataServer(Catalogue(MemoryFragments(SystemClock())), "secret", "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.port}"
    with FlightDataClient(address, "secret") as client, pytest.raises(FlopsError) as caught:
        client.tags()
    assert caught.value.code is ErrorCode.UNREACHABLE
    assert address in caught.value.message


class SlowServer(flight.FlightServerBase):
    """Takes a while before it says that it has taken in anything."""

    read = 0
    answered = 0

    def do_put(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.FlightMetadataWriter,
    ) -> None:
        for chunk in reader:
            self.read += chunk.data is not None
            if self.read == 5:
                time.sleep(0.3)  # meanwhile, a client that waits for nobody would go on
            while self.read >= 5 and self.answered < self.read:
                self.answered += 1
                writer.write(pa.py_buffer(TAKEN))
        fragment = Fragment(tag="t", id="x", digest="", first_row=0, rows=1, size_bytes=1, stored_at_s=0)
        writer.write(pa.py_buffer(Stored(fragment=fragment, is_new=True).model_dump_json().encode()))


def test_no_more_than_a_bound_is_sent_ahead_of_what_the_server_has_taken_in() -> None:
    batch = pa.record_batch({"x": np.zeros(524_288)})  # 4 MiB
    leads = []
    with SlowServer("grpc://127.0.0.1:0") as server:

        def batches() -> Iterator[pa.RecordBatch]:
            for number in range(20):
                leads.append(number - server.answered)
                yield batch

        with FlightDataClient(f"127.0.0.1:{server.port}", "") as client:
            assert client.push(batch.schema, batches(), "t").is_new
        assert server.read == server.answered == 20
    assert max(leads) == 4  # beside the one that is about to be sent


@pytest.mark.parametrize(
    ("address", "complete"),
    [
        ("host", "host:11027"),
        ("host:1", "host:1"),
        ("10.0.0.1", "10.0.0.1:11027"),
        ("::1", "[::1]:11027"),
        ("[::1]", "[::1]:11027"),
        ("[::1]:5", "[::1]:5"),
    ],
)
def test_addresses_are_completed(address: str, complete: str) -> None:
    with FlightDataClient(address, "") as client:
        assert client.address == complete
