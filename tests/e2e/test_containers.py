"""A project whose services run in containers: the same commands, and nothing of it left in the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.testing.deployment import Deployment
from flops.testing.example import example_deployment, sla_file, submit
from flops.testing.podman import Podman, missing_for_podman, running_podman

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing_for_podman()), reason=missing_for_podman()),
]


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with running_podman() as podman:
        yield podman


@pytest.fixture
def deployment(podman: Podman, tmp_path: Path) -> Iterator[Deployment]:
    """Two learner nodes that run services in containers."""
    with example_deployment(tmp_path, container_socket=podman.socket) as deployment:
        yield deployment


def test_a_project_runs_in_containers(deployment: Deployment, podman: Podman) -> None:
    sla = sla_file(
        deployment,
        training_configuration={"min_available_clients": 2, "min_fit_clients": 2, "training_rounds": 2},
        post_training_steps=["build_image_for_trained_model", "deploy_trained_model_image"],
    )
    project_id = submit(deployment, sla)
    seen: set[str] = set()
    watching = deployment.begin("flops", "project", "watch", project_id)

    def is_over() -> bool:
        running = json.loads(podman.run("ps", "--format", "json"))
        seen.update(container["Labels"]["org.flops.service"].split("-")[0] for container in running)
        return watching.poll() is not None

    try:
        deployment.wait_for(is_over, "the end of the project", timeout_s=500)
    finally:
        watching.kill()
        told, _ = watching.communicate()
    assert watching.returncode == 0, told
    shown = deployment.ask("project", "show", project_id)["project"]
    assert shown["stage"] == "completed"
    assert seen == {"ml", "aggregator", "learner", "inference"}  # ml-data-server
    assert len(podman.run("ps", "--all", "--quiet").split()) == 3  # the data servers and the model go on
    deployment.flops("project", "delete", project_id)
    deployment.wait_for(lambda: len(podman.run("ps", "--all", "--quiet").split()) == 2, "the model's end")
    rows = deployment.rows("breast_cancer")
    for name in ("node-1", "node-2"):
        deployment.node(name, "stop")
    assert podman.run("ps", "--all", "--quiet") == ""
    for name in ("node-1", "node-2"):
        deployment.node(name, "config", "virtualization", "container", "off")
        deployment.start_node(name)
    deployment.wait_for_nodes(2)
    assert deployment.rows("breast_cancer") == rows
    assert podman.run("ps", "--all", "--quiet") == ""
