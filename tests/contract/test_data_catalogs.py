"""The Flight client keeps the contract of catalogs, against a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pytest

from flops.adapters.flight_client import FlightDataClient
from flops.adapters.memory_fragments import MemoryFragments
from flops.adapters.system_clock import SystemClock
from flops.dataserver.catalogue import Catalogue
from flops.dataserver.server import DataServer
from flops.errors import ErrorCode, FlopsError
from flops.ports import DataCatalog
from flops.testing.contracts.data_catalog import DataCatalogContract


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
