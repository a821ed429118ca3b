"""A node joins a cluster that encrypts, works, renews itself, is locked out: real processes and commands."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flops.errors import CATALOGUE, ErrorCode
from flops.testing.deployment import Deployment
from flops.testing.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LIFE_H = 20 / 3600  # renewed after 13 s

MOCK = """
{"mock_data_configuration": {"dataset_name": "rows.csv", "data_tag": "rows", "number_of_partitions": 1}}
"""


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    environ = {
        **os.environ,
        "FLOPS_ENCRYPTION": "on",
        "FLOPS_CERTIFICATE_HOURS": str(LIFE_H),
        "FLOPS_DATA_PORT": "0",
    }
    deployment = Deployment(tmp_path, environ)
    try:
        yield deployment
    finally:
        deployment.down()


def status_of(deployment: Deployment, name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(deployment.node(name, "status", "--format", "json").stdout)["data"]
    return data


def test_a_node_joins_works_renews_itself_and_is_locked_out(deployment: Deployment) -> None:
    deployment.up()
    plain = ("-a", "127.0.0.1", "-p", str(deployment.cluster_port), "-d")
    deployment.nodes += ["plain", "one"]
    assert "encrypts, and this node has no certificate" in deployment.node("plain", *plain).stderr
    token = deployment.flops("node", "invite").stdout.strip()
    deployment.node("one", "config", "addon", "FLOps-learner", "on")
    assert "Joined the cluster" in deployment.node("one", "--token", token, "-d").stderr
    deployment.wait_for_nodes(1)
    again = deployment.node("two", "--token", token, "-d", exit_code=None)
    assert again.returncode == CATALOGUE[ErrorCode.JOIN_REFUSED].exit_code
    assert "used once" in again.stderr

    (deployment.home / "rows.csv").write_text("a,b\n" + "".join(f"{i},{i}\n" for i in range(40)))
    (deployment.home / "mock.json").write_text(MOCK)
    deployment.flops("mock-data", "create", "mock.json", "--watch")  # its provider fetches a blob
    assert deployment.rows("rows") == 40
    server = json.loads((deployment.home / "one" / "dataserver" / "endpoint.json").read_text())
    assert server["name"].endswith(".data.flops.internal")  # so it went there encrypted
    node = ("--home", str(deployment.home / "one"))
    device = deployment.home / "device.token"
    device.write_text(deployment.flops("data", "token", "--tag", "rows", *node).stdout)
    sent = ("--server", f"{server['host']}:{server['port']}", "--token-file", str(device))
    (deployment.home / "more.csv").write_text("a,b\n-1,-1\n")
    deployment.flops("data", "push", "more.csv", "--tag", "rows", *sent)
    until(lambda: deployment.rows("rows") == 41, "the device's row")

    found = json.loads(deployment.node("one", "doctor", "--format", "json", exit_code=None).stdout)["data"]
    files = {f["where"] for f in found["findings"] if f["check"] == "certificate"}
    home = deployment.home / "one"
    assert files == {str(home / "identity.pem"), str(home / "dataserver" / "identity.pem")}

    first = status_of(deployment, "one")["certificate"]
    assert first["signer"].startswith("FLOps cluster")
    until(lambda: status_of(deployment, "one")["certificate"] != first, "a renewed certificate", timeout_s=30)
    deployment.wait_for_nodes(1)

    (node,) = deployment.ask("node", "list")
    deployment.flops("node", "remove", node["id"])
    assert deployment.ask("node", "list") == []
    until(lambda: "removed" in status_of(deployment, "one")["node"]["link_detail"], "the node knows it")
    assert deployment.ask("node", "list") == []
