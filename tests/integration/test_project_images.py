"""The images of a project: made by the builder from hand-made wheels, and pushed to a registry."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uv

import flops
from flops.actor import ActorContext, EventLog
from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.assembler import OciAssembler
from flops.adapters.registry_client.client import OciRegistry
from flops.builder.builder import main
from flops.builder.images import ImageTools, ProjectImages
from flops.core.ids import Digest, EnvironmentKey
from flops.core.image_reference import parse_reference
from flops.core.images import INDEX
from flops.core.platforms import Platform
from flops.core.project import Environment, TrainedModel
from flops.settings import inherited_environment
from flops.testing.contracts.image_assembler import images_of
from flops.testing.images import HandMadeBase, HandMadeImages, own_registry, unpack_layer
from flops.testing.wheels import lock_of, make_wheel, use_only
from flops.wire.services import ImageOrder
from flops.wiring.services import own_lock

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
MODEL = TrainedModel(
    experiment_id="1", run_id="run-1", model_uri="u", name="digits", version="3", round=2, accuracy=0.75
)


class Shop:
    """A builder's place of work."""

    def __init__(self, folder: Path, cluster: str) -> None:
        self.folder, self.cluster = folder, cluster
        self.told: list[str] = []
        self.wheels = wheels = folder / "wheels"
        for made in (wheels, folder / "kit" / "flops", folder / "bundle"):
            made.mkdir(parents=True)
        (folder / "kit" / "flops" / "kit.py").write_text("x = 1\n")
        (folder / "bundle" / "model_manager.py").write_text("y = 1\n")
        self.lock, self.model_lock, own = (
            lock_of(make_wheel(wheels, name, "1", modules=[name]), python=MINOR)
            for name in ("project", "model", "own")
        )
        environ = {**inherited_environment(), **use_only(wheels, folder / "cache")}
        self.blobs = FileBlobs(folder / "blobs")
        assembler = OciAssembler(
            folder / "layers", self.blobs, HandMadeBase(), uv=Path(uv.find_uv_bin()), environ=environ
        )
        self.registry = OciRegistry()
        self.tools = ImageTools(assembler, self.blobs, self.registry, own, HandMadeImages(self.blobs))

    def images(self, **order: object) -> ProjectImages:
        given = {"project_id": "p1", "platforms": ("linux/amd64",), "source": "s", "commit": "c" * 40}
        context = ActorContext(
            service_id="builder-p1",
            project_id="p1",
            node_name="n",
            work_dir="",
            repo_dir=str(self.folder / "bundle"),
            kit_dir=str(self.folder / "kit"),
        )
        return ProjectImages(self.tools, ImageOrder.model_validate({**given, **order}), context, self.cluster)

    def pulled(self, name: str, to: Path, platform: Platform = Platform.AMD64) -> dict[str, object]:
        """Pull an image with all platforms into other blobs and unpack it for one; returns its config."""
        host = "" if name.startswith(self.cluster) else f"{self.cluster}/"
        reference = parse_reference(f"{host}{name}")
        blobs = FileBlobs(to / "blobs")
        index = self.registry.pull(reference, blobs, self.told.append)
        assert index.digest == reference.digest
        manifest = images_of(blobs, index)[platform]
        for layer in manifest.layers:
            unpack_layer(blobs, layer, to / "root")
        found = json.loads(blobs.get(manifest.config.digest))
        assert f"linux/{found['architecture']}" == platform
        inner = found["config"]
        assert isinstance(inner, dict)
        return inner


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with own_registry(tmp_path / "registry") as host:
        yield Shop(tmp_path / "shop", host)


def test_each_kind_of_service_finds_in_its_image_what_it_imports(shop: Shop, tmp_path: Path) -> None:
    images = shop.images().push_training(shop.lock, shop.model_lock, shop.told.append)
    learner = shop.pulled(images.learner, tmp_path / "learner")
    root = tmp_path / "learner" / "root"
    assert (root / "app/kit/flops/kit.py").exists()
    assert (root / "app/bundle/model_manager.py").exists()
    assert (root / f"opt/project/lib/python{MINOR}/site-packages/project").is_dir()
    assert learner["Entrypoint"] == ["/opt/project/bin/python", "-m", "flops.trainer.learner"]
    shop.pulled(images.aggregator, tmp_path / "aggregator")
    root = tmp_path / "aggregator" / "root"
    assert (root / f"opt/flops/lib/python{MINOR}/site-packages/own").is_dir()
    assert (root / f"opt/model/lib/python{MINOR}/site-packages/model").is_dir()
    assert (root / "app/flops/flops_utils/local_data.py").exists()
    package = Path(flops.__file__).parent
    assert (root / "app/flops/flops/trainer/aggregator.py").read_bytes() == (
        package / "trainer" / "aggregator.py"
    ).read_bytes()


def test_an_image_has_each_platforms_own_wheels_under_one_name(shop: Shop, tmp_path: Path) -> None:
    """Nothing is emulated: no program of a package runs."""
    tag = f"cp{MINOR.replace('.', '')}"
    wheels = [
        make_wheel(shop.wheels, "native", "1", modules=[f"native_{p.machine}"], tag=f"{tag}-{tag}-{libc}")
        for p in Platform
        for libc in [f"manylinux_2_28_{p.machine}"]
    ]
    first, second = (lock_of(wheel, python=MINOR) for wheel in wheels)
    lock = f"{first.rstrip()} {second[second.index('--hash') :]}"
    images = shop.images(platforms=tuple(Platform)).push_training(lock, shop.model_lock, shop.told.append)
    for name in (images.learner, images.aggregator):
        index = shop.registry.find(parse_reference(f"{shop.cluster}/{name}"))
        assert index.media_type == INDEX
    for platform in Platform:
        shop.pulled(images.learner, tmp_path / platform.architecture, platform)
        site = tmp_path / platform.architecture / f"root/opt/project/lib/python{MINOR}/site-packages"
        assert [path.name for path in site.glob("native_*")] == [f"native_{platform.machine}"]
        shop.pulled(images.aggregator, tmp_path / f"aggregator-{platform.architecture}", platform)


def test_a_change_of_code_sends_little(shop: Shop) -> None:
    shop.images().push_training(shop.lock, shop.model_lock, shop.told.append)
    (shop.folder / "bundle" / "model_manager.py").write_text("y = 2\n")
    shop.told.clear()
    shop.images(commit="d" * 40).push_training(shop.lock, shop.model_lock, shop.told.append)
    made = [line for line in shop.told if "is being made of" in line]
    assert made == ["The layer of the code is being made of 1 files."]  # the same for both images


def test_the_model_serves_without_anything_else_and_says_where_it_comes_from(
    shop: Shop, tmp_path: Path
) -> None:
    name = shop.images(model=MODEL).push_model(shop.model_lock, shop.told.append)
    config = shop.pulled(name, tmp_path / "model")
    context = ActorContext.load(tmp_path / "model" / "root" / "app/context.json")
    assert (context.host, context.repo_dir, context.config) == ("0.0.0.0", "/app/bundle", {"port": 8080})  # noqa: S104
    assert config["ExposedPorts"] == {"8080/tcp": {}}
    labels = config["Labels"]
    assert isinstance(labels, dict)
    assert labels["org.flops.project"] == "p1"
    assert labels["org.flops.run"] == "run-1"
    assert labels["org.flops.round"] == "2"
    assert float(labels["org.flops.metric.accuracy"]) == 0.75
    assert shop.registry.tags(parse_reference(f"{shop.cluster}/{name}")) == ["round-2"]


def test_another_registry_stands_in_the_images_name(shop: Shop, tmp_path: Path) -> None:
    with own_registry(tmp_path / "other") as other:
        name = shop.images(registry=other, model=MODEL).push_model(shop.model_lock, shop.told.append)
        assert parse_reference(name).host == other
        assert shop.registry.find(parse_reference(name)).digest == parse_reference(name).digest


class Fetched:
    """Locks that the cluster has, by what stands in for their digests."""

    def __init__(self, **locks: str) -> None:
        self._locks = {digest * 64: lock for digest, lock in locks.items()}

    def __call__(self, _url: str, digest: Digest, path: Path) -> None:
        path.write_text(self._locks[digest])


@pytest.mark.parametrize("file", ["Dockerfile", "Containerfile", ""])
def test_what_a_dockerfile_makes_is_pushed_and_is_what_the_others_are_put_on(
    shop: Shop, tmp_path: Path, file: str
) -> None:
    if file:
        (shop.folder / "bundle" / file).write_text("FROM scratch\n")
    orders: list[ImageOrder] = []

    def open_images(order: ImageOrder) -> ImageTools:
        orders.append(order)
        return shop.tools

    def build(**more: object) -> dict[str, Any]:
        order = {"project_id": "p1", "platforms": ["linux/amd64"], "source": "s", "commit": "c" * 40, **more}
        environment = Environment(
            key=EnvironmentKey("e"), lock=Digest("a" * 64), model_lock=Digest("b" * 64), python=MINOR
        )
        context = ActorContext(
            service_id="builder-p1",
            project_id="p1",
            node_name="n",
            work_dir=str(tmp_path),
            blobs_url=f"http://{shop.cluster}/api/blobs",
            repo_dir=str(shop.folder / "bundle"),
            kit_dir=str(shop.folder / "kit"),
            config={
                "flavor": "sklearn",
                "environment_key": "e",
                "environment": environment.model_dump(mode="json"),
                "images": order,
            },
        )
        fetched = Fetched(a=shop.lock, b=shop.model_lock)
        main(context, EventLog(tmp_path), lambda _: pytest.fail("locked already"), open_images, fetched)
        last = (tmp_path / "events.jsonl").read_text().splitlines()[-1]
        return dict(json.loads(last))

    images = build()["images"]
    if not file:
        assert images["base"] == ""
        assert {order.base for order in orders} == {""}
        return
    assert images["base"].startswith("flops/p1/base@sha256:")
    base = parse_reference(f"{shop.cluster}/{images['base']}")
    assert shop.registry.find(base).digest == base.digest
    assert [order.base for order in orders] == ["", str(base)]
    assert parse_reference(f"{shop.cluster}/{build(base=images['base'], model=MODEL)['image']}").digest
    assert orders[-1].base == str(base)


def test_the_aggregators_lock_has_the_versions_that_flops_is_locked_to() -> None:
    locked = (Path(__file__).parents[2] / "requirements" / "lock.txt").read_text()
    pins = [line.split(" ")[0] for line in own_lock().splitlines() if "==" in line]
    assert len(pins) > 40
    assert [pin for pin in pins if f"\n{pin} " not in f"\n{locked}"] == []
