"""Images, and what describes them, put among the blobs that they are made of."""

from __future__ import annotations

from collections.abc import Sequence

from flops.core.images import CONFIG, MANIFEST, Descriptor, ImageRun, Layer, config_bytes, manifest_bytes
from flops.core.platforms import Platform
from flops.image_ports import ImageBlobs


def store(blobs: ImageBlobs, data: bytes, media_type: str, platform: str = "") -> Descriptor:
    """Store a document; returns its descriptor."""
    return Descriptor(media_type=media_type, digest=blobs.put(data), size=len(data), platform=platform)


def store_image(blobs: ImageBlobs, platform: Platform, layers: Sequence[Layer], run: ImageRun) -> Descriptor:
    """Store an image of layers that are there; returns its manifest's descriptor."""
    config = store(blobs, config_bytes(platform, layers, run), CONFIG)
    return store(blobs, manifest_bytes(config, [layer.blob for layer in layers]), MANIFEST, platform.value)
