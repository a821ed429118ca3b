"""The control plane and its nodes, by the commands that people type."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from os import kill
from pathlib import Path

import pytest

from flops.errors import CATALOGUE, ErrorCode
from flops.testing.deployment import Deployment, deployed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with deployed(tmp_path) as deployment:
        yield deployment


def exit_code(code: ErrorCode) -> int:
    return CATALOGUE[code].exit_code


def test_two_nodes_join_and_are_known_to_be_gone(deployment: Deployment) -> None:
    deployment.up()
    deployment.start_node("node-1", "FLOps-learner", "imageBuilder")
    deployment.start_node("node-2", "FLOps-learner")
    deployment.wait_for_nodes(2)
    addons = {frozenset(a["name"] for a in node["addons"]) for node in deployment.ask("node", "list")}
    assert addons == {frozenset({"FLOps-learner", "image-builder"}), frozenset({"FLOps-learner"})}

    pid = json.loads(deployment.node("node-1", "status", "--format", "json").stdout)["data"]["node"]["pid"]
    kill(pid, signal.SIGKILL)
    deployment.wait_for(
        lambda: sum(node["is_connected"] for node in deployment.ask("node", "list")) == 1,
        "the killed node to be gone",
        timeout_s=15,
    )
    deployment.start_node("node-1")
    deployment.wait_for_nodes(2)


def test_state_survives_a_kill_of_the_control_plane(deployment: Deployment) -> None:
    deployment.up()
    deployment.start_node("node-1", "FLOps-learner")
    deployment.wait_for_nodes(1)
    endpoint = json.loads((deployment.home / "control" / "endpoint.json").read_text())
    kill(endpoint["pid"], signal.SIGKILL)
    deployment.wait_for(lambda: deployment.flops("status", exit_code=None).returncode != 0, "the kill")
    deployment.up()
    deployment.wait_for_nodes(1)


def test_a_second_up_is_refused(deployment: Deployment) -> None:
    deployment.up()
    refused = deployment.flops("up", exit_code=exit_code(ErrorCode.ALREADY_RUNNING))
    assert "already" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert deployment.ask("status")["nodes_total"] == 0


def test_an_occupied_port_is_named(deployment: Deployment) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = deployment.flops(
            "up", f"--manager-port={port}", "--cluster-port=0", "--tracking-port=0",
            exit_code=exit_code(ErrorCode.PORT_OCCUPIED),
        )  # fmt: skip
    assert str(port) in refused.stderr


def test_without_a_control_plane_commands_say_how_to_start_it(deployment: Deployment) -> None:
    for command in (["status"], ["project", "list"], ["node", "list"]):
        refused = deployment.flops(*command, exit_code=exit_code(ErrorCode.UNREACHABLE))
        assert "flops up" in refused.stderr
    deployment.flops("down", exit_code=exit_code(ErrorCode.NOT_RUNNING))


@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [
        ("{", ErrorCode.SLA_UNREADABLE, "is not JSON"),
        ("[]", ErrorCode.SLA_UNREADABLE, "no JSON object"),
        ('{"customerID": "Admin"}', ErrorCode.SLA_INVALID, "ml_repo_url: required key is missing"),
    ],
)
def test_a_wrong_sla_is_refused_before_anything_starts(
    deployment: Deployment, content: str, code: ErrorCode, expected: str
) -> None:
    sla = deployment.home / "sla.json"
    sla.write_text(content)
    assert expected in deployment.flops("project", "create", str(sla), exit_code=exit_code(code)).stderr


def test_a_project_that_no_node_can_run_is_refused_with_the_reason(deployment: Deployment) -> None:
    deployment.up()
    sla = deployment.home / "sla.json"
    repository = (deployment.home / "nowhere").as_uri()
    sla.write_text(
        json.dumps(
            {
                "customerID": "Admin",
                "ml_repo_url": repository,
                "ml_model_flavor": "sklearn",
                "training_configuration": {"data_tags": ["mnist"]},
            }
        )
    )
    failed = deployment.flops(
        "project", "create", str(sla), "--watch", exit_code=exit_code(ErrorCode.REPO_UNREACHABLE)
    )
    assert repository in failed.stderr
    assert "Hint:" in failed.stderr
