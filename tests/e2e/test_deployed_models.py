"""Versions of a model at one address, on real processes: swapped under load, and in the middle of kills."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flops.errors import CATALOGUE, ErrorCode
from flops.testing.chaos import Role, kill, processes_of
from flops.testing.deployment import Deployment, free_ports
from flops.testing.example import example_deployment, sla_file
from flops.testing.hammer import Hammer

pytestmark = [pytest.mark.e2e, pytest.mark.chaos, pytest.mark.timeout(600)]

MODEL = "cancer"
NODE = "node-1"  # its folder; its name begins with that of the machine


class Models:
    """Two projects that have trained versions 1 and 2 of a model."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.port = free_ports(1)[0]
        names = [node["name"] for node in deployment.ask("node", "list")]
        self.node = next(name for name in names if name.endswith(NODE))
        short = {"training_rounds": 1}
        sla = sla_file(deployment, model_name=MODEL, post_training_steps=[], training_configuration=short)
        self.projects = [
            deployment.ask("project", "create", str(sla), "--watch")["project_id"] for _ in range(2)
        ]

    def flops(self, *arguments: str, exit_code: int = 0) -> str:
        """What a `flops model` command prints."""
        return self.deployment.flops("model", *arguments, exit_code=exit_code).stdout.strip()

    def deploy(self, version: str, *arguments: str) -> str:
        """Deploy a version and wait for it; returns the URL."""
        address = ("--node", self.node, "--port", str(self.port))
        return self.flops("deploy", MODEL, "--version", version, *address, *arguments)

    @property
    def record(self) -> dict[str, Any]:
        return dict(self.deployment.ask("model", "show", MODEL)["deployment"])

    def wait_for(self, version: str) -> None:
        """Wait until a version serves, alone."""

        def is_there() -> bool:
            record = self.record
            return record["state"] == "serving" and record["serving"]["version"] == version

        self.deployment.wait_for(is_there, f"version {version}", 120)
        self.deployment.wait_for(lambda: len(self.servers()) == 1, "the end of the other version")

    def servers(self) -> list[Any]:
        return processes_of(self.deployment, Role.INFERENCE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    with example_deployment(tmp_path_factory.mktemp("deployment")) as deployment:
        yield Models(deployment)


@contextmanager
def hammered(url: str) -> Iterator[Hammer]:
    """Clients that ask all the time, and are never refused."""
    hammer = Hammer(url, clients=2)
    try:
        yield hammer
    finally:
        hammer.stop()
    assert hammer.failures == []


def test_versions_are_swapped_under_load_and_rolled_back_at_one_address(models: Models) -> None:
    listed = models.deployment.ask("model", "list")
    assert {(m["name"], m["version"], m["project_id"]) for m in listed} == {
        (MODEL, "1", models.projects[0]),
        (MODEL, "2", models.projects[1]),
    }
    url = models.deploy("1")
    assert url.endswith(f":{models.port}")
    with hammered(url) as hammer:
        hammer.wait_for_only("1")
        assert models.flops("deploy", MODEL) == url
        hammer.wait_for_only("2")
        assert models.flops("rollback", MODEL) == url
        hammer.wait_for_only("1")
    assert [line["version"] for line in models.record["history"]] == ["1", "2", "1"]


def test_a_swap_goes_on_over_a_kill_of_the_control_plane_or_of_the_node(models: Models) -> None:
    url = models.deploy("1")
    with hammered(url) as hammer:
        models.deploy("2", "--no-wait")
        kill(processes_of(models.deployment, Role.CONTROL_PLANE))
        models.deployment.up()
        models.wait_for("2")
        hammer.wait_for_only("2")
        models.deploy("1", "--no-wait")
        kill([p for p in processes_of(models.deployment, Role.NODE) if p.node == NODE])
        models.deployment.start_node(NODE)
        models.wait_for("1")
        hammer.wait_for_only("1")
    assert models.record["url"] == url


def test_the_address_is_the_same_after_a_restart_of_the_node(models: Models) -> None:
    url = models.deploy("1")
    models.deployment.node(NODE, "stop")
    models.deployment.wait_for(lambda: models.record["state"] == "lost", "the end of the node")
    models.deployment.start_node(NODE)
    models.wait_for("1")
    assert models.record["url"] == url
    with hammered(url) as hammer:
        hammer.wait_for_only("1")


def test_what_is_deployed_is_held_and_what_is_not_leaves_nothing(models: Models, tmp_path: Path) -> None:
    models.deploy("2")
    rows = tmp_path / "rows.json"
    rows.write_text("[[" + ", ".join("1.0" for _ in range(30)) + "]]")
    assert models.flops("predict", MODEL, str(rows))
    refused = models.deployment.flops(
        "project", "delete", models.projects[1], exit_code=CATALOGUE[ErrorCode.MODEL_DEPLOYED].exit_code
    )
    assert f"is deployed on {models.node}" in refused.stderr
    models.flops("undeploy", MODEL)
    models.deployment.wait_for(lambda: not models.servers(), "the end of the service")
    for project_id in models.projects:
        models.deployment.flops("project", "delete", project_id)
    models.deployment.wait_for(lambda: not models.deployment.ask("project", "list"), "the deletions")
    assert models.deployment.ask("model", "list") == []
    left = [p for p in models.deployment.home.glob("node-*/services/*") if "inference-" in p.name]
    models.deployment.wait_for(lambda: not any(p.exists() for p in left), "the end of the services' files")
