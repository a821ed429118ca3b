"""The folder that a Dockerfile is run in: what goes into it, and the image that comes out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from flops.adapters.images.layout import ImageLayout
from flops.adapters.images.stored_image import store
from flops.core.ids import Digest
from flops.core.images import MANIFEST, Descriptor, Manifest, manifest_bytes, read_config, read_manifest
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs

OpenLayout = Callable[[Path], ImageBlobs]


def lay_out(
    folder: Path,
    dockerfile: str,
    context: Mapping[str, Path],
    bases: Sequence[Descriptor],
    blobs: ImageBlobs,
    open_layout: OpenLayout,
) -> None:
    """Put together what `flops.image_ports.ContainerBuild` describes.

    Args:
        folder: it is there and empty; whoever can reach it can read it then.
        dockerfile: its text.
        context: files of this machine by their path in the context.
        bases: manifests of the images it begins with.
        blobs: has them.
        open_layout: opens the blobs of an image layout by its folder.
    """
    (folder / "Dockerfile").write_text(dockerfile, encoding="utf-8")
    (folder / "context").mkdir()
    for place, path in context.items():
        target = folder / "context" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    copies = open_layout(folder / "bases")
    layout = ImageLayout(folder / "bases", copies)
    for number, base in enumerate(bases):
        manifest = manifest_of(blobs, base)
        for part in manifest.blobs:
            copy_blob(part.digest, blobs, copies)
        # Written anew: buildah takes no manifest of Docker's kind out of a layout.
        data = manifest_bytes(manifest.config, manifest.layers)
        layout.put(str(number), store(copies, data, MANIFEST))
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def made_image(folder: Path, open_layout: OpenLayout) -> tuple[ImageBlobs, Descriptor]:
    """The image that was made in a folder: its blobs, and its manifest's descriptor."""
    layout = folder / "made" / "image"
    blobs = open_layout(layout)
    return blobs, ImageLayout(layout, blobs).images()["made"]


def manifest_of(blobs: ImageBlobs, image: Descriptor) -> Manifest:
    """The manifest of an image for one platform.

    Raises:
        FlopsError: ``image_damaged`` when it is none.
    """
    manifest = read_manifest(blobs.get(image.digest), image.media_type)
    if not isinstance(manifest, Manifest):
        raise FlopsError(ErrorCode.IMAGE_DAMAGED, f"{image.digest[:12]} is no image for one platform.")
    return manifest


def layers_of(blobs: ImageBlobs, image: Descriptor) -> Iterator[tuple[Digest, Descriptor]]:
    """The digest of each layer's archive, and the layer."""
    manifest = manifest_of(blobs, image)
    diff_ids, _, _ = read_config(blobs.get(manifest.config.digest))
    yield from zip(diff_ids, manifest.layers, strict=True)


def copy_blob(digest: Digest, source: ImageBlobs, target: ImageBlobs) -> None:
    """Copy a blob, verified."""
    upload = target.upload()
    try:
        for chunk in source.chunks(digest):
            upload.write(chunk)
        upload.commit(digest)
    finally:
        upload.discard()
