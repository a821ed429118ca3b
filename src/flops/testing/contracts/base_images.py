"""What every `flops.image_ports.BaseImages` does."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
from pathlib import Path

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.core.images import BaseImage
from flops.core.platforms import Platform
from flops.image_ports import BaseImages, ImageBlobs


def files_of(blobs: ImageBlobs, base: BaseImage) -> set[str]:
    """Paths in a base's layers."""
    found: set[str] = set()
    for layer in base.layers:
        archive = gzip.decompress(blobs.get(layer.blob.digest))
        assert hashlib.sha256(archive).hexdigest() == layer.diff_id
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            found |= {f"/{name.removeprefix('./')}" for name in tar.getnames()}
    return found


class BaseImagesContract:
    """Subclass it, and provide the fixture `bases`."""

    @pytest.fixture
    def bases(self) -> BaseImages:
        raise NotImplementedError

    @pytest.fixture
    def blobs(self, tmp_path: Path) -> ImageBlobs:
        return FileBlobs(tmp_path / "layout", is_oci_layout=True)

    @pytest.mark.parametrize("platform", list(Platform))
    def test_a_base_has_a_python_and_is_whole(
        self, bases: BaseImages, blobs: ImageBlobs, platform: Platform
    ) -> None:
        base = bases.base(platform, blobs, _ignore)
        assert base.platform is platform
        assert bases.foreseen(platform) in (None, base.model_copy(update={"layers": ()}))
        assert re.fullmatch(r"3\.\d+", base.python)
        assert base.interpreter in files_of(blobs, base)
        assert all(blobs.size(layer.blob.digest) == layer.blob.size for layer in base.layers)

    def test_a_base_stays_the_same(self, bases: BaseImages, blobs: ImageBlobs) -> None:
        assert bases.base(Platform.AMD64, blobs, _ignore) == bases.base(Platform.AMD64, blobs, _ignore)

    def test_what_is_damaged_is_made_or_fetched_anew(self, bases: BaseImages, blobs: ImageBlobs) -> None:
        base = bases.base(Platform.AMD64, blobs, _ignore)
        for layer in base.layers:
            blobs.remove(layer.blob.digest)
        assert bases.base(Platform.AMD64, blobs, _ignore) == base
        assert all(blobs.has(layer.blob.digest) for layer in base.layers)


def _ignore(_message: str) -> None:
    pass
