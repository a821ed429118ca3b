"""Images assembled by uv for real, from wheels made by hand: same bytes, kills, races, damage, full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import uv

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.assembler import OciAssembler
from flops.command import StoppedError, stopped_when
from flops.core.images import Descriptor, Layer
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs, ImageRecipe
from flops.settings import inherited_environment
from flops.testing.contracts.image_assembler import ImageAssemblerContract, images_of
from flops.testing.disk import small_disk
from flops.testing.images import HandMadeBase, unpack_layer
from flops.testing.waiting import until
from flops.testing.wheels import lock_of, make_source_package, make_wheel, use_only

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
AMD64 = (Platform.AMD64,)


class Site:
    """A folder with wheels, and what is built from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        self.root = folder / "images"
        self.environ = {**inherited_environment(), **use_only(self.wheels, folder / "cache")}

    @property
    def blobs(self) -> FileBlobs:
        return FileBlobs(self.root / "layout", is_oci_layout=True)

    def assembler(self, *, program: str | None = None) -> OciAssembler:
        return OciAssembler(
            self.root / "layers",
            self.blobs,
            HandMadeBase(),
            uv=Path(program or uv.find_uv_bin()),
            environ=self.environ,
        )

    def wheel(self, name: str, **options: object) -> Path:
        return make_wheel(self.wheels, name, "1", modules=[name, f"{name}.tests"], **options)  # type: ignore[arg-type]

    def lock(self, *names: str) -> str:
        return lock_of(*(self.wheel(name) for name in names), python=MINOR)

    def layers(self, index: Descriptor) -> list[Path]:
        """Files of the layers of an image for linux/amd64: base, dependencies, code."""
        manifest = images_of(self.blobs, index)[Platform.AMD64]
        return [self.root / "layout" / "blobs" / "sha256" / layer.digest for layer in manifest.layers]

    def notes(self) -> list[str]:
        return [
            path.name for path in (self.root / "layers").iterdir() if path.suffix not in {".json", ".lock"}
        ]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def ignore(_message: str) -> None:
    pass


class TestOciAssembler(ImageAssemblerContract):
    @pytest.fixture
    def assembler(self, site: Site) -> OciAssembler:
        return site.assembler()

    @pytest.fixture
    def blobs(self, site: Site) -> ImageBlobs:
        return site.blobs

    @pytest.fixture
    def lock(self, site: Site) -> str:
        return site.lock("pure")

    @pytest.fixture
    def conflict(self, site: Site) -> str:
        tag = f"cp{MINOR.replace('.', '')}-cp{MINOR.replace('.', '')}-manylinux_2_28_x86_64"
        return lock_of(site.wheel("onlyx", tag=tag), python=MINOR)


def write_tree(folder: Path, *, modified_s: int) -> Path:
    (folder / "package" / "__pycache__").mkdir(parents=True)
    (folder / "package" / "__init__.py").write_text(
        "NAMES = {'a', 'b', 'c'}\n\ndef f(x): return x in {1, 2}\n"
    )
    (folder / "package" / "__pycache__" / "old.pyc").write_bytes(os.urandom(8))
    (folder / "broken.py").write_text("this is no Python\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o700)
    (folder / "link").symlink_to("package")
    for path in folder.rglob("*"):
        os.utime(path, (modified_s, modified_s), follow_symlinks=False)
    return folder


def test_the_same_input_gives_the_same_bytes_wherever_and_whenever_it_is_built(tmp_path: Path) -> None:
    digests = []
    for number in range(2):
        site = Site(tmp_path / f"site{number}")
        tree = write_tree(site.folder / "tree", modified_s=1_700_000_000 + number)
        recipe = ImageRecipe(
            tuple(Platform), site.lock("one", "two"), {"app/x.py": b"x = 1\n"}, {"app": tree}
        )
        digests.append(site.assembler().assemble(recipe, ignore))
    assert digests[0] == digests[1]


def test_a_tree_is_taken_with_its_links_and_without_its_bytecode(site: Site) -> None:
    tree = write_tree(site.folder / "tree", modified_s=1)
    index = site.assembler().assemble(ImageRecipe(AMD64, folders={"/app/code": tree}), ignore)
    manifest = images_of(site.blobs, index)[Platform.AMD64]
    members = unpack_layer(site.blobs, manifest.layers[-1], site.folder / "unpacked")
    assert {name for name, member in members.items() if not member.isdir()} == {
        "app/code/broken.py",
        "app/code/link",
        "app/code/package/__init__.py",
        f"app/code/package/__pycache__/__init__.cpython-{MINOR.replace('.', '')}.pyc",
        "app/code/run.sh",
    }
    assert members["app/code/link"].linkname == "package"
    assert members["app/code/run.sh"].mode == 0o755
    assert members["app/code/broken.py"].mode == 0o644


def test_bytecode_names_the_place_in_the_image_and_tests_have_none(site: Site) -> None:
    index = site.assembler().assemble(ImageRecipe(AMD64, site.lock("pure")), ignore)
    layer = images_of(site.blobs, index)[Platform.AMD64].layers[-2]
    members = unpack_layer(site.blobs, layer, site.folder / "unpacked")
    place = f"opt/env/lib/python{MINOR}/site-packages/pure"
    (compiled,) = [name for name in members if name.endswith(".pyc")]
    assert compiled.startswith(f"{place}/__pycache__/")
    assert f"/{place}/__init__.py".encode() in (site.folder / "unpacked" / compiled).read_bytes()
    assert str(site.folder) not in "".join(members)
    assert members["opt/env/bin/python"].linkname == "/usr/bin/python3"


def test_nothing_of_this_machine_is_in_a_layer(site: Site) -> None:
    index = site.assembler().assemble(ImageRecipe(AMD64, site.lock("pure")), ignore)
    layer = images_of(site.blobs, index)[Platform.AMD64].layers[-2]
    members = unpack_layer(site.blobs, layer, site.folder / "unpacked")
    assert not [name for name in members if name.endswith(("uv_cache.json", "direct_url.json", ".lock"))]
    for path in (site.folder / "unpacked").rglob("*"):
        if path.is_file():
            assert str(site.folder).encode() not in path.read_bytes()
            assert b"uv_cache.json" not in path.read_bytes()


def test_a_change_of_code_runs_no_uv(site: Site) -> None:
    lock = site.lock("pure")
    site.assembler().assemble(ImageRecipe(AMD64, lock, {"app/x.py": b""}), ignore)
    without = site.assembler(program="/nowhere/uv")
    told: list[str] = []
    without.assemble(ImageRecipe(AMD64, lock, {"app/x.py": b"x = 2\n"}), told.append)
    assert not [line for line in told if "packages" in line]


@pytest.mark.parametrize("damage", [b"", b"other bytes"], ids=["emptied", "changed"])
@pytest.mark.parametrize("number", [-2, -1], ids=["dependencies", "code"])
def test_a_damaged_layer_is_made_anew(site: Site, number: int, damage: bytes) -> None:
    recipe = ImageRecipe(AMD64, site.lock("pure"), {"app/x.py": b"x = 1\n"})
    index = site.assembler().assemble(recipe, ignore)
    path = site.layers(index)[number]
    intact = path.read_bytes()
    path.write_bytes(damage)
    told: list[str] = []
    assert site.assembler().assemble(recipe, told.append) == index
    assert path.read_bytes() == intact
    assert any("damaged" in line for line in told)


@pytest.mark.parametrize("text", ["", "{}", '{"blob": 1}'])
def test_a_damaged_record_of_a_layer_is_written_anew(site: Site, text: str) -> None:
    recipe = ImageRecipe(AMD64, site.lock("pure"))
    index = site.assembler().assemble(recipe, ignore)
    for record in (site.root / "layers").glob("*.json"):
        record.write_text(text)
    assert site.assembler().assemble(recipe, ignore) == index
    for record in (site.root / "layers").glob("*.json"):
        Layer.model_validate_json(record.read_bytes())


def test_two_builds_at_once_make_each_layer_once(site: Site) -> None:
    recipe = ImageRecipe(AMD64, site.lock("pure"), {"app/x.py": b"x = 1\n"})
    told: list[str] = []
    found: list[Descriptor] = []
    threads = [
        threading.Thread(target=lambda: found.append(site.assembler().assemble(recipe, told.append)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len({index.digest for index in found}) == 1
    assert sum("packages for linux/amd64 is being made." in line for line in told) == 1
    assert sum("code is being made of" in line for line in told) == 1


BUILD = """
import json, sys
from pathlib import Path
from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.assembler import OciAssembler
from flops.core.platforms import Platform
from flops.image_ports import ImageRecipe
from flops.testing.images import HandMadeBase
given = json.loads(sys.argv[1])
root = Path(given["root"])
blobs = FileBlobs(root / "layout", is_oci_layout=True)
assembler = OciAssembler(
    root / "layers", blobs, HandMadeBase(), uv=Path(given["uv"]), environ=given["environ"]
)
assembler.assemble(ImageRecipe((Platform.AMD64,), given["lock"]), print)
"""


def test_a_build_that_was_killed_is_begun_anew(site: Site) -> None:
    lock = site.lock(*(f"part{number}" for number in range(30)))
    given = {"root": str(site.root), "uv": uv.find_uv_bin(), "environ": site.environ, "lock": lock}
    moments = (
        "layers/*-*/lock.txt",
        "layers/*-*/root/opt/env/lib/*/site-packages/part*",
        "layers/*-*/root/opt/env/pyvenv.cfg",
    )
    for moment in moments:
        with subprocess.Popen(
            [sys.executable, "-c", BUILD, json.dumps(given)],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        ) as builder:
            deadline_s = time.monotonic() + 30
            while builder.poll() is None and not _exists(site.root, moment):
                assert time.monotonic() < deadline_s
            os.kill(builder.pid, signal.SIGKILL)
        assert site.notes(), "the build was over before it was killed"
    index = site.assembler().assemble(ImageRecipe(AMD64, lock), ignore)
    assert all(path.stat().st_size > 0 for path in site.layers(index))
    assert site.notes() == []
    assert not list((site.root / "layout" / "incoming").iterdir())


def _exists(root: Path, pattern: str) -> bool:
    try:
        return any(root.glob(pattern))
    except FileNotFoundError:  # a folder went while it was looked through
        return False


def test_a_build_that_nobody_needs_any_more_ends_and_leaves_nothing(site: Site) -> None:
    pid_file = site.folder / "pid"
    endless = site.folder / "endless"
    endless.write_text(f"#!/bin/sh\necho $$ > {pid_file}\nexec sleep 3600\n")
    endless.chmod(0o700)
    lock = site.lock("pure")
    is_needless = threading.Event()

    def build() -> None:
        with stopped_when(is_needless.is_set), pytest.raises(StoppedError):
            site.assembler(program=str(endless)).assemble(ImageRecipe(AMD64, lock), ignore)

    thread = threading.Thread(target=build)
    thread.start()
    until(lambda: pid_file.exists() and pid_file.read_text().strip() != "", "the build")
    asked_s = time.monotonic()
    is_needless.set()
    thread.join(10)
    assert time.monotonic() - asked_s < 3
    assert not psutil.pid_exists(int(pid_file.read_text()))
    assert site.notes() == []
    site.assembler().assemble(ImageRecipe(AMD64, lock), ignore)


def test_a_failure_for_one_platform_is_told_without_waiting_for_the_others(site: Site) -> None:
    program = site.folder / "slow-for-amd64"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *x86_64*) exec sleep 3600 ;; esac\nexec {uv.find_uv_bin()} "$@"\n'
    )
    program.chmod(0o700)
    tag = f"cp{MINOR.replace('.', '')}-cp{MINOR.replace('.', '')}-manylinux_2_28_x86_64"
    lock = lock_of(site.wheel("onlyx", tag=tag), python=MINOR)
    with pytest.raises(FlopsError) as caught:
        site.assembler(program=str(program)).assemble(ImageRecipe(tuple(Platform), lock), ignore)
    assert caught.value.code is ErrorCode.DEPENDENCIES_UNRESOLVABLE
    assert "linux/arm64" in caught.value.message
    assert site.notes() == []


def test_bytes_other_than_those_locked_are_refused(site: Site) -> None:
    lock = site.lock("pure")
    make_wheel(site.wheels, "pure", "1", modules=["pure", "evil"])
    with pytest.raises(FlopsError) as caught:
        site.assembler().assemble(ImageRecipe(AMD64, lock), ignore)
    assert caught.value.code is ErrorCode.IMAGE_BUILD_FAILED
    assert "pure" in caught.value.message


def test_a_package_that_is_not_there_is_named(site: Site) -> None:
    lock = site.lock("pure")
    site.wheels.joinpath("pure-1-py3-none-any.whl").unlink()
    with pytest.raises(FlopsError) as caught:
        site.assembler().assemble(ImageRecipe(AMD64, lock), ignore)
    assert caught.value.code is ErrorCode.DEPENDENCIES_UNRESOLVABLE
    assert "pure" in caught.value.message


def test_a_package_that_has_only_sources_is_refused_with_what_helps(site: Site) -> None:
    source = make_source_package(site.wheels, "onlysource", {"setup.py": "1 / 0\n"})  # its code does not run
    lock = lock_of(source, python=MINOR)
    with pytest.raises(FlopsError) as caught:
        site.assembler().assemble(ImageRecipe(AMD64, lock), ignore)
    assert caught.value.code is ErrorCode.DEPENDENCIES_UNRESOLVABLE
    assert caught.value.message.startswith(
        "There are no wheels of all dependencies for linux/amd64: Because onlysource==1 has no usable wheels"
    )
    assert "packaging: environment" in caught.value.hint


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("size", ["96k", "1m", "3200k"])
def test_a_full_disk_is_told_and_the_next_build_works(site: Site, size: str) -> None:
    lock = lock_of(site.wheel("big", data_bytes=3_000_000), python=MINOR)
    recipe = ImageRecipe(AMD64, lock, {"app/noise": os.urandom(2_000_000)})
    with small_disk(site.folder / "disk", size):
        site.root = site.folder / "disk" / "images"
        with pytest.raises(FlopsError) as caught:
            site.assembler().assemble(recipe, ignore)
        assert caught.value.code is ErrorCode.DISK_FULL
        assert site.notes() == []
        subprocess.run(["mount", "-o", "remount,size=30m", str(site.folder / "disk")], check=True)
        index = site.assembler().assemble(recipe, ignore)
        assert all(path.stat().st_size > 0 for path in site.layers(index))
