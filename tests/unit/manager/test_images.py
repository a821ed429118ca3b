"""Images in the registry: what is listed, what goes and what stays, on the registry's own files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.system_clock import SystemClock
from flops.core.ids import ProjectId
from flops.core.images import MANIFEST
from flops.core.project import Images, Stage
from flops.manager.images import ImageShelf
from flops.registry.repositories import Repositories
from flops.testing.images import make_image, make_index, make_layer
from flops.testing.projects import PlayedCluster, played_cluster, sla_with
from flops.wire.rest import Image

SIZE = 50_000


class Shop:
    """A registry, and a manager whose projects have images in it."""

    def __init__(self, folder: Path, cluster: PlayedCluster) -> None:
        self.cluster = cluster
        self.blobs = FileBlobs(folder / "blobs")
        self.registry = Repositories(folder / "names", self.blobs)
        self._folder = folder

    def shelf(self, max_bytes: int = 10**9) -> ImageShelf:
        return self.cluster.shelf(self.registry, max_bytes=max_bytes)

    def push(self, name: str, *layers: str, age_s: float = 0.0, tag: str = "v1") -> str:
        """Push an image with these layers, as it was `age_s` ago; returns its name with its digest."""
        image = make_image(self.blobs, *layers, size=SIZE)
        index = make_index(self.blobs, image)
        self.registry.put(name, self.blobs.get(image.digest), MANIFEST)
        self.registry.put(name, self.blobs.get(index.digest), index.media_type, tag)
        at_s = SystemClock().now_s() - age_s
        for path in (self._folder / "names" / name / "_manifests").iterdir():
            os.utime(path, (at_s, at_s))
        return f"{name}@sha256:{index.digest}"

    def age_parts(self, by_s: float) -> None:
        at_s = SystemClock().now_s() - by_s
        for path in (self._folder / "blobs").rglob("*"):
            os.utime(path, (at_s, at_s))

    def begun(self) -> ProjectId:
        return self.cluster.engine.submit(sla_with()).id

    def ended(self) -> ProjectId:
        """A project that was stopped."""
        project_id = self.begun()
        self.cluster.engine.stop(project_id)
        self.cluster.wait(project_id, lambda project: project.stage is Stage.STOPPED)
        return project_id

    def served(self, image: str) -> ProjectId:
        """A completed project, whose model's image runs."""
        cluster = self.cluster
        project_id = self.begun()
        cluster.wait(project_id, lambda p: p.placement is not None)
        cluster.build(project_id)
        cluster.listen(project_id)
        cluster.join_learners(project_id)
        cluster.train(project_id)
        cluster.finish_training(project_id)
        cluster.serve(project_id)
        project = cluster.wait(project_id, lambda p: p.stage is Stage.COMPLETED)
        images = Images(aggregator="a", learner="l", inference=image.replace("PROJECT", project_id))
        cluster.store.save(
            project.model_copy(update={"images": images, "version": project.version + 1}), (), ()
        )
        return project_id


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with played_cluster() as cluster:
        yield Shop(tmp_path, cluster)


def by_name(images: tuple[Image, ...]) -> dict[str, Image]:
    return {image.name: image for image in images}


def test_images_are_listed_with_size_owner_and_use(shop: Shop) -> None:
    running, ended = shop.begun(), shop.ended()
    shop.push(f"flops/{running}/learner", "base", "one", age_s=100)
    shop.push(f"flops/{ended}/learner", "base", "two", age_s=50)
    shop.push("others/tool", "three", age_s=200)
    found = shop.shelf().all()
    assert [image.name for image in found.images] == [
        f"flops/{ended}/learner",
        f"flops/{running}/learner",
        "others/tool",
    ]
    images = by_name(found.images)
    mine = images[f"flops/{running}/learner"]
    assert (mine.project_id, mine.tags, mine.platforms) == (running, ("v1",), ("linux/amd64",))
    assert mine.use.startswith("its project is ")
    assert images[f"flops/{ended}/learner"].use == ""
    assert (images["others/tool"].project_id, images["others/tool"].use) == ("", "not FLOps' own")
    assert mine.size_bytes > 2 * SIZE > mine.own_bytes > SIZE
    assert found.size_bytes == sum(image.size_bytes for image in found.images) - (
        mine.size_bytes - mine.own_bytes
    )
    assert abs(mine.used_at_s - SystemClock().now_s() + 100) < 60


def test_only_what_nothing_uses_is_pruned_with_the_parts_that_are_its_own(shop: Shop) -> None:
    running, ended = shop.begun(), shop.ended()
    shop.push(f"flops/{running}/learner", "base", "one")
    shop.push(f"flops/{ended}/learner", "base", "two")
    shop.push("others/tool", "three")
    shop.push("flops/0123456789ab/learner", "base", "four")  # its project was deleted
    shop.age_parts(7_200)
    planned = shop.shelf().prune(is_dry_run=True)
    assert by_name(planned.images).keys() == {f"flops/{ended}/learner", "flops/0123456789ab/learner"}
    assert len(shop.registry.names()) == 4
    done = shop.shelf().prune()
    assert done.images == planned.images
    assert done.size_bytes == planned.size_bytes
    assert done.freed_bytes > 2 * SIZE
    assert shop.registry.names() == [f"flops/{running}/learner", "others/tool"]
    there = {
        layer: shop.blobs.has(make_layer(MemoryBlobs(), layer, SIZE).blob.digest)
        for layer in ("base", "one", "two", "three", "four")
    }
    assert there == {"base": True, "one": True, "two": False, "three": True, "four": False}
    assert shop.shelf().prune().images == ()


@pytest.mark.parametrize(
    ("is_building", "age_s", "is_freed"),
    [(False, 10, False), (False, 600, True), (True, 600, False), (True, 7_200, True)],
)
def test_what_was_sent_lately_may_belong_to_a_push_that_goes_on(
    shop: Shop, is_building: bool, age_s: float, is_freed: bool
) -> None:
    if is_building:
        shop.cluster.wait(shop.begun(), lambda project: project.stage is Stage.BUILDING)
    shop.push(f"flops/{shop.ended()}/learner", "one")
    shop.age_parts(age_s)
    done = shop.shelf().prune()
    assert len(done.images) == 1
    assert (done.freed_bytes > SIZE) is is_freed


def test_a_deployed_model_keeps_its_image_and_one_that_is_not_is_served_from_its_environment_later(
    shop: Shop,
) -> None:
    image = shop.push("flops/0123456789ab/model", "base", "model")
    project_id = shop.served(image.replace("0123456789ab", "PROJECT"))
    shop.registry.forget("flops/0123456789ab/model")
    shop.push(f"flops/{project_id}/model", "base", "model")
    engine = shop.cluster.engine
    model = engine.get(project_id).model
    assert model is not None
    engine.deployments.deploy(model.name)
    assert by_name(shop.shelf().all().images)[f"flops/{project_id}/model"].use
    assert shop.shelf().prune().images == ()
    engine.deployments.undeploy(model.name)
    for service in shop.cluster.orchestrator.services():
        shop.cluster.orchestrator.stop_service(service.spec.id)
    assert len(shop.shelf().prune().images) == 1
    images = engine.get(project_id).images
    assert images is not None
    assert images.inference == ""
    launch = engine.deployments.deploy(model.name).starting
    assert launch is not None
    (spec,) = [s.spec for s in shop.cluster.orchestrator.services() if s.spec.id == launch.service_id]
    assert (spec.image, spec.bundle) == ("", model.bundle)


def test_images_of_deleted_projects_go_by_themselves_and_others_stay(shop: Shop) -> None:
    ended = shop.ended()
    kept = [f"flops/{ended}/learner", "flops/base", "others/0123456789ab/learner"]
    for name in (*kept, "flops/0123456789ab/learner", "flops/0123456789ab/model"):
        shop.push(name, "layer")
    shop.shelf().tidy()
    assert shop.registry.names() == sorted(kept)
    assert shop.registry.tags("flops/0123456789ab/model") == []


def test_beyond_its_size_the_registry_gives_up_what_was_used_longest_ago(shop: Shop) -> None:
    running = shop.begun()
    shop.push(f"flops/{running}/learner", "base", "one", age_s=9_000)
    ended = [shop.ended() for _ in range(3)]
    for number, project_id in enumerate(ended):
        shop.push(f"flops/{project_id}/learner", "base", f"layer {number}", age_s=1_000 * (3 - number))
    shop.shelf(max_bytes=4 * SIZE).tidy()  # base, and a layer each, are almost five
    assert shop.registry.names() == sorted(f"flops/{p}/learner" for p in (running, *ended[2:]))
    shop.shelf(max_bytes=0).tidy()
    assert shop.registry.names() == [f"flops/{running}/learner"]


def test_to_ask_for_an_image_is_to_use_it_and_to_list_it_is_not(shop: Shop) -> None:
    image = shop.push(f"flops/{shop.ended()}/learner", "one", age_s=5_000)
    name, _, version = image.partition("@")
    (before,) = shop.shelf().all().images
    (again,) = shop.shelf().all().images
    assert again.used_at_s == before.used_at_s
    shop.registry.get(name, version)
    (after,) = shop.shelf().all().images
    assert after.used_at_s > before.used_at_s + 4_000
