"""What others use for images takes ours: skopeo and podman, from our registry and from our folders."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from platform import uname

import pytest
import uv

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.assembler import OciAssembler
from flops.adapters.images.build_tools import is_emulated
from flops.adapters.images.debian_base import DebianBase
from flops.adapters.registry_client.auth import DockerCredentials
from flops.adapters.registry_client.client import OciRegistry
from flops.core.image_reference import ImageReference
from flops.core.images import Descriptor, ImageRun, image_labels
from flops.core.platforms import Platform
from flops.image_ports import ImageRecipe
from flops.settings import inherited_environment
from flops.testing.images import make_image, make_index, own_registry
from flops.testing.podman import missing_for_podman, running_podman
from flops.testing.wheels import lock_of, make_wheel, use_only

PASSWORD = "secret"


def ignore(_message: str) -> None:
    pass


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def registry_at(host: str) -> OciRegistry:
    entry = {"auth": base64.b64encode(f"flops:{PASSWORD}".encode()).decode()}
    return OciRegistry(DockerCredentials({"auths": {host: entry}}))


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="needs skopeo")
def test_skopeo_copies_to_and_from_our_registry(tmp_path: Path) -> None:
    here, there = FileBlobs(tmp_path / "here"), FileBlobs(tmp_path / "there")
    index = make_index(
        here, *(make_image(here, "base", p.architecture, platform=p, size=300_000) for p in Platform)
    )
    folder = tmp_path / "copied"
    with own_registry(tmp_path / "registry", password=PASSWORD) as host:
        reference = ImageReference(host=host, name="flops/learner", tag="v1")
        registry = registry_at(host)
        registry.push(reference, index, here, ignore)
        login, plain = f"flops:{PASSWORD}", "--tls-verify=false"
        found = json.loads(run("skopeo", "inspect", plain, "--creds", login, f"docker://{reference}"))
        assert found["Digest"] == f"sha256:{index.digest}"
        assert found["RepoTags"] == ["v1"]
        assert found["Labels"]["names"] == "base amd64"
        copy = ["skopeo", "copy", "--quiet", "--all", "--src-creds", login, "--src-tls-verify=false"]
        run(*copy, f"docker://{reference}", f"oci:{folder}:v1")
        copy = ["skopeo", "copy", "--quiet", "--all", "--dest-creds", login, "--dest-tls-verify=false"]
        run(*copy, f"oci:{folder}:v1", f"docker://{host}/other/name:v2")
        other = ImageReference(host=host, name="other/name", tag="v2")
        assert registry.pull(other, there, ignore).digest == index.digest
        run("skopeo", "delete", plain, "--creds", login, f"docker://{other}")
        assert registry.tags(other) == []
    assert there.digests() == here.digests()


@pytest.mark.root
@pytest.mark.skipif(missing_for_podman() != "", reason=missing_for_podman())
def test_podman_pulls_from_our_registry_and_pushes_to_it(tmp_path: Path) -> None:
    here, there = FileBlobs(tmp_path / "here"), FileBlobs(tmp_path / "there")
    index = make_index(here, *(make_image(here, p.architecture, platform=p) for p in Platform))
    with own_registry(tmp_path / "registry", password=PASSWORD) as host, running_podman() as podman:
        reference = ImageReference(host=host, name="flops/learner", tag="v1")
        registry_at(host).push(reference, index, here, ignore)
        login = f"flops:{PASSWORD}"
        podman.run("pull", "--quiet", "--creds", login, str(reference))
        found = json.loads(podman.run("image", "inspect", str(reference)))[0]
        assert found["User"] == "65532:65532"
        other = ImageReference(host=host, name="other/name", tag="v2")
        podman.run("push", "--quiet", "--creds", login, str(reference), str(other))
        registry_at(host).pull(other, there, ignore)
    assert len(there.digests()) == 3


PROGRAM = """
import json, os, platform, pure, ssl, sys
import pwd
print(json.dumps({
    "machine": platform.machine(),
    "user": pwd.getpwuid(os.getuid()).pw_name,
    "prefix": sys.prefix,
    "compiled": [os.path.exists(module.__cached__) for module in (pure, ssl)],
    "authorities": len(ssl.create_default_context().get_ca_certs()) > 50,
}))
"""


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> tuple[FileBlobs, Descriptor]:
    """An image for all platforms on a base of Debian's packages: made once, without emulation."""
    folder = tmp_path_factory.mktemp("assembled")
    wheels = folder / "wheels"
    wheels.mkdir()
    wheel = make_wheel(wheels, "pure", "1", modules=["pure"])
    environ = {**inherited_environment(), **use_only(wheels, folder / "cache")}
    program = Path(uv.find_uv_bin())
    blobs = FileBlobs(folder / "layout", is_oci_layout=True)
    bases = DebianBase(folder / "layers", uv=program, environ=environ)
    assembler = OciAssembler(folder / "layers", blobs, bases, uv=program, environ=environ)
    recipe = ImageRecipe(
        tuple(Platform),
        lock_of(wheel, python="3.11"),
        {"app/program.py": PROGRAM.encode()},
        run=ImageRun(entrypoint=("python", "/app/program.py"), labels=image_labels(title="a test")),
    )
    return blobs, assembler.assemble(recipe, ignore)


@pytest.mark.chaos
@pytest.mark.root
@pytest.mark.timeout(900)
@pytest.mark.skipif(missing_for_podman() != "", reason=missing_for_podman())
@pytest.mark.skipif(not DebianBase.is_possible(), reason="needs mmdebstrap and Debian's keyring")
@pytest.mark.parametrize("platform", Platform)
def test_an_assembled_image_runs_in_a_container(
    platform: Platform, assembled: tuple[FileBlobs, Descriptor], tmp_path: Path
) -> None:
    if platform.machine != uname().machine and not is_emulated(platform):
        pytest.skip(f"needs QEMU for {platform} (Debian: qemu-user-static, binfmt-support)")
    blobs, index = assembled
    with own_registry(tmp_path / "registry") as host, running_podman() as podman:
        reference = ImageReference(host=host, name="flops/learner", tag="v1")
        OciRegistry().push(reference, index, blobs, ignore)
        pinned = str(reference.model_copy(update={"tag": ""}).at(index.digest))
        podman.run("pull", "--quiet", "--platform", platform, pinned)
        run = ["run", "--rm", "--read-only", "--network=none", "--cap-drop=all", "--platform", platform]
        printed = podman.run(*run, pinned)
    assert json.loads(printed) == {
        "machine": platform.machine,
        "user": "flops",
        "prefix": "/opt/env",
        "compiled": [True, True],
        "authorities": True,
    }
