"""A further cluster joins, is killed, waits for its manager, and is removed: real processes and commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flops.errors import CATALOGUE, ErrorCode
from flops.testing.deployment import Deployment
from flops.testing.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(300)]

MOCK = """
{"mock_data_configuration": {"dataset_name": "rows.csv", "data_tag": "rows", "number_of_partitions": 1}}
"""


class Site:
    """The home of a further cluster on this machine."""

    def __init__(self, deployment: Deployment, name: str) -> None:
        self.deployment = deployment
        self.home = deployment.home / name
        self.identity = self.home / "relay" / "identity.pem"

    def run(
        self, *arguments: str, error: ErrorCode | None = None, home: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        expected = 0 if error is None else CATALOGUE[error].exit_code
        command = ("cluster", *arguments, "--home", str(home or self.home))
        return self.deployment.flops(*command, exit_code=expected)

    def endpoint(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "relay" / "endpoint.json").read_text())
        return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    environ = {
        **os.environ,
        "FLOPS_ENCRYPTION": "on",
        "FLOPS_DATA_PORT": "0",
        "FLOPS_CLUSTER_PORT": "0",
    }
    deployment = Deployment(tmp_path, environ)
    site = Site(deployment, "edge-a")
    try:
        yield site
    finally:
        deployment.flops("cluster", "down", "--home", str(site.home), exit_code=None)
        deployment.down()


def clusters(deployment: Deployment) -> dict[str, bool]:
    return {c["name"]: c["is_connected"] for c in deployment.ask("cluster", "list")}


def test_a_cluster_from_its_invitation_to_its_removal(site: Site) -> None:
    deployment = site.deployment
    deployment.up()
    deployment.flops("cluster", "invite", "Edge A", exit_code=CATALOGUE[ErrorCode.USAGE].exit_code)
    token = deployment.flops("cluster", "invite", "edge-a").stdout.strip()
    port = str(deployment.cluster_port)
    site.run("up", "--name", "edge-a", "--token", token, "--port", port, error=ErrorCode.PORT_OCCUPIED)
    manager = f"https://127.0.0.1:{port}"
    told = site.run("up", "--manager", manager).stderr  # it has joined, and knows its name
    assert "edge-a is up" in told
    site.run("up", error=ErrorCode.ALREADY_RUNNING)
    address = site.endpoint()["cluster_address"]
    token = deployment.flops("node", "invite", "--cluster", "edge-a").stdout.strip()
    deployment.nodes.append("one")
    deployment.node("one", "config", "addon", "FLOps-learner", "on")
    deployment.node("one", "--token", token, "-d")
    deployment.wait_for_nodes(1)
    (deployment.home / "rows.csv").write_text("a,b\n" + "".join(f"{i},{i}\n" for i in range(40)))
    (deployment.home / "mock.json").write_text(MOCK)
    deployment.flops("mock-data", "create", "mock.json", "--watch")  # its provider fetches a blob
    _, there = deployment.ask("cluster", "list")
    assert there["name"] == "edge-a"
    assert (there["addons"], there["data_tags"]) == ({"FLOps-learner": 1}, {"rows": 40})

    # It is killed, and has the same port and key when it is back, though the manager is away then.
    os.kill(site.endpoint()["pid"], signal.SIGKILL)
    until(lambda: not clusters(deployment)["edge-a"], "its absence is noticed", timeout_s=60)
    before = site.identity.read_text()
    deployment.flops("down")
    assert "Not connected yet: The manager at" in site.run("up").stderr
    assert (site.endpoint()["cluster_address"], site.identity.read_text()) == (address, before)
    deployment.up()
    until(lambda: clusters(deployment)["edge-a"], "it finds the manager", timeout_s=60)
    deployment.wait_for_nodes(1)

    deployment.flops("cluster", "remove", "edge-a", "--force")
    assert clusters(deployment) == {"default": True}
    assert deployment.ask("node", "list") == []
    site.run("down")
    assert "removed" in site.run("up", error=ErrorCode.CERTIFICATE_REFUSED).stderr
