"""`flops doctor` and the health of nodes, on a deployment that is hurt for real."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flops.adapters.node_link import dial_cluster
from flops.core.cluster import Addon, AddonState, NodeFacts
from flops.errors import CATALOGUE, ErrorCode
from flops.testing.deployment import Deployment, deployed, free_ports
from flops.testing.waiting import until
from flops.wire.node import Hello

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

UNHEALTHY = CATALOGUE[ErrorCode.UNHEALTHY].exit_code
LEARNER = "FLOps-learner"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("doctor")) as deployment:
        deployment.up()
        deployment.start_node("node-1", LEARNER)
        deployment.wait_for_nodes(1)
        deployment.wait_for(lambda: deployment.ask("status")["is_tracking_ready"], "MLflow")
        yield deployment


def examine(deployment: Deployment, *options: str) -> tuple[int, list[dict[str, Any]]]:
    began_s = time.monotonic()
    result = deployment.flops(*options, "doctor", "--format", "json", exit_code=None)
    assert "Traceback" not in result.stderr
    assert time.monotonic() - began_s < 15
    findings: list[dict[str, Any]] = json.loads(result.stdout)["data"]["findings"]
    return result.returncode, findings


def examine_node(deployment: Deployment, name: str = "node-1") -> tuple[int, list[dict[str, Any]]]:
    result = deployment.node(name, "doctor", "--format", "json", exit_code=None)
    assert "Traceback" not in result.stderr
    findings: list[dict[str, Any]] = json.loads(result.stdout)["data"]["findings"]
    return result.returncode, findings


def of(findings: list[dict[str, Any]], check: str, *severities: str) -> list[dict[str, Any]]:
    return [f for f in findings if f["check"] == check and f["severity"] in (severities or {f["severity"]})]


def endpoint(deployment: Deployment) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((deployment.home / "control" / "endpoint.json").read_text())
    return content


def node_pid(deployment: Deployment, name: str = "node-1") -> int:
    status = deployment.node(name, "status", "--format", "json")
    return int(json.loads(status.stdout)["data"]["node"]["pid"])


def health(deployment: Deployment, name: str = "node-1") -> dict[str, Any]:
    """Asked of the manager itself, as often as one likes: the command takes half a second."""
    token = (deployment.home / "control" / "admin.token").read_text().strip()
    url = f"{endpoint(deployment)['manager_url']}/api/flops/nodes"
    nodes = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, trust_env=False).json()["nodes"]
    (found,) = (node["health"] for node in nodes if node["name"].endswith(name))
    assert isinstance(found, dict)
    return found


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_healthy_deployment_has_no_problem(deployment: Deployment) -> None:
    code, findings = examine(deployment)
    assert (code, [f for f in findings if f["severity"] == "problem"]) == (0, [])
    for check, count in (("control plane", 1), ("ports", 3), ("databases", 3), ("MLflow", 1), ("home", 1)):
        assert len(of(findings, check, "ok")) == count, check
    assert of(findings, "data server", "ok")
    assert of(findings, "encryption", "info")
    code, own = examine_node(deployment)
    assert (code, [f for f in own if f["severity"] == "problem"]) == (0, [])
    for check in ("configuration", "daemon", "cluster", "data server", "disk", "clock"):
        assert len(of(own, check, "ok")) == 1, check
    assert deployment.node("node-1", "status").stdout.startswith("NodeEngine: 🟢 running since")
    table = deployment.flops("doctor")
    assert "what to do" in table.stdout.splitlines()[0]
    assert "no problems" in table.stderr


def test_a_killed_data_server_is_seen_within_seconds_and_healthy_again(deployment: Deployment) -> None:
    file = deployment.home / "node-1" / "dataserver" / "endpoint.json"
    until(lambda: health(deployment)["severity"] in {"ok", "info"}, "healthy")
    killed = json.loads(file.read_text())["pid"]
    os.kill(killed, signal.SIGKILL)
    until(lambda: health(deployment)["severity"] == "problem", "sick", timeout_s=5)
    until(lambda: health(deployment)["severity"] in {"ok", "info"}, "healthy again", timeout_s=30)
    assert json.loads(file.read_text())["pid"] != killed


def test_a_node_that_stands_still_is_listed_as_sick_within_ten_seconds(deployment: Deployment) -> None:
    with stopped(node_pid(deployment)):
        began_s = time.monotonic()
        deployment.wait_for(lambda: "🔴" in deployment.flops("node", "list").stdout, "sick", timeout_s=15)
        assert time.monotonic() - began_s < 11  # ten, and the time of the command
        code, findings = examine(deployment)
        assert (code, len(of(findings, "connection", "problem"))) == (UNHEALTHY, 1)
        code, own = examine_node(deployment)
        assert (code, [f["check"] for f in own if f["severity"] == "problem"]) == (UNHEALTHY, ["daemon"])
        assert "🔴 running since" in deployment.node("node-1", "status").stdout
    deployment.wait_for_nodes(1)
    until(lambda: health(deployment)["severity"] in {"ok", "info"}, "healthy again", timeout_s=30)


def test_a_control_plane_that_stands_still_hangs_nothing(deployment: Deployment) -> None:
    with stopped(endpoint(deployment)["pid"]):
        code, findings = examine(deployment)
    assert code == UNHEALTHY
    (found,) = of(findings, "control plane")
    assert found["severity"] == "problem"
    assert len(of(findings, "databases", "ok")) == 3  # what can be checked is checked
    deployment.wait_for_nodes(1)


def test_a_clock_that_is_an_hour_ahead_is_named(deployment: Deployment) -> None:
    link = dial_cluster(f"127.0.0.1:{deployment.cluster_port}")
    try:
        link.send(Hello(node_id="played", name="skewed", facts=NodeFacts(), clock_s=time.time() + 3_600))
        until(lambda: link.receive(0.1) is not None, "welcome")
        (finding,) = (f for f in health(deployment, "skewed")["findings"] if f["check"] == "clock")
        assert finding["severity"] == "problem"
        assert "ahead of the control plane's" in finding["what"]
        assert "NTP" in finding["advice"]
    finally:
        link.close()


def test_an_address_that_nobody_reaches_and_a_data_server_that_is_not_there(deployment: Deployment) -> None:
    (free,) = free_ports(1)
    dead = Addon(name=LEARNER, state=AddonState.HEALTHY, port=free)
    links = []
    try:
        for name, address in (("far", "224.0.0.1"), ("near", "127.0.0.1")):
            links.append(dial_cluster(f"127.0.0.1:{deployment.cluster_port}"))
            facts = NodeFacts(address=address)
            links[-1].send(Hello(node_id=name, name=name, facts=facts, addons=(dead,)))
        until(lambda: all(link.receive(0.1) is not None for link in links), "welcomes")
        code, findings = examine(deployment)
    finally:
        for link in links:
            link.close()
    assert code == UNHEALTHY
    (far,) = of(findings, "address", "problem")
    assert (far["where"], "224.0.0.1" in far["what"]) == ("far", True)
    assert "firewall" in far["advice"]
    (near,) = of(findings, "data server", "problem")
    assert (near["where"], str(free) in near["what"]) == ("near", True)
    (listens,) = of(findings, "encryption", "warning")
    assert "node far (224.0.0.1)" in listens["what"]


def test_a_token_that_others_may_read_is_a_problem(deployment: Deployment) -> None:
    token = deployment.home / "control" / "admin.token"
    token.chmod(0o644)
    try:
        code, findings = examine(deployment)
    finally:
        token.chmod(0o600)
    assert code == UNHEALTHY
    (found,) = of(findings, "home", "problem")
    assert found["advice"] == f"chmod 600 {token}"


def test_a_client_elsewhere_asks_the_manager_only(deployment: Deployment) -> None:
    token = str(deployment.home / "control" / "admin.token")
    url = endpoint(deployment)["manager_url"]
    _, findings = examine(deployment, "--url", url, "--token-file", token)
    assert of(findings, "control plane", "ok")
    assert not of(findings, "databases")
    assert not of(findings, "ports")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_node_whose_disk_is_almost_full_is_sick(deployment: Deployment) -> None:
    home = deployment.home / "node-small"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(home)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        deployment.start_node("node-small")
        until(lambda: health(deployment, "node-small")["severity"] in {"ok", "info"}, "healthy")
        (home / "ballast").write_bytes(bytes(98 * 1024**2))
        until(lambda: health(deployment, "node-small")["severity"] == "problem", "sick", timeout_s=10)
        assert health(deployment, "node-small")["findings"][0]["check"] == "disk"
        (home / "ballast").unlink()
        until(lambda: health(deployment, "node-small")["severity"] in {"ok", "info"}, "healthy again")
        deployment.node("node-small", "stop")
        (left,) = health(deployment, "node-small")["findings"]
        assert (left["check"], left["severity"]) == ("connection", "warning")
    finally:
        deployment.node("node-small", "stop", exit_code=None)
        deployment.nodes.remove("node-small")
        subprocess.run(["umount", str(home)], check=True)


def test_a_killed_control_plane_and_a_damaged_database_are_named(deployment: Deployment) -> None:
    folder = deployment.home / "control"
    pid = endpoint(deployment)["pid"]
    process = psutil.Process(pid)
    process.kill()
    until(lambda: not psutil.pid_exists(pid), "the kill")
    database = folder / "projects.sqlite"
    until(lambda: not [c for c in psutil.process_iter() if _is_mlflow_of(c, folder)], "MLflow's end")
    for name in ("projects.sqlite-wal", "projects.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    whole = database.read_bytes()
    database.write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))
    try:
        code, findings = examine(deployment)
    finally:
        database.write_bytes(whole)
    assert code == UNHEALTHY
    (down,) = of(findings, "control plane", "problem")
    assert "was killed" in down["what"]
    assert "flops up" in down["advice"]
    (damaged,) = of(findings, "databases", "problem")
    assert damaged["where"] == str(database)
    assert len(of(findings, "databases", "ok")) == 2


def _is_mlflow_of(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(str(folder) in part for part in process.cmdline())
    except psutil.Error:
        return False


def test_without_a_control_plane_a_stranger_on_a_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environ = {**os.environ, "FLOPS_MANAGER_PORT": str(port)}
        code, findings = examine(Deployment(tmp_path, environ))
    assert code == UNHEALTHY
    (found,) = of(findings, "ports", "problem")
    assert found["where"] == f"127.0.0.1:{port}"
    assert f"(process {os.getpid()})" in found["what"]
    assert "--manager-port" in found["advice"]
    (down,) = of(findings, "control plane", "problem")
    assert "flops up" in down["advice"]


def test_a_node_that_does_not_run_says_so_and_whether_its_cluster_answers(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    deployment.node("node-1", "config", "cluster", "127.0.0.1", "-p", str(deployment.cluster_port))
    code, findings = examine_node(deployment)
    assert code == UNHEALTHY
    assert {f["check"] for f in findings if f["severity"] == "problem"} == {"daemon", "cluster"}
    (tmp_path / "node-1" / "conf.json").write_text("{")
    code, findings = examine_node(deployment)
    assert code == UNHEALTHY
    assert "not valid JSON" in of(findings, "configuration", "problem")[0]["what"]
    assert "config default" in of(findings, "configuration", "problem")[0]["advice"]
