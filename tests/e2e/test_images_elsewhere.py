"""A project that runs from images on a machine that shares nothing with the builder's but a cable."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uv

from flops.adapters.images.debian_base import DebianBase
from flops.testing.deployment import Deployment, deployed
from flops.testing.example import EXAMPLES, REPOSITORY, make_example, sla_file, submit
from flops.testing.network import Machine, Network, missing_for_networks, network
from flops.testing.podman import Podman, missing_for_podman, running_podman

_MISSING = missing_for_podman() or missing_for_networks() or " and ".join(DebianBase.missing())
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.chaos,
    pytest.mark.root,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(_MISSING), reason=_MISSING),
]

BUILDER, TRAINER = "builder", "trainer"


def uv_cache() -> Path:
    """Where uv keeps what it has downloaded."""
    told = subprocess.run([uv.find_uv_bin(), "cache", "dir"], capture_output=True, text=True, check=True)
    return Path(told.stdout.strip())


class Site:
    """A control plane and a builder on this machine, and a node that trains on another one.

    Args:
        deployment: not started.
        network: connects both.
        machine: the other one.
        disk: what the other machine has in the place of the deployment's home.
        podman: its engine.
    """

    def __init__(
        self, deployment: Deployment, network: Network, machine: Machine, disk: Path, podman: Podman
    ) -> None:
        self.deployment = deployment
        self.network = network
        self.machine = machine
        self.disk = disk
        self.podman = podman

    def prepare(self) -> None:
        """Start everything, with data on the other machine."""
        deployment = self.deployment
        deployment.prefixes[TRAINER] = self.machine.prefix
        deployment.up()
        deployment.start_node(BUILDER, "imageBuilder")
        deployment.node(TRAINER, "config", "virtualization", "container", "on")
        deployment.start_node(TRAINER, "FLOps-learner")
        deployment.wait_for_nodes(2)
        deployment.flops("mock-data", "create", str(EXAMPLES / "slas/mocks/breast_cancer.json"), "--watch")
        make_example(deployment, REPOSITORY)

    def is_pulling(self) -> bool:
        """Whether a part of an image is on its way to the other machine."""
        return any((self.disk / TRAINER / "images" / "incoming").glob("*"))

    def is_connected(self) -> bool:
        nodes = self.deployment.ask("node", "list")
        return all(node["is_connected"] for node in nodes)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    home, disk, cache = (tmp_path / name for name in ("home", "disk", "cache"))
    for folder in (home, disk, cache, uv_cache()):
        folder.mkdir(parents=True, exist_ok=True)
    with network() as net:
        machine = net.add_machine({home: disk, uv_cache(): cache})
        with (
            running_podman(machine.prefix) as podman,
            deployed(home, address=net.here.address, container_socket=podman.socket) as deployment,
        ):
            site = Site(deployment, net, machine, disk, podman)
            site.prepare()
            yield site


def test_a_project_runs_from_images_where_no_file_is_shared_and_the_cable_is_cut_in_the_pull(
    site: Site,
) -> None:
    deployment = site.deployment
    one = {"min_available_clients": 1, "min_fit_clients": 1, "min_evaluate_clients": 1, "training_rounds": 2}
    steps = ["build_image_for_trained_model", "deploy_trained_model_image"]
    sla = sla_file(deployment, packaging="image", training_configuration=one, post_training_steps=steps)
    project_id = submit(deployment, sla)
    deployment.wait_for(site.is_pulling, "the pull of an image", timeout_s=500)
    here, there = site.network.here, site.machine
    with site.network.cut((here, there), (there, here)):
        deployment.wait_for(lambda: not site.is_connected(), "the loss of the node")
    deployment.wait_for(site.is_connected, "the return of the node")
    deployment.flops("project", "watch", project_id)
    project = deployment.ask("project", "show", project_id)["project"]
    assert project["stage"] == "completed"
    assert len(project["training"]["history"]) == 2
    assert urlsplit(project["inference_url"]).hostname == there.address
    with urllib.request.urlopen(f"{project['inference_url']}/ping", timeout=30) as answer:  # noqa: S310
        assert answer.status == 200
    running = json.loads(site.podman.run("ps", "--format", "json"))
    names = {container["Image"].partition("/")[2].rpartition(":")[0] for container in running}
    assert project["images"]["inference"].partition("@")[0] in names
    assert not (deployment.home / TRAINER).exists()
    assert not (site.disk / BUILDER).exists()
    assert not list((site.disk / TRAINER / "environments").glob("*")), "built instead of brought"
