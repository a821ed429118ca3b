"""Bases of images keep one contract, whether they are made here or come from a registry."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import uv

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.debian_base import DebianBase
from flops.adapters.images.pulled_base import PulledBase
from flops.adapters.registry_client.client import OciRegistry
from flops.core.image_reference import ImageReference
from flops.core.images import (
    CONFIG,
    MANIFEST,
    Descriptor,
    ImageRun,
    Layer,
    config_bytes,
    manifest_bytes,
)
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import BaseImages, ImageBlobs
from flops.settings import inherited_environment
from flops.testing.contracts.base_images import BaseImagesContract, files_of
from flops.testing.images import HandMadeBase, free_port, make_image, make_index, own_registry


def ignore(_message: str) -> None:
    pass


class TestHandMadeBase(BaseImagesContract):
    @pytest.fixture
    def bases(self) -> BaseImages:
        return HandMadeBase()


def push_base(host: str, blobs: ImageBlobs, *names: str, tag: str = "v1") -> ImageReference:
    """Push an image that can be a base; returns its name."""
    reference = ImageReference(host=host, name="base", tag=tag)
    images = [
        make_image(blobs, *names, platform.architecture, platform=platform.value) for platform in Platform
    ]
    OciRegistry().push(reference, make_index(blobs, *images), blobs, ignore)
    return reference


class TestPulledBase(BaseImagesContract):
    @pytest.fixture
    def bases(self, tmp_path: Path) -> Iterator[BaseImages]:
        with own_registry(tmp_path / "registry") as host:
            reference = push_base(host, FileBlobs(tmp_path / "pushed"), "system", "/usr/local/bin/python3.12")
            yield PulledBase(tmp_path / "bases", OciRegistry(), reference)


@pytest.fixture
def here(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "here")


def test_what_a_base_is_is_read_from_it(tmp_path: Path, here: FileBlobs) -> None:
    with own_registry(tmp_path / "registry") as host:
        reference = push_base(host, FileBlobs(tmp_path / "pushed"), "/usr/local/bin/python3.12", "more")
        base = PulledBase(tmp_path / "bases", OciRegistry(), reference).base(Platform.ARM64, here, ignore)
    assert (base.python, base.interpreter) == ("3.12", "/usr/local/bin/python3.12")
    assert len(base.layers) == 3
    assert "/files/arm64" in files_of(here, base)


def test_a_base_is_taken_as_it_was_while_its_registry_is_away(tmp_path: Path, here: FileBlobs) -> None:
    registry = OciRegistry(first_pause_s=0.001)
    port = free_port()
    with own_registry(tmp_path / "registry", port=port) as host:
        reference = push_base(host, FileBlobs(tmp_path / "pushed"), "/usr/bin/python3.11")
        bases = PulledBase(tmp_path / "bases", registry, reference)
        first = bases.base(Platform.AMD64, here, ignore)
    told: list[str] = []
    assert bases.base(Platform.AMD64, here, told.append) == first
    assert reference.host in told[0]
    with pytest.raises(FlopsError) as caught:
        bases.base(Platform.ARM64, here, ignore)
    assert caught.value.code is ErrorCode.REGISTRY_UNREACHABLE


def test_a_base_by_its_digest_is_asked_for_once(tmp_path: Path, here: FileBlobs) -> None:
    with own_registry(tmp_path / "registry") as host:
        reference = push_base(host, FileBlobs(tmp_path / "pushed"), "/usr/bin/python3.11")
        pinned = reference.at(OciRegistry().find(reference).digest)
        bases = PulledBase(tmp_path / "bases", OciRegistry(first_pause_s=0.001), pinned)
        first = bases.base(Platform.AMD64, here, ignore)
    told: list[str] = []
    assert bases.base(Platform.AMD64, here, told.append) == first
    assert told == []


def test_a_newer_base_of_the_same_tag_is_taken(tmp_path: Path, here: FileBlobs) -> None:
    with own_registry(tmp_path / "registry") as host:
        pushed = FileBlobs(tmp_path / "pushed")
        bases = PulledBase(tmp_path / "bases", OciRegistry(), push_base(host, pushed, "/usr/bin/python3.11"))
        bases.base(Platform.AMD64, here, ignore)
        push_base(host, pushed, "/usr/bin/python3.12")
        assert bases.base(Platform.AMD64, here, ignore).python == "3.12"


def test_an_image_without_a_python_is_no_base(tmp_path: Path, here: FileBlobs) -> None:
    with own_registry(tmp_path / "registry") as host:
        reference = push_base(host, FileBlobs(tmp_path / "pushed"), "/usr/bin/perl")
        with pytest.raises(FlopsError) as caught:
            PulledBase(tmp_path / "bases", OciRegistry(), reference).base(Platform.AMD64, here, ignore)
    assert caught.value.code is ErrorCode.IMAGE_BUILD_FAILED
    assert str(reference) in caught.value.message


def test_a_layer_that_is_no_archive_is_damaged(tmp_path: Path, here: FileBlobs) -> None:
    pushed = FileBlobs(tmp_path / "pushed")
    data = gzip.compress(b"no archive" * 1_000)
    blob = Descriptor(media_type="application/x", digest=pushed.put(data), size=len(data))
    config = config_bytes(Platform.AMD64, [Layer(blob=blob, diff_id=blob.digest)], ImageRun())
    described = Descriptor(media_type=CONFIG, digest=pushed.put(config), size=len(config))
    manifest = manifest_bytes(described, [blob])
    image = Descriptor(media_type=MANIFEST, digest=pushed.put(manifest), size=len(manifest))
    with own_registry(tmp_path / "registry") as host:
        reference = ImageReference(host=host, name="base", tag="v1")
        OciRegistry().push(reference, image, pushed, ignore)
        with pytest.raises(FlopsError) as caught:
            PulledBase(tmp_path / "bases", OciRegistry(), reference).base(Platform.AMD64, here, ignore)
    assert caught.value.code is ErrorCode.IMAGE_DAMAGED


def debian(folder: Path, **options: str) -> DebianBase:
    return DebianBase(folder, uv=Path(uv.find_uv_bin()), environ=inherited_environment(), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where bases of Debian are made once for all tests of them."""
    return tmp_path_factory.mktemp("debian")


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.skipif(not DebianBase.is_possible(), reason="needs mmdebstrap")
class TestDebianBase(BaseImagesContract):
    @pytest.fixture
    def bases(self, folder: Path) -> BaseImages:
        return debian(folder / "bases")

    @pytest.fixture
    def blobs(self, folder: Path) -> ImageBlobs:
        return FileBlobs(folder / "layout", is_oci_layout=True)

    def test_it_has_what_wheels_count_on_and_little_else(self, bases: BaseImages, blobs: ImageBlobs) -> None:
        base = bases.base(Platform.AMD64, blobs, ignore)
        files = files_of(blobs, base)
        assert {"/etc/passwd", "/etc/ssl/certs/ca-certificates.crt", "/bin/sh", "/app", "/tmp"} <= files
        assert [name for name in files if "/libgomp.so" in name]
        assert [name for name in files if "/libstdc++.so" in name]
        assert [name for name in files if name.endswith("/__pycache__/os.cpython-311.pyc")]
        assert sum(layer.blob.size for layer in base.layers) < 35_000_000

    def test_the_same_packages_give_the_same_bytes(
        self, bases: BaseImages, blobs: ImageBlobs, folder: Path
    ) -> None:
        again = debian(folder / "again").base(Platform.AMD64, blobs, ignore)
        assert again == bases.base(Platform.AMD64, blobs, ignore)


# Runs mmdebstrap as it runs for users: with no right but to its own folder, and without a user namespace.
AS_A_USER = """#!/bin/sh
folder=$(mktemp -d -p {folder}) && chown 12345:12345 "$folder" || exit 1
arguments=
for argument; do
  case $argument in
    --mode=*) argument=--mode=chrootless ;;
    *.tar) archive=$argument argument=$folder/base.tar ;;
  esac
  arguments="$arguments $argument"
done
TMPDIR=$folder HOME=$folder setpriv --reuid=12345 --regid=12345 --clear-groups mmdebstrap $arguments &&
  mv "$folder/base.tar" "$archive"
"""


@pytest.mark.chaos
@pytest.mark.root
@pytest.mark.timeout(600)
@pytest.mark.skipif(not DebianBase.is_possible(), reason="needs mmdebstrap")
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_users_make_the_same_base_as_root(folder: Path) -> None:
    blobs = FileBlobs(folder / "layout", is_oci_layout=True)
    expected = debian(folder / "bases").base(Platform.ARM64, blobs, ignore)
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        program = Path(home) / "as-a-user"
        program.write_text(AS_A_USER.format(folder=home))
        program.chmod(0o755)
        made = debian(folder / "of a user", mmdebstrap=str(program)).base(Platform.ARM64, blobs, ignore)
    assert made == expected


def test_a_machine_without_mmdebstrap_is_told_what_to_do(tmp_path: Path, here: FileBlobs) -> None:
    with pytest.raises(FlopsError) as caught:
        debian(tmp_path / "bases", mmdebstrap="/nowhere/mmdebstrap").base(Platform.AMD64, here, ignore)
    assert caught.value.code is ErrorCode.IMAGE_BUILD_FAILED
    assert "mmdebstrap" in caught.value.hint


def test_a_suite_that_is_not_known_is_refused(tmp_path: Path, here: FileBlobs) -> None:
    with pytest.raises(FlopsError) as caught:
        debian(tmp_path / "bases", suite="potato").base(Platform.AMD64, here, ignore)
    assert caught.value.code is ErrorCode.IMAGE_BUILD_FAILED
    assert "potato" in caught.value.message


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("E: Could not resolve 'mirror.example'", ErrorCode.UNREACHABLE),
        ("tar: write error: No space left on device", ErrorCode.DISK_FULL),
        ("E: unknown option", ErrorCode.IMAGE_BUILD_FAILED),
    ],
)
def test_what_went_wrong_with_packages_is_said(
    tmp_path: Path, here: FileBlobs, words: str, code: ErrorCode
) -> None:
    program = tmp_path / "mmdebstrap"
    program.write_text(f'#!/bin/sh\necho "{words}" >&2\nexit 25\n')
    program.chmod(0o700)
    with pytest.raises(FlopsError) as caught:
        debian(tmp_path / "bases", mmdebstrap=str(program)).base(Platform.AMD64, here, ignore)
    assert caught.value.code is code
    assert not list((tmp_path / "bases").glob("*.json"))
