"""A project that runs from images: built, pushed, pulled and run; then the model's image by itself."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.images.debian_base import DebianBase
from flops.adapters.registry_client.client import OciRegistry
from flops.core.image_reference import parse_reference
from flops.testing.deployment import Deployment
from flops.testing.example import example_deployment, sla_file, submit
from flops.testing.podman import Podman, missing_for_podman, running_podman
from flops.testing.waiting import until

_MISSING = missing_for_podman() or ("" if DebianBase.is_possible() else "needs mmdebstrap")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(_MISSING), reason=_MISSING),
]


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with running_podman() as podman:
        yield podman


@pytest.fixture
def deployment(podman: Podman, tmp_path: Path) -> Iterator[Deployment]:
    """Two learner nodes that run containers; one of them builds."""
    with example_deployment(tmp_path, container_socket=podman.socket) as deployment:
        yield deployment


def test_a_project_runs_from_images_and_its_model_from_one_alone(
    deployment: Deployment, podman: Podman
) -> None:
    sla = sla_file(
        deployment,
        packaging="image",
        training_configuration={"min_available_clients": 2, "min_fit_clients": 2},
        post_training_steps=["build_image_for_trained_model", "deploy_trained_model_image"],
    )
    project_id = submit(deployment, sla)
    watching = deployment.begin("flops", "project", "watch", project_id)
    deployment.wait_for(lambda: watching.poll() is not None, "the end of the project", timeout_s=800)
    told, _ = watching.communicate()
    assert watching.returncode == 0, told
    project = deployment.ask("project", "show", project_id)["project"]
    assert project["stage"] == "completed"
    images = project["images"]
    served = json.loads(podman.run("ps", "--format", "json"))
    assert [container["ImageID"] for container in served]
    image = parse_reference(f"127.0.0.1:{deployment.cluster_port}/{images['inference']}")
    registry = OciRegistry()
    assert registry.find(image).digest == image.digest
    predict_by_hand(podman, str(image), project["model"]["round"], project_id)
    prune_all_but(f"flops/{project_id}/model", deployment)
    assert registry.find(image).digest == image.digest


def prune_all_but(name: str, deployment: Deployment) -> None:
    """Only the image stays from which a service runs."""
    listed = {image["name"]: image for image in deployment.ask("image", "list")["images"]}
    assert len(listed) == 3
    assert [used for used in listed if listed[used]["use"]] == [name]
    pruned = deployment.ask("image", "prune")["images"]
    assert {image["name"] for image in pruned} == listed.keys() - {name}
    assert [image["name"] for image in deployment.ask("image", "list")["images"]] == [name]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 (this machine's)
            return bool(answer.status == 200)
    except OSError:
        return False


def predict_by_hand(podman: Podman, image: str, round_number: int, project_id: str) -> None:
    """What anybody does who has nothing but the image's name."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    container = podman.run(
        "run", "--detach", "--tls-verify=false", "--read-only", "--publish", f"127.0.0.1:{port}:8080", image
    ).strip()
    try:
        labels = json.loads(podman.run("inspect", container))[0]["Config"]["Labels"]
        assert labels["org.flops.project"] == project_id
        assert labels["org.flops.round"] == str(round_number)
        who = "import os; print(os.getuid())"
        assert podman.run("exec", container, "/opt/model/bin/python", "-c", who).strip() == "65532"
        url = f"http://127.0.0.1:{port}/invocations"
        body = json.dumps({"inputs": [[0.0] * 30, [1.0] * 30]}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        until(lambda: answers(f"http://127.0.0.1:{port}/ping"), "the model's server", timeout_s=120)
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 (this machine's)
            assert len(json.load(answer)["predictions"]) == 2
    finally:
        podman.run("rm", "--force", "--time", "0", container)
