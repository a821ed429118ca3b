"""What every `flops.image_ports.ImageAssembler` does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flops.core.images import (
    Descriptor,
    HealthCheck,
    ImageRun,
    Index,
    Manifest,
    read_manifest,
)
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageAssembler, ImageBlobs, ImageRecipe
from flops.testing.images import unpack_layer

RUN = ImageRun(
    entrypoint=("/opt/env/bin/python", "-m", "learner"),
    env={"PYTHONPATH": "/app"},
    ports=(8080,),
    labels={"org.flops.project": "0123456789ab"},
    health=HealthCheck(command=("/opt/env/bin/python", "-m", "health")),
)


def images_of(blobs: ImageBlobs, index: Descriptor) -> dict[str, Manifest]:
    """The images of an index by their platforms."""
    read = read_manifest(blobs.get(index.digest), index.media_type)
    assert isinstance(read, Index)
    found: dict[str, Manifest] = {}
    for image in read.manifests:
        manifest = read_manifest(blobs.get(image.digest), image.media_type)
        assert isinstance(manifest, Manifest)
        found[image.platform] = manifest
    return found


class ImageAssemblerContract:
    """Subclass it, and provide the fixtures `assembler`, `blobs`, `lock`, and `conflict`.

    `lock` has the package ``pure``, whose module ``pure`` is empty; `conflict` a package ``onlyx`` that has a
    wheel for linux/amd64 alone.
    """

    @pytest.fixture
    def assembler(self) -> ImageAssembler:
        raise NotImplementedError

    @pytest.fixture
    def blobs(self) -> ImageBlobs:
        raise NotImplementedError

    @pytest.fixture
    def lock(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def conflict(self) -> str:
        raise NotImplementedError

    def test_an_image_is_base_dependencies_and_code_for_each_platform(
        self, assembler: ImageAssembler, blobs: ImageBlobs, lock: str, tmp_path: Path
    ) -> None:
        told: list[str] = []
        recipe = ImageRecipe(tuple(Platform), lock, {"app/learner.py": b"import pure\n"}, run=RUN)
        images = images_of(blobs, assembler.assemble(recipe, told.append))
        assert set(images) == set(Platform)
        assert told
        for platform, manifest in images.items():
            folder = tmp_path / platform
            members = {
                name: member
                for layer in manifest.layers
                for name, member in unpack_layer(blobs, layer, folder).items()
            }
            assert (folder / "app" / "learner.py").read_bytes() == b"import pure\n"
            assert list(folder.glob("opt/env/lib/python3.*/site-packages/pure/__init__.py"))
            assert list(folder.glob("app/__pycache__/learner.cpython-3*.pyc"))
            assert all(member.uid == member.gid == 0 for member in members.values())
            config = json.loads(blobs.get(manifest.config.digest))
            assert f"{config['os']}/{config['architecture']}" == platform
            assert len(config["rootfs"]["diff_ids"]) == len(manifest.layers)
            assert config["config"]["User"] == "65532:65532"
            assert config["config"]["Entrypoint"] == list(RUN.entrypoint)
            assert config["config"]["Healthcheck"]["Test"][0] == "CMD"
            assert config["config"]["Labels"]["org.flops.project"] == "0123456789ab"
            assert "PYTHONPATH=/app" in config["config"]["Env"]

    def test_a_change_of_code_makes_one_layer(
        self, assembler: ImageAssembler, blobs: ImageBlobs, lock: str
    ) -> None:
        first, second = (
            images_of(
                blobs,
                assembler.assemble(ImageRecipe(tuple(Platform), lock, {"app/code.py": code}), _ignore),
            )
            for code in (b"x = 1\n", b"x = 2\n")
        )
        for platform in Platform:
            assert first[platform].layers[:-1] == second[platform].layers[:-1]
            assert first[platform].layers[-1] != second[platform].layers[-1]
        assert first[Platform.AMD64].layers[-1] == first[Platform.ARM64].layers[-1]

    def test_an_image_can_have_several_environments(
        self, assembler: ImageAssembler, blobs: ImageBlobs, lock: str, tmp_path: Path
    ) -> None:
        recipe = ImageRecipe((Platform.AMD64,), lock, environments={"/opt/model": lock})
        image = images_of(blobs, assembler.assemble(recipe, _ignore))[Platform.AMD64]
        for layer in image.layers:
            unpack_layer(blobs, layer, tmp_path)
        for environment in ("env", "model"):
            assert list(tmp_path.glob(f"opt/{environment}/lib/python3.*/site-packages/pure/__init__.py"))
        path = next(
            e for e in json.loads(blobs.get(image.config.digest))["config"]["Env"] if e[:5] == "PATH="
        )
        assert path.startswith("PATH=/opt/env/bin:/opt/model/bin:")

    def test_the_same_recipe_is_the_same_image(self, assembler: ImageAssembler, lock: str) -> None:
        recipe = ImageRecipe((Platform.AMD64,), lock, {"app/code.py": b"x = 1\n"}, run=RUN)
        assert assembler.assemble(recipe, _ignore) == assembler.assemble(recipe, _ignore)

    def test_a_wheel_that_is_missing_is_named_with_the_platform(
        self, assembler: ImageAssembler, conflict: str
    ) -> None:
        assembler.assemble(ImageRecipe((Platform.AMD64,), conflict), _ignore)
        with pytest.raises(FlopsError) as caught:
            assembler.assemble(ImageRecipe(tuple(Platform), conflict), _ignore)
        assert caught.value.code is ErrorCode.DEPENDENCIES_UNRESOLVABLE
        assert "onlyx" in caught.value.message
        assert "linux/arm64" in caught.value.message

    def test_no_file_is_put_outside_of_the_image(self, assembler: ImageAssembler) -> None:
        with pytest.raises(FlopsError) as caught:
            assembler.assemble(ImageRecipe((Platform.AMD64,), files={"app/../../evil": b""}), _ignore)
        assert caught.value.code is ErrorCode.IMAGE_BUILD_FAILED

    def test_dependencies_for_another_python_are_refused(self, assembler: ImageAssembler, lock: str) -> None:
        other = lock.replace("# python 3.", "# python 3.9", 1)
        with pytest.raises(FlopsError) as caught:
            assembler.assemble(ImageRecipe((Platform.AMD64,), other), _ignore)
        assert caught.value.code is ErrorCode.IMAGE_BUILD_FAILED
        assert "3.9" in caught.value.message


def _ignore(_message: str) -> None:
    pass
