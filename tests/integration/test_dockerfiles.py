"""Dockerfiles run by buildah for real: what comes of them, what they cannot reach, and what goes wrong."""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.build_tools import own_platform
from flops.adapters.images.buildah import Buildah
from flops.adapters.images.builds_apart import BuildsApart, part_with
from flops.adapters.images.container_folder import lay_out
from flops.adapters.images.dockerfile_images import DockerfileImages
from flops.adapters.images.pulled_base import PulledBase
from flops.adapters.registry_client.client import OciRegistry
from flops.command import StoppedError, stopped_when
from flops.core.image_reference import ImageReference
from flops.core.images import BaseImage
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ContainerBuild, ContainerBuilds
from flops.network_rules import landlock_version
from flops.testing.disk import small_disk
from flops.testing.images import (
    free_port,
    make_index,
    make_shell_base,
    own_registry,
    shell_base,
    unpack_layer,
)
from flops.testing.waiting import until

HERE = own_platform() or Platform.AMD64
ENDLESS = "sleep 876543"
ENVIRON = {"PATH": os.defpath}
pytestmark = pytest.mark.skipif(shutil.which("buildah") is None, reason="needs buildah")


class Shop:
    """A place where images are made of one repository.

    Args:
        folder: of everything.
        base: an image with a shell, in a registry.
    """

    def __init__(self, folder: Path, base: ImageReference) -> None:
        self.folder, self.base = folder, base
        self.repository = folder / "repository"
        self.repository.mkdir(parents=True)
        (self.repository / "model_manager.py").write_text("x = 1\n")
        self.written = io.BytesIO()
        self.told: list[str] = []
        self.blobs = FileBlobs(folder / "layout", is_oci_layout=True)

    def images(
        self, builds: ContainerBuilds | None = None, *, platform: Platform = HERE, timeout_s: float = 50.0
    ) -> DockerfileImages:
        return DockerfileImages(
            self.folder / "layers",
            self.blobs,
            OciRegistry(first_pause_s=0.001),
            builds or Buildah(ENVIRON, hidden=[str(self.folder)], output=self.written),
            partial(FileBlobs, is_oci_layout=True),
            runs_here=lambda found: found is platform,
            timeout_s=timeout_s,
        )

    def make(self, dockerfile: str, *, platform: Platform = HERE, **options: float) -> BaseImage:
        """Make the image, push it, and pull it as a base."""
        (self.repository / "Dockerfile").write_text(dockerfile)
        index = self.images(**options).make(self.repository, [platform], self.told.append)  # type: ignore[arg-type]
        reference = ImageReference(host=self.base.host, name="made").at(index.digest)
        registry = OciRegistry()
        registry.push(reference, index, self.blobs, self.told.append)
        bases = PulledBase(self.folder / "bases", registry, reference)
        return bases.base(platform, FileBlobs(self.folder / "pulled"), self.told.append)

    def failure(self, dockerfile: str, **options: float) -> FlopsError:
        with pytest.raises(FlopsError) as caught:
            self.make(dockerfile, **options)
        return caught.value

    def leftovers(self) -> list[Path]:
        return [path for path in (self.folder / "layers").iterdir() if path.is_dir()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageReference]:
    with shell_base(tmp_path_factory.mktemp("base"), "cat", "ls", "sleep", "id", "dd", "mount") as reference:
        yield reference


@pytest.fixture
def shop(tmp_path: Path, base: ImageReference) -> Shop:
    return Shop(tmp_path / "shop", base)


def processes_of(words: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if words in " ".join(p.info["cmdline"] or ())]


def test_what_a_dockerfile_does_is_on_top_of_what_it_begins_with(shop: Shop) -> None:
    (shop.repository / "settings.txt").write_text("a = 1\n")
    made = shop.make(
        f"FROM {shop.base}\nENV MORE=yes\nCOPY settings.txt /opt/\nRUN cat /opt/settings.txt > /opt/b\n"
    )
    first = PulledBase(shop.folder / "bases", OciRegistry(), shop.base).base(HERE, shop.blobs, lambda _: None)
    assert made.layers[: len(first.layers)] == tuple(
        layer.model_copy(update={"what": made.layers[0].what}) for layer in first.layers
    )
    assert len(made.layers) == len(first.layers) + 1
    assert made.env | {"OF": "base", "MORE": "yes"} == made.env
    assert made.interpreter == "/usr/bin/python3.11"
    members = unpack_layer(shop.blobs, made.layers[-1].blob, shop.folder / "root")
    assert (shop.folder / "root/opt/b").read_text() == "a = 1\n"
    assert {member.uid for member in members.values()} == {0}
    steps = [line for line in shop.told if "step" in line]
    assert f"step 1 of 4 (FROM {shop.base})" in steps[0]
    assert len(steps) == 4
    assert b"STEP 4/4: RUN cat" in shop.written.getvalue()
    assert shop.leftovers() == []


def test_it_is_made_again_only_when_something_of_it_is_another_one(shop: Shop) -> None:
    (shop.repository / "system.txt").write_text("1")
    text = f"FROM {shop.base}\nCOPY system.txt /\n"
    made = shop.make(text)
    (shop.repository / "model_manager.py").write_text("x = 2\n")  # it does not take this one
    shop.told.clear()
    assert shop.make(text) == made
    assert not [line for line in shop.told if "step" in line]
    (shop.repository / "system.txt").write_text("2")
    assert shop.make(text) != made


def test_stages_begin_with_images_by_variables_and_digests_and_only_the_last_one_counts(shop: Shop) -> None:
    pinned = shop.base.at(OciRegistry().find(shop.base).digest)
    made = shop.make(
        f"ARG BASE={shop.base}\nFROM ${{BASE}} AS build\nRUN echo made > /made; echo more > /more\n"
        f"FROM {pinned}\nCOPY --from=build /made /opt/\nCOPY --from={shop.base} /etc/passwd /opt/\n"
    )
    members = unpack_layer(shop.blobs, made.layers[-1].blob, shop.folder / "root")
    assert {name for name, member in members.items() if member.isreg()} == {"opt/made", "opt/passwd"}


def test_what_it_runs_is_no_root_here_and_sees_nothing_of_the_node(shop: Shop) -> None:
    secret = shop.folder / "secret"
    secret.write_text("do not tell")
    probes = (
        "cat /proc/self/uid_map; ls /proc",
        f"! ls /proc/1/root{shop.folder}",
        "! mount -t tmpfs none /tmp",
        "! ls /mnt/build",
    )
    shop.make(f"FROM {shop.base}\n" + "".join(f"RUN {probe}\n" for probe in probes))
    told = shop.written.getvalue().decode()
    if os.geteuid() == 0:
        assert [int(number) for number in told.split("uid_map; ls /proc\n")[1].split()[:2]] == [0, 1879048192]
    assert str(os.getpid()) not in told.split()
    assert "do not tell" not in told


@pytest.mark.parametrize(
    ("steps", "code", "words"),
    [
        (
            "RUN echo no such model >&2; exit 7",
            ErrorCode.DOCKERFILE_FAILED,
            ["step 2 of 2", "no such model", "7"],
        ),
        ("COPY nothing.txt /", ErrorCode.DOCKERFILE_FAILED, ["step 2 of 2", "nothing.txt", "no such file"]),
        ("RUNN true", ErrorCode.DOCKERFILE_FAILED, ["Unknown instruction", "RUNN"]),
        ("RUN echo 'No space left on device' >&2; false", ErrorCode.DISK_FULL, ["disk is full"]),
    ],
)
def test_a_failure_names_the_step_and_what_it_wrote(
    shop: Shop, steps: str, code: ErrorCode, words: list[str]
) -> None:
    error = shop.failure(f"FROM {shop.base}\n{steps}\n")
    assert error.code is code
    assert all(word in error.message for word in words), error.message
    assert shop.leftovers() == []


def test_a_step_without_an_end_is_ended(shop: Shop) -> None:
    error = shop.failure(f"FROM {shop.base}\nRUN {ENDLESS}\n", timeout_s=4.0)
    assert error.code is ErrorCode.TIMEOUT
    assert "step 2 of 2" in error.message
    assert processes_of(ENDLESS) == []
    assert shop.leftovers() == []


def test_an_image_to_begin_with_that_cannot_be_had_is_named(shop: Shop) -> None:
    error = shop.failure(f"FROM {shop.base.host}/no/such:v1\n")
    assert error.code is ErrorCode.IMAGE_NOT_FOUND
    assert "no/such:v1" in error.message
    error = shop.failure(f"FROM 127.0.0.1:{free_port()}/base:v1\n")
    assert error.code is ErrorCode.REGISTRY_UNREACHABLE


def test_what_was_made_is_used_while_the_registry_of_what_it_begins_with_is_away(shop: Shop) -> None:
    port = free_port()
    blobs = FileBlobs(shop.folder / "pushed")
    (shop.repository / "Dockerfile").write_text(f"FROM 127.0.0.1:{port}/base:v1\n")
    with own_registry(shop.folder / "registry", port=port) as host:
        reference = ImageReference(host=host, name="base", tag="v1")
        OciRegistry().push(reference, make_index(blobs, make_shell_base(blobs)), blobs, lambda _: None)
        made = shop.images().make(shop.repository, [HERE], shop.told.append)
    shop.told.clear()
    assert shop.images().make(shop.repository, [HERE], shop.told.append) == made
    (told,) = shop.told
    assert host in told
    (shop.repository / "Dockerfile").write_text(f"FROM {reference}\nENV A=b\n")
    with pytest.raises(FlopsError) as caught:
        shop.images().make(shop.repository, [HERE], shop.told.append)
    assert caught.value.code is ErrorCode.REGISTRY_UNREACHABLE


def test_a_platform_that_cannot_be_run_is_refused_before_anything_is_fetched(shop: Shop) -> None:
    other = next(platform for platform in Platform if platform is not HERE)
    (shop.repository / "Dockerfile").write_text("FROM 127.0.0.1:1/away\nRUN true\n")
    with pytest.raises(FlopsError) as caught:
        shop.images().make(shop.repository, [HERE, other], shop.told.append)
    assert caught.value.code is ErrorCode.IMAGE_BUILD_FAILED
    assert other in caught.value.message
    assert "qemu" in caught.value.hint
    error = shop.failure(f"FROM --platform={other} {shop.base}\n")
    assert error.code is ErrorCode.DOCKERFILE_FAILED
    assert other in error.message


def test_without_buildah_it_is_said(shop: Shop) -> None:
    (shop.repository / "Dockerfile").write_text(f"FROM {shop.base}\n")
    images = shop.images(Buildah(ENVIRON, program="no-buildah"))
    with pytest.raises(FlopsError) as caught:
        images.make(shop.repository, [HERE], shop.told.append)
    assert caught.value.code is ErrorCode.IMAGE_BUILD_FAILED
    assert "apt-get install buildah" in caught.value.hint


@pytest.mark.root
def test_a_disk_that_fills_is_told_as_such(shop: Shop) -> None:
    with small_disk(shop.folder / "layers", "30m"):
        error = shop.failure(f"FROM {shop.base}\nRUN dd if=/dev/zero of=/big bs=1000000 count=60\n")
        assert error.code is ErrorCode.DISK_FULL
        assert shop.leftovers() == []


CONFINED = """
import json, sys
from functools import partial
from pathlib import Path
from flops.adapters.confinement import Confinement, confine
from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.buildah import Buildah
from flops.adapters.images.builds_apart import part_with
from flops.adapters.images.container_folder import lay_out
from flops.adapters.images.dockerfile_images import DockerfileImages
from flops.adapters.registry_client.client import OciRegistry
from flops.core.platforms import Platform
given = json.loads(sys.argv[1])
folder = Path(given["folder"])
builds = part_with(lambda: Buildah({}, hidden=[str(folder)]), folder)
confine(Confinement((str(folder),), (str(folder / "repository"), given["modules"]),
                    (str(folder / "layers"), str(folder / "layout"))))
try:
    (folder / "anywhere").write_text("x")
except PermissionError:
    print("confined", flush=True)
blobs = FileBlobs(folder / "layout", is_oci_layout=True)
images = DockerfileImages(folder / "layers", blobs, OciRegistry(), builds,
                          partial(FileBlobs, is_oci_layout=True), runs_here=lambda _: True)
print(images.make(folder / "repository", [Platform(given["platform"])], partial(print, flush=True)).digest)
"""


def confined_builder(shop: Shop, dockerfile: str) -> subprocess.Popen[str]:
    """What a builder does: part with the process that runs Dockerfiles, be confined, have one run."""
    (shop.repository / "Dockerfile").write_text(dockerfile)
    (shop.folder / "layers").mkdir(exist_ok=True)
    given = {"folder": str(shop.folder), "platform": HERE, "modules": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", CONFINED, json.dumps(given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.root
@pytest.mark.skipif(not landlock_version(), reason="needs Landlock")
def test_a_confined_builder_has_its_dockerfile_run_and_begins_anew_after_a_kill(shop: Shop) -> None:
    with confined_builder(shop, f"FROM {shop.base}\nRUN {ENDLESS}\n") as builder:
        until(lambda: bool(processes_of(ENDLESS)), "the endless step", timeout_s=30)
        (left,) = shop.leftovers()
        os.kill(builder.pid, signal.SIGKILL)
        until(lambda: not processes_of(ENDLESS), "the end of the endless step", timeout_s=10)
        assert str(left) not in Path("/proc/mounts").read_text()
    with confined_builder(shop, f"FROM {shop.base}\nRUN echo made > /made\n") as builder:
        told, _ = builder.communicate(timeout=60)
    assert builder.returncode == 0, told
    assert told.startswith("confined\n")
    assert "STEP 2/2" in told
    until(lambda: shop.leftovers() == [], "the end of what was left")
    digest = told.split()[-1]
    assert shop.blobs.has(digest)  # type: ignore[arg-type]


@pytest.fixture
def apart(shop: Shop) -> Iterator[BuildsApart]:
    builds = part_with(lambda: Buildah(ENVIRON), shop.folder)
    yield builds
    builds.close()


def test_the_process_apart_tells_failures_and_goes_on(shop: Shop, apart: BuildsApart) -> None:
    (shop.repository / "Dockerfile").write_text(f"FROM {shop.base}\nRUN exit 9\n")
    with pytest.raises(FlopsError) as caught:
        shop.images(apart).make(shop.repository, [HERE], shop.told.append)
    assert caught.value.code is ErrorCode.DOCKERFILE_FAILED
    (shop.repository / "Dockerfile").write_text(f"FROM {shop.base}\nRUN exit 0\n")
    shop.images(apart).make(shop.repository, [HERE], shop.told.append)
    assert [line for line in shop.told if "step 2 of 2 (RUN exit 0)" in line]


def test_what_nobody_needs_any_more_ends_with_the_process_apart(shop: Shop, apart: BuildsApart) -> None:
    (shop.repository / "Dockerfile").write_text(f"FROM {shop.base}\nRUN {ENDLESS}\n")
    is_needless = threading.Event()

    def build() -> None:
        with stopped_when(is_needless.is_set), pytest.raises(StoppedError):
            shop.images(apart).make(shop.repository, [HERE], shop.told.append)

    thread = threading.Thread(target=build)
    thread.start()
    until(lambda: bool(processes_of(ENDLESS)), "the endless step", timeout_s=30)
    is_needless.set()
    thread.join(10)
    assert not thread.is_alive()
    assert processes_of(ENDLESS) == []
    assert shop.leftovers() == []


def test_the_process_apart_runs_nothing_in_other_folders(shop: Shop, tmp_path: Path) -> None:
    (shop.folder / "elsewhere").mkdir()
    builds = part_with(lambda: Buildah(ENVIRON), shop.folder / "elsewhere")
    (shop.repository / "Dockerfile").write_text(f"FROM {shop.base}\n")
    try:
        with pytest.raises(FlopsError) as caught:
            shop.images(builds).make(shop.repository, [HERE], shop.told.append)
        assert caught.value.code is ErrorCode.FORBIDDEN
    finally:
        builds.close()


USER = 12345


def as_a_user(folder: Path, has_more_ids: bool, work: Callable[[], None]) -> bool:
    """Do something in a child process as another user than root; whether it went well."""
    (folder / "passwd").write_text(f"{Path('/etc/passwd').read_text()}tester:x:{USER}:{USER}::/tmp:/bin/sh\n")
    (folder / "ids").write_text("tester:600100000:65536\n" if has_more_ids else "")
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    try:
        assert ctypes.CDLL(None).unshare(0x0002_0000) == 0  # mounts of its own
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        for name, target in (("passwd", "passwd"), ("ids", "subuid"), ("ids", "subgid")):
            subprocess.run(["mount", "--bind", folder / name, f"/etc/{target}"], check=True)
        os.setgroups([])
        os.setgid(USER)
        os.setuid(USER)
        work()
        os._exit(0)
    except BaseException:  # noqa: BLE001 (it must not come back into the tests' runner)
        traceback.print_exc()
    os._exit(1)


@pytest.mark.chaos
@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.skipif(shutil.which("newuidmap") is None, reason="needs uidmap")
@pytest.mark.skipif(not Path("/etc/subuid").exists(), reason="needs /etc/subuid")
@pytest.mark.parametrize("has_more_ids", [True, False])
def test_a_node_without_root_runs_dockerfiles_with_the_ids_it_was_given(
    tmp_path: Path, has_more_ids: bool
) -> None:
    blobs, written = FileBlobs(tmp_path / "blobs"), io.BytesIO()
    image = make_shell_base(blobs, "cat", "chown")
    text = "FROM base\nRUN cat /proc/self/uid_map; echo x > /x; chown 33:33 /x\n"
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        folder = Path(home, "build")
        folder.mkdir()
        lay_out(folder, text, {}, [image], blobs, partial(FileBlobs, is_oci_layout=True))
        for path in (folder, *folder.rglob("*")):
            os.chown(path, USER, USER)

        def run() -> None:
            build = ContainerBuild(folder, HERE, ("base",), 50.0)
            if has_more_ids:
                Buildah(ENVIRON, output=written).run(build, lambda _: None)
                assert f"0      {USER}          1" in written.getvalue().decode()
                assert {path.stat().st_uid for path in folder.rglob("*") if not path.is_symlink()} == {USER}
                shutil.rmtree(folder / "made")
                return
            with pytest.raises(FlopsError) as caught:
                Buildah(ENVIRON, output=written).run(build, lambda _: None)
            assert caught.value.code is ErrorCode.IMAGE_BUILD_FAILED
            assert "No Dockerfile can be run on this machine" in caught.value.message
            assert "subuid" in caught.value.hint

        assert as_a_user(Path(home), has_more_ids, run)
