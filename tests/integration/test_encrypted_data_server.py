"""The ML data server of a node that joined a cluster that encrypts: a real process, and who is refused."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import flight

from flops.adapters.certificates import FileAuthority
from flops.cli.flops import main
from flops.data import DataClient
from flops.errors import CATALOGUE, ErrorCode, FlopsError
from flops.testing.data_server import ServerProcess
from flops.wire.flight import Right, Scope, mint_token
from flops.wire.server_trust import ServerTrust, split_trust, with_trust
from flops_utils.local_data import DataSource, use_source
from flops_utils.ml_repo_building_blocks import load_table

pytestmark = pytest.mark.timeout(120)
ROWS = pa.table({"a": list(range(40))})


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> FileAuthority:
    return FileAuthority(tmp_path_factory.mktemp("authority") / "authority.pem", time.time())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, authority: FileAuthority) -> Iterator[ServerProcess]:
    server = ServerProcess(tmp_path_factory.mktemp("node") / "dataserver")
    server.encrypt(authority, time.time())
    server.start()
    yield server
    server.close()


def token_for(server: ServerProcess, right: Right, trust: ServerTrust | None) -> str:
    admin, _ = split_trust(server.token)
    return with_trust(mint_token(admin, Scope(right, ("t",))), trust)


def refused(code: ErrorCode, action: Callable[[], object]) -> FlopsError:
    with pytest.raises(FlopsError) as caught:
        action()
    assert caught.value.code is code, caught.value
    return caught.value


def test_a_device_sends_by_its_token_and_a_learner_reads_by_its_own(server: ServerProcess) -> None:
    with DataClient(server.address, token_for(server, Right.WRITE, server.trust)) as device:
        assert device.push(ROWS, "t").fragment.rows == 40
        refused(ErrorCode.FORBIDDEN, lambda: device.read("t"))
    use_source(DataSource(server.address, token_for(server, Right.READ, server.trust), ("t",)))
    try:
        assert load_table().num_rows == 40
    finally:
        use_source(None)


def test_a_device_without_flops_sends_by_the_same_token(server: ServerProcess) -> None:
    token = token_for(server, Right.WRITE, server.trust)
    trust = json.loads(base64.urlsafe_b64decode(token.split("~")[1] + "=="))
    client = flight.FlightClient(
        f"grpc+tls://{server.address}",
        tls_root_certs=trust["authority"],
        override_hostname=trust["name"],
    )
    options = flight.FlightCallOptions(headers=[(b"authorization", b"Bearer " + token.encode())])
    rows = pa.table({"a": [-1, -2]})
    writer, _ = client.do_put(flight.FlightDescriptor.for_path("t.plain.parquet"), rows.schema, options)
    writer.write_table(rows)
    writer.close()
    client.close()
    with server.client() as admin:
        assert "plain" in {fragment.id for fragment in admin.describe("t").fragments}


def test_commands_on_the_node_find_it_and_make_whole_tokens(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = str(server.folder.parent)
    (tmp_path / "rows.csv").write_text("a\n1\n2\n")
    assert main(["data", "push", str(tmp_path / "rows.csv"), "--tag", "u", "--home", home]) == 0
    capsys.readouterr()
    assert main(["data", "token", "--tag", "u", "--home", home]) == 0
    token = capsys.readouterr().out.strip()
    assert split_trust(token)[1] == server.trust
    (tmp_path / "device.token").write_text(f"{token}\n")
    elsewhere = ["--server", server.address, "--token-file", str(tmp_path / "device.token")]
    assert main(["data", "push", str(tmp_path / "rows.csv"), "--tag", "u", "--name", "b", *elsewhere]) == 0
    narrower = ["--token-file", str(tmp_path / "device.token"), "--home", str(tmp_path)]
    capsys.readouterr()
    assert main(["data", "token", *narrower]) == 0  # what the server is known by is handed on
    assert split_trust(capsys.readouterr().out.strip())[1] == server.trust
    (tmp_path / "device.token").write_text(f"{token[:-40]}\n")
    half = main(["data", "push", str(tmp_path / "rows.csv"), "--tag", "u", *elsewhere])
    assert half == CATALOGUE[ErrorCode.UNAUTHENTICATED].exit_code
    assert "not whole" in capsys.readouterr().err


def test_a_server_that_is_not_the_one_of_the_token_is_told_nothing(
    server: ServerProcess, authority: FileAuthority, tmp_path: Path
) -> None:
    assert server.trust is not None
    strangers = (
        ServerTrust("n2.data.flops.internal", server.trust.authority),  # another node of the same cluster
        ServerTrust(server.trust.name, FileAuthority(tmp_path / "other.pem", time.time()).pem),
    )
    for trust in strangers:
        with DataClient(server.address, token_for(server, Right.WRITE, trust)) as device:
            error = refused(ErrorCode.CERTIFICATE_REFUSED, lambda: device.push(ROWS, "stranger"))
            assert "flops data token" in error.hint
    with server.client() as admin:
        assert "stranger" not in {tag.name for tag in admin.tags()}


def test_a_wrong_token_is_refused_over_tls_too(server: ServerProcess) -> None:
    wrong = with_trust(mint_token("guessed", Scope(Right.WRITE, ("t",))), server.trust)
    with DataClient(server.address, wrong) as device:
        refused(ErrorCode.UNAUTHENTICATED, lambda: device.push(ROWS, "t"))


def test_who_speaks_the_other_way_is_told(server: ServerProcess, tmp_path: Path) -> None:
    with DataClient(server.address, token_for(server, Right.WRITE, None)) as device:
        error = refused(ErrorCode.ENCRYPTION_MISMATCH, lambda: device.push(ROWS, "t"))
        assert "encrypts" in error.message
    plain = ServerProcess(tmp_path / "dataserver")
    plain.start()
    try:
        with DataClient(plain.address, token_for(plain, Right.WRITE, server.trust)) as device:
            error = refused(ErrorCode.ENCRYPTION_MISMATCH, lambda: device.push(ROWS, "t"))
            assert "does not encrypt" in error.message
    finally:
        plain.close()


def test_without_its_certificate_it_does_not_start(tmp_path: Path, authority: FileAuthority) -> None:
    server = ServerProcess(tmp_path / "dataserver")
    server.encrypt(authority, time.time())
    identity = server.folder / "identity.pem"
    identity.write_text(identity.read_text()[:100])
    argv = [sys.executable, "-m", "flops.wiring", "data-server", "--dir", str(server.folder), "--port", "0"]
    ended = subprocess.run([*argv, "--identity", str(identity)], capture_output=True, text=True, check=False)
    assert ended.returncode == CATALOGUE[ErrorCode.CONFIG_CORRUPT].exit_code
    assert str(identity) in ended.stderr
    assert "Traceback" not in ended.stderr
