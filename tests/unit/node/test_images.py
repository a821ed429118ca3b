"""How a node brings images: once, for its platform, and not at all when all parts are here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.layout import ImageLayout
from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.registry_client.client import OciRegistry
from flops.adapters.system_clock import SystemClock
from flops.core.image_reference import ImageReference, parse_reference
from flops.core.images import Descriptor
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.node.images import NodeImages, shrink_images
from flops.testing.images import make_image, make_index, make_layer, own_registry

NAME = "flops/p1/learner"


class PlayedEngine:
    """A container engine that has what it was given, unless a container uses it."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, Descriptor]] = []
        self.has: set[str] = set()
        self.used: set[str] = set()

    def load(self, reference: ImageReference, image: Descriptor) -> str:
        self.loaded.append((str(reference), image))
        self.has.add(reference.name)
        return "its name"

    def unload(self, reference: ImageReference, image: Descriptor) -> bool:
        is_free = reference.name not in self.used
        if is_free:
            self.has.discard(reference.name)
        return is_free


def ignore(_: str) -> None:
    pass


class Place:
    """A registry that has an image for both platforms, and a node without any."""

    def __init__(self, folder: Path, host: str) -> None:
        self.host = host
        self.registry = OciRegistry(first_pause_s=0.01)
        self._made = made = FileBlobs(folder / "made")
        self.images = {p: make_image(made, "base", p.architecture, platform=p) for p in Platform}
        index = make_index(made, *self.images.values())
        self.image = f"{NAME}@sha256:{index.digest}"
        target = ImageReference(host=host, name=NAME, tag="x")
        self.registry.push(target, index, made, lambda _: None)
        self.folder = folder / "node"
        self.blobs = FileBlobs(self.folder, is_oci_layout=True)
        self.names = ImageLayout(self.folder, self.blobs)
        self.engine = PlayedEngine()

    @property
    def loaded(self) -> list[tuple[str, Descriptor]]:
        return self.engine.loaded

    def node(self, cluster: str | None = None) -> NodeImages:
        return NodeImages(
            self.registry,
            self.blobs,
            self.names,
            self.engine,
            cluster=cluster or self.host,
            platform=Platform.ARM64,
        )

    def bring(self, image: str, cluster: str | None = None) -> list[str]:
        told: list[str] = []
        assert self.node(cluster).bring(image, told.append) == "its name"
        return told

    def push(self, name: str, *layers: str) -> str:
        """Push another image; returns its name with its digest."""
        image = make_image(self._made, *layers, platform=Platform.ARM64)
        index = make_index(self._made, image)
        self.registry.push(ImageReference(host=self.host, name=name, tag="x"), index, self._made, ignore)
        return f"{name}@sha256:{index.digest}"

    def give_up(self, *, in_use: str = "", days: float = 0.0, is_disk_low: bool = False) -> None:
        """Look after the images after so many days, while a service has an image of this name."""
        digests = {in_use.rpartition("@sha256:")[2]}
        now_s = SystemClock().now_s() + days * 86_400
        self.node().give_up(self.blobs, digests, now_s, is_disk_low=is_disk_low)

    def age(self, by_s: float) -> None:
        """Have all parts be used last so long ago."""
        at_s = SystemClock().now_s() - by_s
        for path in (self.folder / "blobs").rglob("*"):
            os.utime(path, (at_s, at_s))


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
    shrink_images(place.blobs, now_s, is_disk_low=is_disk_low, max_bytes=10**12)
    assert place.blobs.digests() == (parts if stays else [])
    assert bool(place.bring(place.image)) is not stays
    assert place.blobs.digests() == parts


def test_an_image_of_another_registry_is_asked_of_that(place: Place) -> None:
    place.bring(f"{place.host}/{place.image}", cluster="127.0.0.1:1")
    assert place.loaded


def test_beyond_their_size_parts_go_that_were_used_longest_ago_but_none_that_a_build_may_need(
    place: Place,
) -> None:
    place.bring(place.image)
    needed = place.node().parts_in_use({place.image.rpartition("@sha256:")[2]})
    assert len(needed) == 4  # manifest, config, two layers
    old, lately = place.blobs.put(b"old" * 5_000), place.blobs.put(b"lately" * 5_000)
    place.age(3 * 3_600)
    place.blobs.has(lately)
    now_s = SystemClock().now_s()
    shrink_images(place.blobs, now_s, is_disk_low=False, max_bytes=10**9, needed=needed)
    assert place.blobs.has(old)
    place.age(3 * 3_600)
    place.blobs.has(lately)
    shrink_images(place.blobs, now_s, is_disk_low=False, max_bytes=0, needed=needed)
    assert not place.blobs.has(old)
    assert {lately, *needed} <= set(place.blobs.digests())
    place.age(3 * 3_600)
    shrink_images(place.blobs, now_s, is_disk_low=False, max_bytes=0)
    assert place.blobs.digests() == []


@pytest.mark.parametrize(
    ("days", "is_disk_low", "stays"), [(13, False, True), (15, False, False), (1, True, False)]
)
def test_the_engine_keeps_images_that_were_used_lately_or_are_in_use(
    place: Place, days: int, is_disk_low: bool, stays: bool
) -> None:
    place.bring(place.image)
    place.give_up(days=days, is_disk_low=is_disk_low, in_use=place.image)
    assert place.engine.has == {NAME}
    place.engine.used = {NAME}
    place.give_up(days=days, is_disk_low=is_disk_low)
    assert place.engine.has == {NAME}
    assert len(place.names.images()) == 1
    place.engine.used = set()
    place.give_up(days=days, is_disk_low=is_disk_low)
    assert place.engine.has == ({NAME} if stays else set())
    assert len(place.names.images()) == (1 if stays else 0)


def test_an_image_that_left_the_registry_goes_after_an_hour_with_the_parts_that_only_it_has(
    place: Place,
) -> None:
    other = place.push("flops/p2/learner", "base", "of its own")
    third = place.push("flops/p3/learner", "built again")
    for image in (place.image, other, third):
        place.bring(image)
    for name in ("flops/p2/learner", "flops/p3/learner"):
        place.registry.delete(ImageReference(host=place.host, name=name, tag="x"))
    place.give_up()
    assert place.engine.has == {NAME, "flops/p2/learner", "flops/p3/learner"}  # used within the hour
    place.age(2 * 3_600)
    blobs = MemoryBlobs()
    base, own, again = (
        make_layer(blobs, layer).blob.digest for layer in ("base", "of its own", "built again")
    )
    place.blobs.has(again)  # by a builder
    place.give_up()
    assert place.engine.has == {NAME}
    assert [place.blobs.has(part) for part in (base, own, again)] == [True, False, True]
    assert place.bring(place.image) == []


def test_while_the_registry_is_away_nothing_has_left_it(place: Place) -> None:
    host = place.host
    image = place.push("flops/p2/learner", "one")
    place.bring(image)
    place.age(2 * 3_600)
    place.registry.delete(ImageReference(host=host, name="flops/p2/learner", tag="x"))
    listed = place.names.images()
    (name,) = listed
    place.names.remove(name)
    place.names.put(name.replace(host, "127.0.0.1:1"), listed[name])
    place.give_up()
    assert place.engine.has == {"flops/p2/learner"}


def test_an_image_that_has_lost_a_part_is_given_up(place: Place) -> None:
    place.bring(place.image)
    place.blobs.remove(place.names.images()[f"{place.host}/{place.image}"].digest)
    place.give_up()
    assert place.engine.has == set()
    assert place.names.images() == {}
