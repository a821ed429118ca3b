"""How a node brings images: once, for its platform, and not at all when all parts are here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.layout import ImageLayout
from flops.adapters.registry_client.client import OciRegistry
from flops.adapters.system_clock import SystemClock
from flops.core.image_reference import ImageReference, parse_reference
from flops.core.images import Descriptor
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.node.images import NodeImages, shrink_images
from flops.testing.images import make_image, make_index, own_registry

NAME = "flops/p1/learner"


class Place:
    """A registry that has an image for both platforms, and a node without any."""

    def __init__(self, folder: Path, host: str) -> None:
        self.host = host
        self.registry = OciRegistry(first_pause_s=0.01)
        made = FileBlobs(folder / "made")
        self.images = {p: make_image(made, "base", p.architecture, platform=p) for p in Platform}
        index = make_index(made, *self.images.values())
        self.image = f"{NAME}@sha256:{index.digest}"
        target = ImageReference(host=host, name=NAME, tag="x")
        self.registry.push(target, index, made, lambda _: None)
        self.folder = folder / "node"
        self.blobs = FileBlobs(self.folder, is_oci_layout=True)
        self.loaded: list[tuple[str, Descriptor]] = []

    def load(self, reference: ImageReference, image: Descriptor) -> str:
        self.loaded.append((str(reference), image))
        return "its name"

    def bring(self, image: str, cluster: str | None = None) -> list[str]:
        told: list[str] = []
        images = NodeImages(
            self.registry,
            self.blobs,
            ImageLayout(self.folder, self.blobs),
            self.load,
            cluster=cluster or self.host,
            platform=Platform.ARM64,
        )
        assert images.bring(image, told.append) == "its name"
        return told


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with own_registry(tmp_path / "registry") as host:
        yield Place(tmp_path, host)


def test_the_image_for_this_platform_comes_from_the_cluster(place: Place) -> None:
    assert place.bring(place.image)
    reference, image = place.loaded[0]
    assert parse_reference(reference).host == place.host
    assert image.digest == place.images[Platform.ARM64].digest
    assert not place.blobs.has(place.images[Platform.AMD64].digest)


def test_an_image_that_is_here_is_not_asked_for_again(place: Place) -> None:
    place.bring(place.image)
    assert place.bring(place.image) == []
    assert place.loaded[1] == place.loaded[0]


def test_a_part_that_was_lost_is_brought_again(place: Place) -> None:
    place.bring(place.image)
    layer = place.blobs.digests()
    place.blobs.remove(layer[0])
    assert place.bring(place.image)
    assert place.blobs.has(layer[0])


def test_a_registry_that_is_away_is_told_as_what_passes(place: Place) -> None:
    with pytest.raises(FlopsError) as caught:
        place.bring(place.image, cluster="127.0.0.1:1")
    assert caught.value.code is ErrorCode.UNREACHABLE


@pytest.mark.parametrize(
    ("days", "is_disk_low", "stays"), [(13, False, True), (15, False, False), (1, True, False)]
)
def test_parts_that_nothing_used_lately_go_and_come_again(
    place: Place, days: int, is_disk_low: bool, stays: bool
) -> None:
    place.bring(place.image)
    parts = place.blobs.digests()
    now_s = SystemClock().now_s() + days * 86_400
    shrink_images(place.blobs, now_s, is_disk_low)
    assert place.blobs.digests() == (parts if stays else [])
    assert bool(place.bring(place.image)) is not stays
    assert place.blobs.digests() == parts


def test_an_image_of_another_registry_is_asked_of_that(place: Place) -> None:
    place.bring(f"{place.host}/{place.image}", cluster="127.0.0.1:1")
    assert place.loaded
