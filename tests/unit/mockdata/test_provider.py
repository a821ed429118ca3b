"""The mock data provider, with a real data server beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flops.actor import ActorContext, EventLog
from flops.adapters.data_files import open_data
from flops.adapters.flight_client import FlightDataClient
from flops.adapters.memory_fragments import MemoryFragments
from flops.adapters.system_clock import SystemClock
from flops.core.ids import Digest
from flops.dataserver.catalogue import Catalogue
from flops.dataserver.server import DataServer
from flops.errors import ErrorCode, FlopsError
from flops.mockdata import hub
from flops.mockdata.hub import load_from_hub, load_split
from flops.mockdata.provider import MockDataProvider
from flops.mockdata.shipped import load_shipped
from flops.wire.flight import Query, Right, Scope, mint_token

TOKEN = "secret"
BLOB = "f" * 64


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue(MemoryFragments(SystemClock()))


@pytest.fixture
def address(catalogue: Catalogue) -> Iterator[str]:
    with DataServer(catalogue, TOKEN, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.port}"


def _read_file(path: Path) -> pa.Table:
    source = open_data(path)
    return pa.Table.from_batches(source.batches, schema=source.schema)


def _fetch(url: str, digest: Digest, path: Path) -> None:
    assert (url, digest) == ("http://cluster/blobs", BLOB)
    pq.write_table(pa.table({"n": range(10), "label": [0, 1] * 5}), path)


class Service:
    """A provider's work folder, and what it has told."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder = folder
        self._address = address

    def run(
        self,
        partitions: tuple[int, ...] = (0,),
        *,
        blob: str | None = None,
        patience_s: float = 0,
        **configuration: Any,
    ) -> None:
        config = {
            "mock_data_id": "m",
            "configuration": {"data_tag": "t", **configuration},
            "partitions": partitions,
            "dataset_blob": blob,
        }
        context = ActorContext(
            "mock-1", "m", "node-1", str(self._folder), blobs_url="http://cluster/blobs",
            data_address=self._address, data_token=mint_token(TOKEN, Scope(Right.WRITE, ("t",))),
            config=config,
        )  # fmt: skip
        provider = MockDataProvider(
            FlightDataClient, _fetch, _read_file, load_from_hub, patience_s=patience_s
        )
        provider.run(context, EventLog(self._folder))

    def told(self, kind: str) -> list[dict[str, Any]]:
        lines = (self._folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.fixture
def service(tmp_path: Path, address: str) -> Service:
    return Service(tmp_path, address)


def _stored(catalogue: Catalogue) -> pa.Table:
    schema, batches = catalogue.read(Query(("t",)))
    return pa.Table.from_batches(batches, schema=schema)


def test_digits_come_with_their_features(service: Service, catalogue: Catalogue) -> None:
    service.run((0, 2), number_of_partitions=3)
    assert [(e["data_tag"], e["partition"], e["rows"]) for e in service.told("data_pushed")] == [
        ("t", 0, 3_000),
        ("t", 2, 3_000),
    ]
    assert len(service.told("progress")) == 3
    table = _stored(catalogue)
    assert table.num_rows == 6_000
    assert b"huggingface" in table.schema.metadata
    assert table["image"][0].as_py()["bytes"].startswith(b"\x89PNG")


def test_a_second_run_stores_nothing_twice(service: Service, catalogue: Catalogue) -> None:
    for _ in range(2):
        service.run((0, 1), number_of_partitions=2, dataset_name="digits")
    assert len(service.told("data_pushed")) == 4
    assert _stored(catalogue).num_rows == 1_618


def test_a_file_of_the_user_is_fetched(service: Service, catalogue: Catalogue) -> None:
    service.run(blob=BLOB, dataset_name="mine.parquet")
    assert sorted(_stored(catalogue)["n"].to_pylist()) == list(range(10))


def test_only_the_first_rows_when_asked(service: Service, catalogue: Catalogue) -> None:
    service.run(blob=BLOB, max_rows=4)
    assert sorted(_stored(catalogue)["n"].to_pylist()) == [0, 1, 2, 3]


def test_train_and_test_split_share_nothing(service: Service, catalogue: Catalogue) -> None:
    service.run(dataset_name="breast_cancer", split="test")
    test_rows = _stored(catalogue)
    assert test_rows.num_rows == 56
    service.run(dataset_name="breast_cancer")
    assert _stored(catalogue).num_rows == 569
    assert {len(load_shipped(name)) for name in ("mnist", "digits", "breast_cancer")} == {10_000, 1_797, 569}


def test_shipped_data_mean_what_they_should() -> None:
    cancer = load_shipped("breast_cancer")
    assert (cancer["mean radius"][0].as_py(), cancer["worst fractal dimension"][0].as_py()) == (17.99, 0.1189)
    assert np.bincount(cancer["target"].to_numpy()).tolist() == [212, 357]
    digits = load_shipped("digits")
    assert digits["pixels"][0].as_py()[:5] == [0, 0, 5, 13, 9]
    assert digits["label"][:3].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("configuration", "code", "part"),
    [
        ({"split": "validation"}, ErrorCode.DATASET_UNKNOWN, "train, test"),
        ({"dataset_name": "../../etc/passwd"}, ErrorCode.DATASET_UNKNOWN, "does not name"),
        ({"partitioner": {"name": "natural"}}, ErrorCode.PARTITIONING_INVALID, "image, label"),
        ({"data_tag": "other"}, ErrorCode.FORBIDDEN, "'other'"),
    ],
)
def test_what_goes_wrong_is_told(
    service: Service, configuration: dict[str, Any], code: ErrorCode, part: str
) -> None:
    with pytest.raises(FlopsError) as caught:
        service.run(**configuration)
    assert caught.value.code is code
    assert part in caught.value.message


def test_a_partition_that_does_not_exist_is_told(service: Service) -> None:
    with pytest.raises(FlopsError) as caught:
        service.run((3,), number_of_partitions=3, dataset_name="digits")
    assert caught.value.code is ErrorCode.PARTITIONING_INVALID


def test_a_node_without_a_data_server_is_named(tmp_path: Path) -> None:
    with pytest.raises(FlopsError) as caught:
        Service(tmp_path, "").run()
    assert caught.value.code is ErrorCode.ADDON_UNHEALTHY
    assert "node-1" in caught.value.message


class ShakySink:
    """A data server that is away at first."""

    def __init__(self, client: FlightDataClient) -> None:
        self._client = client
        self._failures = 1

    def push(self, schema: Any, batches: Any, tag: str, *, fragment_id: str = "") -> Any:
        if self._failures:
            self._failures -= 1
            raise FlopsError(ErrorCode.UNREACHABLE, "It restarts.")
        return self._client.push(schema, batches, tag, fragment_id=fragment_id)


def test_a_data_server_that_restarts_is_waited_for(
    tmp_path: Path, address: str, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_shaky(where: str, token: str) -> ShakySink:
        return ShakySink(FlightDataClient(where, token))

    monkeypatch.setattr("flops.mockdata.provider._RETRY_AFTER_S", 0.01)
    configuration = {"data_tag": "t", "dataset_name": "digits"}
    context = ActorContext(
        "mock-1", "m", "node-1", str(tmp_path), data_address=address, data_token=TOKEN,
        config={"mock_data_id": "m", "configuration": configuration, "partitions": [0]},
    )  # fmt: skip
    MockDataProvider(open_shaky, _fetch, _read_file, load_from_hub).run(context, EventLog(tmp_path))
    assert _stored(catalogue).num_rows == 1_618


def test_a_hub_that_is_away_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FlopsError) as caught:
        load_from_hub("cifar10", "train")
    assert caught.value.code is ErrorCode.DATASET_UNKNOWN
    assert "cifar10" in caught.value.message
    assert "127.0.0.1:9" in caught.value.message


@pytest.fixture
def digits_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "digits.parquet"
    pq.write_table(load_shipped("mnist").slice(0, 50), path)
    return path


def test_flower_datasets_loads_what_the_hub_would_give(digits_file: Path, tmp_path: Path) -> None:
    found = load_split("parquet", "train", data_files=str(digits_file), cache_dir=str(tmp_path / "cache"))
    expected = load_shipped("mnist").slice(0, 50)
    assert found["label"].to_pylist() == expected["label"].to_pylist()
    assert found["image"][0].as_py()["bytes"] == expected["image"][0].as_py()["bytes"]
    assert b"huggingface" in found.schema.metadata


def test_a_split_that_the_hub_does_not_have_is_told(digits_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FlopsError) as caught:
        load_split("parquet", "nope", data_files=str(digits_file), cache_dir=str(tmp_path / "cache"))
    assert caught.value.code is ErrorCode.DATASET_UNKNOWN
    assert "nope" in caught.value.message
