"""A project whose repository has a Dockerfile: everything of it runs on the image that comes of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import uv

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.debian_base import DebianBase
from flops.adapters.images.stored_image import store_image
from flops.adapters.registry_client.client import OciRegistry
from flops.core.image_reference import ImageReference
from flops.core.images import ImageRun
from flops.core.platforms import Platform
from flops.settings import inherited_environment
from flops.testing.deployment import Deployment, commit_all, make_repository
from flops.testing.example import (
    EXAMPLES,
    example_deployment,
    make_example,
    sla_file,
    submit,
)
from flops.testing.images import make_index, own_registry
from flops.testing.podman import missing_for_podman, running_podman

_MISSING = (
    missing_for_podman()
    or ("" if DebianBase.is_possible() else "needs mmdebstrap")
    or ("" if shutil.which("buildah") else "needs buildah")
)
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(_MISSING), reason=_MISSING),
]

ENDLESS = "import time; time.sleep(987654)"


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """Two learner nodes that run containers; one of them builds."""
    home = tmp_path / "home"
    home.mkdir()
    with (
        running_podman() as podman,
        example_deployment(home, container_socket=podman.socket) as deployment,
    ):
        yield deployment


@pytest.fixture
def base(tmp_path: Path) -> Iterator[ImageReference]:
    """An image with a Python and a compiler, in a registry."""
    blobs = FileBlobs(tmp_path / "base")
    program = Path(uv.find_uv_bin())
    environ = inherited_environment()
    debian = DebianBase(tmp_path / "bases", uv=program, environ=environ, has_compilers=True)
    found = debian.base(Platform.AMD64, blobs, ignore)
    image = store_image(blobs, Platform.AMD64, found.layers, ImageRun(env=found.env, user="0:0"))
    with own_registry(tmp_path / "registry") as host:
        reference = ImageReference(host=host, name="debian", tag="with-python")
        OciRegistry().push(reference, make_index(blobs, image), blobs, ignore)
        yield reference


def ignore(_message: str) -> None:
    pass


def processes_of(words: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if words in " ".join(p.info["cmdline"] or ())]


def is_running(deployment: Deployment, project_id: str) -> bool:
    project = deployment.ask("project", "show", project_id)["project"]
    assert project["failure"] is None, project["failure"]
    return bool(processes_of(ENDLESS))


def test_a_project_runs_on_what_its_dockerfile_makes_and_ends_in_the_middle_of_it(
    deployment: Deployment, base: ImageReference
) -> None:
    repository = make_repository(EXAMPLES / "breast_cancer_dockerfile", deployment.home / "described")
    dockerfile = repository / "Dockerfile"
    dockerfile.write_text(re.sub(r"^(ARG \w+)=.*", rf"\1={base}", dockerfile.read_text(), flags=re.M))
    commit_all(repository, "Begin with what there is here")
    endless = make_example(deployment, "endless")
    (endless / "Dockerfile").write_text(f"FROM {base}\nRUN python3 -c '{ENDLESS}'\n")
    commit_all(endless, "Never end")
    one = {"min_available_clients": 2, "min_fit_clients": 2, "training_rounds": 1}
    steps = ["build_image_for_trained_model"]

    stopped = submit(deployment, sla_file(deployment, "stopped", "endless", packaging="image"))
    deployment.wait_for(lambda: is_running(deployment, stopped), "the endless step", timeout_s=300)
    deployment.flops("project", "stop", stopped)
    deployment.wait_for(lambda: not processes_of(ENDLESS), "the end of the endless step", timeout_s=15)

    sla = sla_file(
        deployment,
        "described",
        "described",
        packaging="image",
        training_configuration=one,
        post_training_steps=steps,
    )
    project_id = submit(deployment, sla)
    watched = deployment.flops("project", "watch", project_id, exit_code=None)
    assert watched.returncode == 0, watched.stdout + watched.stderr
    project = deployment.ask("project", "show", project_id)["project"]
    assert project["stage"] == "completed"
    assert f"flops/{project_id}/base@sha256:" in project["images"]["base"]
    assert "(RUN gcc -O2 -shared -fPIC -o /winsorize.so /winsorize.c)" in watched.stderr
    written = deployment.flops("project", "logs", project_id, "--service", "builder").stdout
    assert "RUN gcc -O2" in written
    listed = {image["name"] for image in deployment.ask("image", "list")["images"]}
    assert listed == {f"flops/{project_id}/{what}" for what in ("base", "learner", "aggregator", "model")}
    assert not list(deployment.home.glob("node-1/images/layers/*-*"))
