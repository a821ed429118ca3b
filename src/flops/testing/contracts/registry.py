"""What every `flops.image_ports.Registry` does, whatever registry it speaks to."""

from __future__ import annotations

from pathlib import Path

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.core.ids import Digest
from flops.core.image_reference import ImageReference
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs, Registry
from flops.testing.images import make_image, make_index

LARGE = 20_000_000  # more than is sent in one request


class RegistryContract:
    """Subclass it, and provide the fixtures `registry`, and `host` of a fresh registry open to anybody."""

    @pytest.fixture
    def registry(self) -> Registry:
        raise NotImplementedError

    @pytest.fixture
    def host(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def reference(self, host: str) -> ImageReference:
        return ImageReference(host=host, name="flops/learner", tag="v1")

    @pytest.fixture
    def here(self, tmp_path: Path) -> ImageBlobs:
        return FileBlobs(tmp_path / "here")

    @pytest.fixture
    def there(self, tmp_path: Path) -> ImageBlobs:
        return FileBlobs(tmp_path / "there")

    def test_what_is_pushed_can_be_pulled(
        self, registry: Registry, reference: ImageReference, here: ImageBlobs, there: ImageBlobs
    ) -> None:
        told: list[str] = []
        image = make_image(here, "large", size=LARGE)
        sent = registry.push(reference, image, here, told.append)
        assert sent == sum(here.size(digest) for digest in here.digests())
        assert told
        pulled = registry.pull(reference, there, told.append)
        assert (pulled.digest, pulled.media_type, pulled.size) == (image.digest, image.media_type, image.size)
        assert there.digests() == here.digests()
        assert registry.find(reference).digest == image.digest

    def test_a_second_push_sends_what_is_new(
        self, registry: Registry, reference: ImageReference, here: ImageBlobs
    ) -> None:
        registry.push(reference, make_image(here, "base", "code 1"), here, _ignore)
        again = registry.push(reference, make_image(here, "base", "code 1"), here, _ignore)
        assert again < 1_000  # the manifest
        changed = registry.push(reference, make_image(here, "base", "code 2"), here, _ignore)
        assert 1_000 < changed < 3_000

    def test_an_index_is_pushed_with_its_images_and_pulled_for_one_platform(
        self, registry: Registry, reference: ImageReference, here: ImageBlobs, there: ImageBlobs
    ) -> None:
        images = [make_image(here, platform.architecture, platform=platform) for platform in Platform]
        index = make_index(here, *images)
        registry.push(reference, index, here, _ignore)
        pulled = registry.pull(reference, there, _ignore, Platform.ARM64)
        assert pulled.digest == images[1].digest
        assert there.has(images[1].digest)
        assert not there.has(images[0].digest)
        registry.pull(reference, there, _ignore)
        assert there.digests() == here.digests()

    def test_a_platform_that_is_not_there_is_named(
        self, registry: Registry, reference: ImageReference, here: ImageBlobs, there: ImageBlobs
    ) -> None:
        image = make_image(here, "amd64")
        registry.push(reference, make_index(here, image), here, _ignore)
        with pytest.raises(FlopsError) as caught:
            registry.pull(reference, there, _ignore, Platform.ARM64)
        assert caught.value.code is ErrorCode.IMAGE_NOT_FOUND
        assert "linux/arm64" in caught.value.message
        assert "linux/amd64" in caught.value.message

    def test_what_is_not_there_is_not_found(
        self, registry: Registry, reference: ImageReference, there: ImageBlobs
    ) -> None:
        assert registry.tags(reference) == []
        registry.delete(reference)
        with pytest.raises(FlopsError) as caught:
            registry.find(reference)
        assert caught.value.code is ErrorCode.IMAGE_NOT_FOUND
        assert str(reference) in caught.value.message
        with pytest.raises(FlopsError) as caught:
            registry.pull(reference, there, _ignore)
        assert caught.value.code is ErrorCode.IMAGE_NOT_FOUND

    def test_an_image_is_found_by_its_tags_until_it_is_deleted(
        self, registry: Registry, reference: ImageReference, here: ImageBlobs
    ) -> None:
        image = make_image(here, "code")
        for tag in ("v1", "v2"):
            registry.push(reference.model_copy(update={"tag": tag}), image, here, _ignore)
        assert registry.tags(reference) == ["v1", "v2"]
        assert registry.find(reference.at(image.digest)).digest == image.digest
        registry.delete(reference)
        with pytest.raises(FlopsError):
            registry.find(reference.at(image.digest))
        registry.push(reference, image, here, _ignore)
        assert registry.tags(reference) == ["v1"]

    def test_an_image_that_is_damaged_here_is_not_pushed(
        self, registry: Registry, reference: ImageReference, here: ImageBlobs
    ) -> None:
        image = make_image(here, "code")
        for digest in here.digests():
            if digest != image.digest:
                here.remove(digest)
        with pytest.raises(FlopsError) as caught:
            registry.push(reference, image, here, _ignore)
        assert caught.value.code is ErrorCode.IMAGE_DAMAGED
        with pytest.raises(FlopsError):
            registry.find(reference)

    def test_a_wrong_digest_leads_to_nothing(
        self, registry: Registry, reference: ImageReference, here: ImageBlobs
    ) -> None:
        registry.push(reference, make_image(here, "code"), here, _ignore)
        with pytest.raises(FlopsError) as caught:
            registry.find(reference.at(Digest("0" * 64)))
        assert caught.value.code is ErrorCode.IMAGE_NOT_FOUND


def _ignore(_message: str) -> None:
    pass
