"""Images of a machine by name: whole, also for other programs, and without what nobody needs."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.layout import ImageLayout
from flops.core.ids import Digest
from flops.core.images import Descriptor
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.testing.images import make_image, make_index


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path, is_oci_layout=True)


@pytest.fixture
def layout(tmp_path: Path, blobs: FileBlobs) -> ImageLayout:
    return ImageLayout(tmp_path, blobs)


def test_a_name_leads_to_its_last_image_until_it_is_removed(
    tmp_path: Path, layout: ImageLayout, blobs: FileBlobs
) -> None:
    first, second = make_image(blobs, "one"), make_image(blobs, "two")
    assert layout.images() == {}
    for name, image in (("b", first), ("a", first), ("b", second)):
        layout.put(name, image)
    assert ImageLayout(tmp_path, blobs).images() == {"a": first, "b": second}
    layout.remove("a")
    layout.remove("a")
    assert layout.images() == {"b": second}


def test_no_name_leads_to_nothing(layout: ImageLayout) -> None:
    with pytest.raises(FlopsError) as caught:
        layout.put("a", Descriptor(media_type="x", digest=Digest("0" * 64), size=1))
    assert caught.value.code is ErrorCode.IMAGE_NOT_FOUND


def test_names_that_are_given_at_once_are_all_there(layout: ImageLayout, blobs: FileBlobs) -> None:
    image = make_image(blobs, "code")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: layout.put(f"n{n}", image), range(20)))
    assert len(layout.images()) == 20


def test_the_parts_of_an_index_are_those_of_all_its_images(layout: ImageLayout, blobs: FileBlobs) -> None:
    index = make_index(blobs, *(make_image(blobs, "base", p.architecture, platform=p) for p in Platform))
    layout.put("kept", index)
    needed = blobs.digests()
    layout.put("other", make_image(blobs, "base", "other code"))
    assert set(layout.parts(index)) == set(needed)
    assert sum(layout.parts(index).values()) == sum(blobs.size(digest) for digest in needed)


@pytest.mark.parametrize("text", ["", "no json", '{"manifests": [{}]}'])
def test_names_that_cannot_be_read_are_told(
    tmp_path: Path, layout: ImageLayout, blobs: FileBlobs, text: str
) -> None:
    layout.put("a", make_image(blobs, "code"))
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(FlopsError) as caught:
        layout.images()
    assert caught.value.code is ErrorCode.IMAGE_DAMAGED


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="needs skopeo")
def test_skopeo_reads_the_folder(tmp_path: Path, layout: ImageLayout, blobs: FileBlobs) -> None:
    image = make_image(blobs, "code")
    layout.put("localhost:5000/flops/learner:v1", image)
    command = [
        "skopeo",
        "inspect",
        "--format",
        "{{.Digest}}",
        f"oci:{tmp_path}:localhost:5000/flops/learner:v1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"sha256:{image.digest}"
