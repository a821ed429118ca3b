from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flops import __version__
from flops.cli.cluster_commands import dataset_file
from flops.core.cluster import ServiceState
from flops.core.ids import ServiceId
from flops.errors import CATALOGUE, ErrorCode, FlopsError
from flops.testing.projects import node_with

from .conftest import Flops, Manager


def write_sla(folder: Path, **configuration: Any) -> Path:
    path = folder / "mock.json"
    path.write_text(json.dumps({"mock_data_configuration": {"data_tag": "mnist", **configuration}}))
    return path


def exit_code(code: ErrorCode) -> int:
    return CATALOGUE[code].exit_code


def test_nodes_are_listed_with_addons_and_tags(flops: Flops) -> None:
    outcome = flops("node", "list")
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["node", "cluster", "state", "health", "addons", "data", "tags", "machine"]
    assert "FLOps-learner (healthy), image-builder (healthy)" in lines[1]
    assert "mnist (100 rows)" in lines[1]
    assert [node["name"] for node in flops("node", "list", "--format", "json").data] == ["alpha", "beta"]


def test_a_node_that_is_gone_is_removed(flops: Flops, manager: Manager) -> None:
    refused = flops("node", "remove", "alpha", "--format", "json")
    assert refused.exit_code == exit_code(ErrorCode.CONFLICT)
    assert "NodeEngine stop" in refused.error["hint"]
    (alpha,) = (node for node in manager.cluster.orchestrator.nodes() if node.name == "alpha")
    manager.cluster.orchestrator.leave(alpha.id)
    assert flops("node", "remove", "alpha").err == f"Node alpha ({alpha.id}) was removed.\n"
    assert [node["name"] for node in flops("node", "list", "--format", "json").data] == ["beta"]
    missing = flops("node", "remove", "alpha", "--force")
    assert missing.exit_code == exit_code(ErrorCode.NODE_NOT_FOUND)


def test_a_sick_node_is_listed_as_sick_and_shown_with_what_to_do(flops: Flops, manager: Manager) -> None:
    cluster = manager.cluster
    (alpha,) = (node for node in cluster.orchestrator.nodes() if node.name == "alpha")
    cluster.orchestrator.join(alpha.model_copy(update={"clock_skew_s": 12.0}))
    listed = {node["name"]: node["health"] for node in flops("node", "list", "--format", "json").data}
    assert (listed["alpha"]["severity"], listed["alpha"]["findings"][0]["check"]) == ("warning", "clock")
    assert listed["beta"]["severity"] in {"ok", "info"}
    lines = flops("node", "list").out.splitlines()
    assert "🟡 Its clock is 12.0 s ahead of the control plane's." in lines[1]
    assert "🟢" in lines[2]
    shown = flops("node", "show", "alpha")
    assert "12.0 s ahead" in shown.out
    assert "NTP" in shown.out
    assert flops("node", "show", alpha.id, "--format", "json").data["name"] == "alpha"
    missing = flops("node", "show", "gamma", "--format", "json")
    assert missing.exit_code == exit_code(ErrorCode.NODE_NOT_FOUND)
    assert "alpha, beta" in missing.error["message"]


def test_status_and_tracking(flops: Flops, manager: Manager) -> None:
    shown = flops("status")
    assert f"http://127.0.0.1:{manager.port}, running since" in shown.out
    assert "http://mlflow.example, not ready yet" in shown.out
    assert flops("status", "--format", "json").data["nodes_connected"] == 2
    assert flops("tracking").out == "http://mlflow.example\n"
    assert flops("t", "--customer-id", "x").out == "http://mlflow.example\n"
    data = flops("tracking", "--format", "json").data
    assert data == {"tracking_server_url": "http://mlflow.example"}


@pytest.mark.parametrize("group", ["project", "mock-data", "model"])
def test_empty_lists_say_so_and_are_empty_in_json(flops: Flops, group: str) -> None:
    outcome = flops(group, "list")
    assert (outcome.exit_code, outcome.out) == (0, "")
    assert outcome.err.strip()
    assert flops(group, "list", "--format", "json").data == []


def test_mock_data_is_watched_until_it_is_stored(flops: Flops, manager: Manager, tmp_path: Path) -> None:
    cluster = manager.cluster

    def play() -> None:
        for _ in range(2_000):
            services = cluster.orchestrator.services()
            if len(services) == 2:
                break
            threading.Event().wait(0.005)
        for service in services:
            service_id = ServiceId(service.spec.id)
            cluster.orchestrator.report(service_id, ServiceState.RUNNING)
            cluster.orchestrator.tell(service_id, "data_pushed", data_tag="mnist", partition=0, rows=4_500)
            cluster.orchestrator.report(service_id, ServiceState.COMPLETED, exit_code=0)
        threading.Event().wait(0.5)
        for name in ("alpha", "beta"):
            cluster.orchestrator.join(node_with(name, rows=4_500))

    thread = threading.Thread(target=play)
    thread.start()
    outcome = flops("mock-data", "create", write_sla(tmp_path, number_of_partitions=2), "--watch")
    thread.join(20)
    assert outcome.exit_code == 0, outcome.err
    assert len(outcome.out.split()) == 1
    assert "Completed: 9,000 rows are stored on alpha, beta." in outcome.err
    assert flops("mock_data", "list", "--format", "json").data[0]["state"] == "completed"
    assert "9,000" in flops("m", "list").out


def test_a_failed_provider_is_a_failure(flops: Flops, manager: Manager, tmp_path: Path) -> None:
    cluster = manager.cluster
    mock_id = flops("mock-data", "create", write_sla(tmp_path)).out.strip()
    (service,) = cluster.orchestrator.services(mock_id)
    error = FlopsError(ErrorCode.DATASET_UNKNOWN, "The hub has no dataset 'mnist'.")
    cluster.orchestrator.tell(ServiceId(service.spec.id), "failed", error=error.to_dict())
    for _ in range(1_000):
        if flops("mock-data", "list", "--format", "json").data[0]["failure"]:
            break
    data = flops("mock-data", "list", "--format", "json").data
    assert data[0]["failure"]["code"] == "dataset_unknown"


def test_a_file_is_sent_along_as_a_blob(flops: Flops, manager: Manager, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "my rows.parquet"
    pq.write_table(pa.table({"x": list(range(1_000)), "label": [0, 1] * 500}), file)
    sla = write_sla(tmp_path, dataset_name="data/my rows.parquet")
    created = flops("mock-data", "create", sla, "--format", "json").data
    (record,) = flops("mock-data", "list", "--format", "json").data
    assert record["id"] == created["mock_data_id"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["dataset_blob"] == digest
    assert record["sla"]["mock_data_configuration"]["dataset_name"] == "my rows.parquet"
    assert manager.cluster.blobs.get(digest) == file.read_bytes()  # type: ignore[arg-type]


def test_names_of_datasets_are_told_from_files(tmp_path: Path) -> None:
    assert dataset_file("mnist", tmp_path) is None
    assert dataset_file("someone/dataset", tmp_path) is None
    (tmp_path / "mnist").touch()
    assert dataset_file("mnist", tmp_path) == tmp_path / "mnist"
    for name in ("missing.csv", "./missing", "/nowhere/missing"):
        with pytest.raises(FlopsError, match="there is no file") as raised:
            dataset_file(name, tmp_path)
        assert raised.value.code is ErrorCode.FILE_UNREADABLE


def test_a_project_without_a_served_model_cannot_be_asked(flops: Flops, tmp_path: Path) -> None:
    from flops.testing.projects import raw_sla

    sla = tmp_path / "sla.json"
    sla.write_text(json.dumps(raw_sla()))
    project_id = flops("project", "create", sla).out.strip()
    outcome = flops("model", "predict", project_id, tmp_path / "rows.csv")
    assert outcome.exit_code == exit_code(ErrorCode.MODEL_NOT_FOUND)
    assert "serves no model" in outcome.err
    refused = flops("reset-database", "--format", "json")
    assert refused.error["code"] == "conflict"
    assert flops("reset-database", "--force").exit_code == 0
    assert flops("project", "list", "--format", "json").data == []


def test_administration(flops: Flops) -> None:
    assert "Successfully reset the database" in flops("redb").err
    assert "Successfully cleared" in flops("clear-registry", "--format", "json").data["message"]


def test_the_manager_is_named_by_the_environment(
    command: Flops, manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret-token")
    monkeypatch.setenv("FLOPS_URL", f"http://127.0.0.1:{manager.port}/")
    monkeypatch.setenv("FLOPS_TOKEN_FILE", str(token))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert command("node", "list").exit_code == 0
    token.write_text("wrong")
    wrong = command("node", "list", "--format", "json")
    assert wrong.error["code"] == "unauthenticated"
    assert "s3cret" not in wrong.out + wrong.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], "unreachable", "flops up"),
        (["--url", "http://127.0.0.1:9", "--token-file", "TOKEN"], "unreachable", "does not answer"),
        (["--url", "ftp://x", "--token-file", "TOKEN"], "usage", "no URL of a manager"),
        (["--url", "http://x:y", "--token-file", "TOKEN"], "usage", "no URL"),
        (["--url", "http://127.0.0.1:9", "--token-file", "/nowhere"], "file_unreadable", "/nowhere"),
        (["--url", "http://127.0.0.1:9", "--token-file", "EMPTY"], "file_unreadable", "holds no token"),
    ],
)
def test_a_manager_that_cannot_be_asked(
    command: Flops, tmp_path: Path, arguments: list[str], code: str, text: str
) -> None:
    (tmp_path / "TOKEN").write_text("token")
    (tmp_path / "EMPTY").write_text("")
    given = [str(tmp_path / item) if item in {"TOKEN", "EMPTY"} else item for item in arguments]
    outcome = command(*given, "project", "list", "--format", "json")
    assert outcome.error["code"] == code
    assert text in outcome.err
    assert outcome.exit_code == exit_code(ErrorCode(code))


def test_something_else_on_the_port_is_told(command: Flops, tmp_path: Path) -> None:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from flops.adapters.http_server import HttpServer

    async def answer(_: Any) -> PlainTextResponse:
        return PlainTextResponse("hello")

    server = HttpServer(Starlette(routes=[Route("/api/flops/nodes", answer)]), "127.0.0.1", 0)
    server.start()
    (tmp_path / "token").write_text("token")
    options = ["--url", f"http://127.0.0.1:{server.port}", "--token-file", tmp_path / "token"]
    try:
        for arguments in (["node", "list"], ["project", "watch", "x"]):
            outcome = command(*options, *arguments)
            assert outcome.exit_code == exit_code(ErrorCode.UNREACHABLE)
            assert "no FLOps manager" in outcome.err
    finally:
        server.close()


def test_version(command: Flops) -> None:
    assert command("--version").out == f"{__version__}\n"
    assert command("version").out == f"{__version__}\n"
    assert command("version", "--format", "json").data == {"version": __version__}


def test_a_setting_out_of_range_is_named(command: Flops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOPS_MANAGER_PORT", "99999")
    outcome = command("up")
    assert outcome.exit_code == exit_code(ErrorCode.CONFIG_INVALID)
    assert "FLOPS_MANAGER_PORT is '99999'" in outcome.err


def test_without_a_command_the_help_is_shown(command: Flops) -> None:
    outcome = command()
    assert outcome.exit_code == exit_code(ErrorCode.USAGE)
    assert "Usage: flops" in outcome.out


def test_completion_knows_the_commands(tmp_path: Path) -> None:
    flops = Path(sys.executable).parent / "flops"
    environment = {**os.environ, "HOME": str(tmp_path)}
    script = subprocess.run(
        [flops, "--show-completion", "bash"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "_FLOPS_COMPLETE=complete_bash" in script
    asking = {**environment, "_FLOPS_COMPLETE": "complete_bash", "COMP_WORDS": "flops pro", "COMP_CWORD": "1"}
    words = subprocess.run([flops], env=asking, capture_output=True, text=True, check=False).stdout
    assert words.split() == ["project"]


def test_help_loads_no_heavy_library() -> None:
    program = (
        "import sys; from flops.cli.flops import main; main(['--help']);"
        "heavy = {'pydantic', 'httpx', 'pyarrow', 'numpy', 'mlflow', 'flwr', 'sqlalchemy', 'psutil'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=True)
