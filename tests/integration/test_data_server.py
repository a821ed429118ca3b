"""The ML data server as a process: uploads, reads, rights, kills; also by plain Arrow Flight clients."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from flops.data import DataClient
from flops.errors import ErrorCode, FlopsError
from flops.testing import waiting
from flops.testing.data_server import DEADLINE_S, ServerProcess
from flops.testing.network import missing_for_networks, network
from flops.wire.flight import Right, Scope, bearer, criteria_for, mint_token, parse_error

TABLE = pa.table({"n": range(1_000), "s": ["x"] * 1_000})


until = functools.partial(waiting.until, timeout_s=DEADLINE_S)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path / "dataserver")
    process.start()
    yield process
    process.close()


def plain(
    server: ServerProcess, token: str | None = None
) -> tuple[flight.FlightClient, flight.FlightCallOptions]:
    options = flight.FlightCallOptions(headers=[bearer(token or server.token)])
    return flight.FlightClient(f"grpc://{server.address}"), options


def code_of(error: pytest.ExceptionInfo[Exception]) -> ErrorCode:
    found = parse_error(str(error.value))
    assert found is not None
    return found.code


def test_a_day_of_a_server(server: ServerProcess) -> None:
    assert (server.folder / "token").stat().st_mode & 0o777 == 0o600
    with server.client() as client:
        assert client.tags() == []
        assert client.push(TABLE, "t").is_new
        assert not client.push(TABLE, "t").is_new
        assert client.read("t").equals(TABLE)
        parts = [client.read("t", part=part, parts=3)["n"].to_pylist() for part in range(3)]
        assert sorted(n for part in parts for n in part) == list(range(1_000))
        client.limit("t", max_rows=1_500)
        with pytest.raises(FlopsError) as caught:
            client.push(TABLE.slice(1), "t")
        assert caught.value.code is ErrorCode.QUOTA_EXCEEDED
        client.retain("t", max_rows=1_200)
        assert client.push(TABLE.slice(1), "t", name="second").dropped == 1
        description = client.describe("t", is_with_statistics=True)
        assert [fragment.id for fragment in description.fragments] == ["second"]
        assert description.statistics is not None
        assert description.statistics["s"].counts == {"x": 999}
        client.drop("t", "second")
        assert client.tags() == []
    token = server.token
    assert server.end() == 0
    assert not (server.folder / "endpoint.json").exists()
    assert server.files() == ["limits.json"]
    server.start()
    assert server.token == token
    assert server.end(signal.SIGINT) == 0


def test_clients_of_the_ancestor_work(server: ServerProcess) -> None:
    with plain(server)[0] as client:
        options = plain(server)[1]
        name = "mnist.d41d8cd98f00b204e9800998ecf8427e.parquet"
        writer, _ = client.do_put(flight.FlightDescriptor.for_path(name), TABLE.schema, options)
        writer.write_table(TABLE)
        writer.close()
        for criteria in (b'{"data_tags": ["mnist"]}', b'{"data_tags": "mnist"}', b""):
            (info,) = client.list_flights(criteria, options)
            assert info.descriptor.path == [name.encode()]
            assert info.total_records == 1_000
            assert info.schema.equals(TABLE.schema)
            assert client.do_get(info.endpoints[0].ticket, options).read_all().equals(TABLE)
        assert list(client.list_flights(criteria_for(["nist"]), options)) == []
        of_tag = client.get_flight_info(flight.FlightDescriptor.for_path("mnist"), options)
        assert of_tag.total_records == 1_000
        assert client.do_get(of_tag.endpoints[0].ticket, options).read_all().equals(TABLE)
        assert client.get_flight_info(flight.FlightDescriptor.for_path(name), options).total_records == 1_000
        assert client.get_schema(flight.FlightDescriptor.for_path(name), options).schema == TABLE.schema
        assert "drop_dataset" in {action.type for action in client.list_actions(options)}
        list(client.do_action(flight.Action("drop_dataset", name.encode()), options))
        assert list(client.list_flights(b"", options)) == []


@pytest.mark.parametrize(
    "name", ["../../x.y.parquet", "/etc/passwd", "t.../x.parquet", "a.b.c.parquet", "", "ü"]
)
def test_no_name_leads_elsewhere(server: ServerProcess, name: str) -> None:
    client, options = plain(server)
    descriptor = flight.FlightDescriptor.for_path(name)
    writer, _ = client.do_put(descriptor, TABLE.schema, options)
    with pytest.raises(flight.FlightError) as caught:
        _write(writer, TABLE)
    assert code_of(caught) in {ErrorCode.NAME_INVALID, ErrorCode.TAG_INVALID}
    for call in (
        lambda: client.do_get(flight.Ticket(name.encode()), options).read_all(),
        lambda: client.get_flight_info(descriptor, options),
        lambda: list(client.do_action(flight.Action("drop_dataset", name.encode()), options)),
    ):
        with pytest.raises(flight.FlightError) as caught:
            call()
        assert code_of(caught) in {ErrorCode.NAME_INVALID, ErrorCode.TAG_INVALID}
    client.close()
    assert server.files() == []


def _write(writer: flight.FlightStreamWriter, table: pa.Table) -> None:
    try:
        writer.write_table(table)
    finally:
        writer.close()


def test_every_call_needs_a_token_that_is_good_for_it(server: ServerProcess) -> None:
    with server.client() as admin:
        admin.push(TABLE, "t")
        admin.push(TABLE, "u")
    reader = mint_token(server.token, Scope(Right.READ, ("t",)))
    writer = mint_token(server.token, Scope(Right.WRITE, ("t",)))
    with server.client(reader) as client:
        assert [tag.name for tag in client.tags()] == ["t"]
        assert client.read("t").num_rows == 1_000
        assert client.describe("t").tag.rows == 1_000
    listing, options = plain(server, reader)
    assert [info.descriptor.path[0][:2] for info in listing.list_flights(b"", options)] == [b"t."]
    listing.close()
    with server.client(writer) as client:
        assert not client.push(TABLE, "t").is_new
    refused: list[tuple[str, Callable[[DataClient], object]]] = [
        (reader, lambda client: client.read("t", "u")),
        (reader, lambda client: client.describe("u")),
        (reader, lambda client: client.push(TABLE, "t")),
        (reader, lambda client: client.drop("t")),
        (writer, lambda client: client.read("t")),
        (writer, lambda client: client.tags()),
        (writer, lambda client: client.push(TABLE, "u")),
        (writer, lambda client: client.limit("t", max_rows=1)),
        (writer, lambda client: client.retain("t", max_rows=1)),
    ]
    for token, call in refused:
        with server.client(token) as client, pytest.raises(FlopsError) as caught:
            call(client)
        assert caught.value.code is ErrorCode.FORBIDDEN


def test_without_a_token_there_is_no_call(server: ServerProcess) -> None:
    with flight.FlightClient(f"grpc://{server.address}") as client:
        descriptor = flight.FlightDescriptor.for_path("t")
        for call in (
            lambda: list(client.list_flights()),
            lambda: list(client.list_actions()),
            lambda: list(client.do_action("status")),
            lambda: client.get_flight_info(descriptor),
            lambda: client.get_schema(descriptor),
            lambda: client.do_get(flight.Ticket(b'{"data_tags": ["t"]}')).read_all(),
            lambda: _write(client.do_put(descriptor, TABLE.schema)[0], TABLE),
        ):
            # pyarrow raises OSError for get_schema.
            with pytest.raises((flight.FlightUnauthenticatedError, OSError)) as caught:
                call()
            assert code_of(caught) is ErrorCode.UNAUTHENTICATED


def test_wrong_requests_are_told_apart(server: ServerProcess) -> None:
    client, options = plain(server)
    for action, code in (
        (flight.Action("nonsense", b""), ErrorCode.USAGE),
        (flight.Action("describe", b"{"), ErrorCode.USAGE),
        (flight.Action("describe", b"{}"), ErrorCode.TAG_INVALID),
        (flight.Action("describe", b'{"tag": "t"}'), ErrorCode.TAG_NOT_FOUND),
        (flight.Action("set_quota", b'{"tag": "t", "max_rows": 0}'), ErrorCode.USAGE),
        (flight.Action("set_retention", b'{"tag": "t", "max_bytes": "x"}'), ErrorCode.USAGE),
        (flight.Action("drop_fragment", b'{"name": "t.x.parquet"}'), ErrorCode.FRAGMENT_NOT_FOUND),
        (flight.Action("drop_dataset", b"\xff"), ErrorCode.NAME_INVALID),
    ):
        with pytest.raises(flight.FlightError) as caught:
            list(client.do_action(action, options))
        assert code_of(caught) is code
    for criteria in (b"nonsense", b'{"data_tags": 7}'):
        with pytest.raises(flight.FlightError) as caught:
            list(client.list_flights(criteria, options))
        assert code_of(caught) is ErrorCode.USAGE
    writer, _ = client.do_put(flight.FlightDescriptor.for_command(b"t"), TABLE.schema, options)
    with pytest.raises(flight.FlightError) as caught:
        _write(writer, TABLE)
    assert code_of(caught) is ErrorCode.NAME_INVALID
    client.close()


SENDER = """
import os, sys
import pyarrow as pa
from pyarrow import flight
from flops.wire.flight import SEALED, bearer
address, token, name, is_sealed = sys.argv[1:]
client = flight.FlightClient("grpc://" + address)
options = flight.FlightCallOptions(headers=[bearer(token)])
path = flight.FlightDescriptor.for_path(name, *([SEALED] if is_sealed else []))
table = pa.table({"n": range(100_000)})
writer, _ = client.do_put(path, table.schema, options)
writer.write_table(table)
print("sent", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("is_sealed", ["", "1"])
def test_an_upload_of_a_client_that_dies_leaves_nothing(server: ServerProcess, is_sealed: str) -> None:
    for index in range(3):
        argv = [sys.executable, "-c", SENDER, server.address, server.token, f"t.x{index}.parquet", is_sealed]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sender:
            assert sender.stdout is not None
            assert sender.stdout.readline() == b"sent\n"
            until(lambda: server.files() != [])
            sender.kill()
    until(lambda: server.files() == [])
    with server.client() as client:
        assert client.tags() == []


def test_an_upload_that_its_reader_breaks_off_leaves_nothing(server: ServerProcess) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield TABLE.to_batches()[0]
        raise OSError("the sensor has been unplugged")

    reader = pa.RecordBatchReader.from_batches(TABLE.schema, batches())
    with server.client() as client:
        with pytest.raises(OSError, match="unplugged"):
            client.push(reader, "t")
        until(lambda: server.files() == [])
        assert client.tags() == []


def test_a_client_that_stalls_does_not_keep_the_server_from_ending(server: ServerProcess) -> None:
    client, options = plain(server)
    writer, _ = client.do_put(flight.FlightDescriptor.for_path("t"), TABLE.schema, options)
    writer.write_table(TABLE)
    until(lambda: server.files() != [])
    assert server.end() == 0
    with pytest.raises(pa.ArrowException):
        writer.close()
    client.close()
    server.start()
    assert server.files() == []


def test_a_signal_that_another_thread_gets_ends_the_server(server: ServerProcess) -> None:
    with server.client() as client:
        client.push(TABLE, "t")  # by a thread of its own
    others = [int(path.name) for path in Path(f"/proc/{server.pid}/task").iterdir()]
    others.remove(server.pid)
    assert server.process is not None
    assert ctypes.CDLL(None).tgkill(server.pid, others[-1], signal.SIGTERM) == 0
    assert server.process.wait(DEADLINE_S) == 0


def send_until_it_fails(server_address: str, token: str, first: int, acknowledged: set[int]) -> None:
    """Send uploads of 50 rows each, and note those that the server has acknowledged."""
    with DataClient(server_address, token) as client:
        for number in itertools.count(first):
            try:
                client.push(pa.table({"n": [number] * 50}), "t")
            except FlopsError:
                return
            acknowledged.add(number)


def test_nothing_that_was_acknowledged_is_lost_by_a_kill(server: ServerProcess) -> None:
    acknowledged: set[int] = set()
    for kill in range(3):
        with ThreadPoolExecutor(4) as pool:
            for worker in range(4):
                first = (kill * 4 + worker) * 1_000_000
                pool.submit(send_until_it_fails, server.address, server.token, first, acknowledged)
            enough = len(acknowledged) + 40
            until(lambda enough=enough: len(acknowledged) >= enough)
            server.end(signal.SIGKILL)
        server.start()
        with server.client() as client:
            stored = Counter(client.read("t")["n"].to_pylist())
        assert acknowledged <= stored.keys()
        assert set(stored.values()) == {50}
        assert not [name for name in server.files() if not name.startswith("0")]


def test_many_devices_send_the_same_and_different_things_at_once(server: ServerProcess) -> None:
    def send(index: int) -> bool:
        with server.client() as client:
            return client.push(pa.table({"n": [index % 10] * 1_000}), "t").is_new

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(send, range(40)))
    assert sum(results) == 10
    with server.client() as client:
        assert client.tags()[0].rows == 10_000


def test_memory_does_not_grow_with_what_is_read(server: ServerProcess) -> None:
    import psutil

    with server.client() as client:
        client.push(pa.table({"x": np.random.default_rng(1).random(1_000_000)}), "t")  # 8 MB

        def read(times: int) -> int:
            for _ in range(times):
                _, batches = client.stream("t")
                assert sum(batch.num_rows for batch in batches) == 1_000_000
            return psutil.Process(server.pid).memory_info().rss

        before = read(20)  # what the allocator keeps is there by now
        assert read(100) - before < 64_000_000


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_is_told_and_the_server_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    server = ServerProcess(disk / "dataserver")
    try:
        server.start()
        rng = np.random.default_rng(1)
        with server.client() as client:
            client.push(pa.table({"x": rng.random(200_000)}), "t")
            with pytest.raises(FlopsError) as caught:
                client.push(pa.table({"x": rng.random(2_000_000)}), "t")
            assert caught.value.code is ErrorCode.DISK_FULL
            client.push(pa.table({"x": rng.random(100_000)}), "t")
            assert client.tags()[0].rows == 300_000
        assert len(server.files()) == 2
        server.end()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_taken_port_or_folder_or_a_wrong_host_is_told(server: ServerProcess, tmp_path: Path) -> None:
    base = [sys.executable, "-m", "flops.wiring", "data-server"]
    port = server.address.rpartition(":")[2]
    for options, code, part in (
        (["--dir", str(tmp_path / "other"), "--port", port], ErrorCode.PORT_OCCUPIED, port),
        (["--dir", str(server.folder), "--port", "0"], ErrorCode.ALREADY_RUNNING, str(server.folder)),
        (["--dir", str(tmp_path / "x"), "--port", "0", "--host", "no.such.host.invalid"],
         ErrorCode.CONFIG_INVALID, "no.such.host.invalid"),
    ):  # fmt: skip
        done = subprocess.run(
            [*base, *options], capture_output=True, text=True, check=False, timeout=DEADLINE_S
        )
        assert done.returncode == FlopsError(code, "").spec.exit_code
        assert part in done.stderr
        assert "Traceback" not in done.stderr


ENDLESS_PUSH = """
import itertools, sys, time
import pyarrow as pa
from flops.data import DataClient

def batches():
    for number in itertools.count():
        yield pa.record_batch({"n": range(1_000_000)})
        print("sent", flush=True)
        time.sleep(0.2)

rows = pa.RecordBatchReader.from_batches(pa.schema({"n": pa.int64()}), batches())
DataClient(*sys.argv[1:]).push(rows, "t")
"""


@pytest.mark.root
@pytest.mark.skipif(missing_for_networks() != "", reason=missing_for_networks())
def test_an_upload_over_a_cable_that_is_cut_ends_on_both_sides(tmp_path: Path, server: ServerProcess) -> None:
    server.end()
    with network() as net:
        device = net.add_machine()
        server.start("--host", net.here.address)
        argv = [*device.prefix, sys.executable, "-c", ENDLESS_PUSH, server.address, server.token]
        pushing = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert pushing.stdout is not None
        assert pushing.stdout.readline() == "sent\n"
        until(lambda: server.files() != [])
        with net.cut((device, net.here), (net.here, device)):
            until(lambda: server.files() == [])
            _, errors = pushing.communicate(timeout=DEADLINE_S)
        assert "[unreachable]" in errors
        with server.client() as client:
            assert client.tags() == []
