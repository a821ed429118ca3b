"""What repositories call to get their data, against a real data server."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from flops.adapters.flight_client import FlightDataClient
from flops.adapters.parquet_store import ParquetStore
from flops.dataserver.catalogue import Catalogue
from flops.dataserver.server import DataServer
from flops.errors import ErrorCode, FlopsError
from flops.wire.flight import Query, Right, Scope, UploadName, mint_token
from flops_utils.local_data import DataSource, rows_loaded, use_source
from flops_utils.ml_repo_building_blocks import load_dataset, load_table

ADMIN = "admin-secret"


@pytest.fixture(params=["from the files", "through the server"])
def address(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "through the server":  # as in a container, which does not have the files
        monkeypatch.setattr(ParquetStore, "path", lambda *_: str(tmp_path / "absent"))
    server = DataServer(Catalogue(ParquetStore(tmp_path)), ADMIN, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.port}"
    with FlightDataClient(address, ADMIN) as client:
        numbers = pa.table({"value": range(10)})
        client.push(numbers.schema, numbers.to_batches(), "numbers")
        images = images_table()
        client.push(images.schema, images.to_batches(), "images")
    yield address
    use_source(None)
    server.shutdown()


def images_table() -> pa.Table:
    from PIL import Image

    rows = []
    for shade in range(4):
        file = io.BytesIO()
        Image.fromarray(np.full((3, 5), shade, np.uint8)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    features = (
        '{"info": {"features": {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}}'
    )
    schema = pa.schema([("image", image.type), ("label", pa.int64())], metadata={"huggingface": features})
    return pa.table([image, pa.array(range(4), pa.int64())], schema=schema)


def use(address: str, *tags: str, part: int = 0, parts: int = 1, token: str = ADMIN) -> None:
    use_source(DataSource(address, token, tags, part, parts, "node-1"))


def test_a_table_has_the_rows_of_the_tags(address: str) -> None:
    use(address, "numbers")
    assert sorted(load_table().column("value").to_pylist()) == list(range(10))
    assert rows_loaded() == 10


def test_parts_are_disjoint_and_cover_all(address: str) -> None:
    found: list[int] = []
    for part in range(3):
        use(address, "numbers", part=part, parts=3)
        found += load_table().column("value").to_pylist()
    assert sorted(found) == list(range(10))


def test_a_token_for_the_tag_is_enough(address: str) -> None:
    token = mint_token(ADMIN, Scope(Right.READ, ("numbers",)))
    use(address, "numbers", token=token)
    assert load_table().num_rows == 10
    use(address, "images", token=token)
    with pytest.raises(FlopsError) as caught:
        load_table()
    assert caught.value.code is ErrorCode.FORBIDDEN


@pytest.mark.parametrize(("tags", "part", "parts"), [(("letters",), 0, 1), (("numbers",), 40, 41)])
def test_no_rows_are_an_error_that_names_node_and_tag(
    address: str, tags: tuple[str, ...], part: int, parts: int
) -> None:
    use(address, *tags, part=part, parts=parts)
    with pytest.raises(FlopsError) as caught:
        load_table()
    assert caught.value.code is ErrorCode.NO_MATCHING_DATA
    assert f"node-1 holds no rows with the data tags {tags[0]}" in caught.value.message


def test_a_server_that_is_away_is_told() -> None:
    use("127.0.0.1:1", "numbers")
    with pytest.raises(FlopsError) as caught:
        load_table()
    use_source(None)
    assert caught.value.code is ErrorCode.UNREACHABLE


def test_another_servers_address_is_told_as_one_that_does_not_answer(address: str) -> None:
    use(address, "numbers", token=mint_token("that of another server", Scope(Right.READ, ("numbers",))))
    with pytest.raises(FlopsError) as caught:
        load_table()
    assert caught.value.code is ErrorCode.UNREACHABLE
    assert address in caught.value.message


def test_outside_of_a_learner_there_is_no_data() -> None:
    use_source(None)
    with pytest.raises(FlopsError) as caught:
        load_table()
    assert caught.value.code is ErrorCode.USAGE


def test_a_dataset_has_the_features_the_data_was_sent_with(address: str) -> None:
    use(address, "images")
    dataset = load_dataset()
    assert dataset.format["type"] == "arrow"
    assert type(dataset.features["image"]).__name__ == "Image"
    pictures = dataset.with_format("numpy")[:]["image"]
    assert np.asarray(pictures).shape == (4, 3, 5)


def test_a_datasets_column_is_a_whole_array_as_repositories_of_the_ancestor_expect(address: str) -> None:
    use(address, "images")
    dataset = load_dataset()
    dataset.set_format("numpy")
    assert dataset["image"].reshape((len(dataset), -1)).shape == (4, 15)
    assert list(dataset["label"]) == [0, 1, 2, 3]
    halves = dataset.train_test_split(test_size=0.5, seed=42)
    assert len(halves["train"]) == 2


class ServerThatGivesNoRows(DataServer):
    """Says where they are, but sends none."""

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.FlightDataStream:
        raise flight.FlightServerError("The rows were not to come through the server.")


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    catalogue = Catalogue(ParquetStore(tmp_path))
    for start, name in ((0, "a"), (7, "b")):
        upload = catalogue.open_upload(UploadName("numbers", name), pa.schema({"value": pa.int64()}))
        upload.write(pa.record_batch({"value": range(start, start + 7)}))
        upload.seal()
        upload.commit()
    return catalogue


def test_rows_come_from_the_files_where_they_can_be_opened(catalogue: Catalogue) -> None:
    with ServerThatGivesNoRows(catalogue, ADMIN, "127.0.0.1", 0) as server:
        for part in range(2):
            use(f"127.0.0.1:{server.port}", "numbers", part=part, parts=2)
            _, batches = catalogue.read(Query(("numbers",), part, 2))
            assert load_table().equals(pa.Table.from_batches(batches))
        use_source(None)


def test_a_damaged_file_is_set_aside_by_the_server_and_the_rest_is_read(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    (path,) = tmp_path.glob("tags/numbers/*.b.parquet")
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with DataServer(catalogue, ADMIN, "127.0.0.1", 0) as server:
        use(f"127.0.0.1:{server.port}", "numbers")
        assert load_table()["value"].to_pylist() == list(range(7))
        use_source(None)
    assert [damage.name for damage in catalogue.describe("numbers").damaged] == [path.name]
