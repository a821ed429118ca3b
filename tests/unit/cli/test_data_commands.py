"""``flops data`` against a real data server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flops.adapters.memory_fragments import MemoryFragments
from flops.adapters.system_clock import SystemClock
from flops.cli.data_commands import data
from flops.cli.output import run_app
from flops.dataserver.catalogue import Catalogue
from flops.dataserver.endpoint import admin_token, announced
from flops.dataserver.server import DataServer
from flops.errors import CATALOGUE, ErrorCode

Run = Callable[..., int]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "node" / "dataserver"
    folder.mkdir(parents=True)
    catalogue = Catalogue(MemoryFragments(SystemClock()))
    with (
        DataServer(catalogue, admin_token(folder), "127.0.0.1", 0) as server,
        announced(folder, "127.0.0.1", server.port),
    ):
        yield tmp_path / "node"


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Run:
    def run_(*arguments: object, node: Path = home) -> int:
        argv = [*map(str, arguments), "--home", str(node)]
        return run_app(data, argv, prog_name="flops data", log_folder=tmp_path)

    return run_


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "label": ["a", "b", "b", None]}), path)
    return path


def envelope(capsys: pytest.CaptureFixture[str], key: str = "data") -> Any:
    raw = json.loads(capsys.readouterr().out)
    assert raw.keys() == {"schema_version", key}
    return raw[key]


def test_push_list_describe_read_drop(
    run: Run, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("push", file, "--tag", "t") == 0
    captured = capsys.readouterr()
    assert len(captured.out.strip()) == 64
    assert "4 rows" in captured.err
    assert run("push", file, "-t", "t", "--format", "json") == 0
    assert envelope(capsys)["is_new"] is False
    assert run("list", "--format", "json") == 0
    (tag,) = envelope(capsys)
    assert (tag["name"], tag["rows"], tag["columns"]) == ("t", 4, {"n": "int64", "label": "string"})
    assert run("list") == 0
    assert "n (int64), label (string)" in capsys.readouterr().out
    assert run("describe", "t", "--statistics") == 0
    shown = capsys.readouterr().out
    assert "a: 1, b: 2" in shown
    assert "2.5" in shown
    assert run("describe", "t", "--format", "json") == 0
    assert envelope(capsys)["statistics"] is None
    output = tmp_path / "out.parquet"
    assert run("read", "t", "-o", output, "--part", "1", "--parts", "2", "--format", "json") == 0
    assert envelope(capsys) == {"file": str(output), "rows": 2}
    assert pq.read_table(output)["n"].to_pylist() == [2, 4]
    assert run("drop", "t", "--format", "json") == 0
    assert envelope(capsys) == {"tag": "t", "name": ""}
    assert run("list") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "The node has no data.\n")


def test_names_limits_and_dropping_one(run: Run, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("push", file, "-t", "t", "--name", "first") == 0
    assert run("quota", "t", "--max-rows", 5) == 0
    assert "5 rows" in capsys.readouterr().out
    other = file.with_name("y.parquet")
    pq.write_table(pa.table({"n": [7, 8], "label": ["a", "b"]}), other)
    assert run("push", other, "-t", "t") == CATALOGUE[ErrorCode.QUOTA_EXCEEDED].exit_code
    assert run("retain", "t", "--max-rows", 3, "--format", "json") == 0
    capsys.readouterr()
    assert run("push", other, "-t", "t", "--name", "second") == 0
    assert "1 older uploads" in capsys.readouterr().err
    assert run("drop", "t", "--name", "second") == 0
    assert run("drop", "t", "--name", "second") == CATALOGUE[ErrorCode.FRAGMENT_NOT_FOUND].exit_code
    capsys.readouterr()
    assert run("describe", "t", "--format", "json") == 0
    limits = envelope(capsys)["limits"]
    assert (limits["quota"]["max_rows"], limits["retention"]["max_rows"]) == (5, 3)


def test_a_token_for_a_device(
    run: Run, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("token", "--tag", "t") == 0
    token = tmp_path / "device.token"
    token.write_text(capsys.readouterr().out)
    assert run("push", file, "-t", "t", "--token-file", token) == 0
    capsys.readouterr()
    assert run("push", file, "-t", "u", "--token-file", token, "--format", "json") == 6
    assert envelope(capsys, "error")["code"] == "forbidden"
    assert run("token", "--tag", "a.b") == CATALOGUE[ErrorCode.TAG_INVALID].exit_code


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("push", "nope.parquet", "-t", "t"), ErrorCode.FILE_UNREADABLE),
        (("describe", "nope"), ErrorCode.TAG_NOT_FOUND),
        (("read", "nope", "-o", "x.parquet"), ErrorCode.TAG_NOT_FOUND),
        (("drop", "a.b"), ErrorCode.TAG_INVALID),
        (("list", "--token-file", "nope"), ErrorCode.FILE_UNREADABLE),
        (("list", "--server", "127.0.0.1:9"), ErrorCode.UNREACHABLE),
        (("quota", "t", "--max-rows", "0"), ErrorCode.USAGE),
        (("push",), ErrorCode.USAGE),
    ],
)
def test_what_goes_wrong_is_told(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: ErrorCode
) -> None:
    assert run(*arguments, "--format", "json") == CATALOGUE[code].exit_code
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == code.value
    assert "Traceback" not in captured.err


def test_a_wrong_token_is_told(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t").write_text("wrong")
    assert run("list", "--token-file", tmp_path / "t") == CATALOGUE[ErrorCode.UNAUTHENTICATED].exit_code
    assert "wrong" not in capsys.readouterr().err


def test_a_node_without_a_server_is_told(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list", node=tmp_path / "other") == CATALOGUE[ErrorCode.UNREACHABLE].exit_code
    told = capsys.readouterr().err
    assert str(tmp_path / "other" / "dataserver") in told
    assert "NodeEngine config addon FLOps-learner on" in told
