"""Images for the engine of this machine, handed over from the node's own blobs.

The node brings images here itself, by `flops.image_ports.Registry`: credentials, certificates and broken
connections are dealt with in one place, and no engine has to be told which registries speak plain HTTP.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any

from flops.adapters.containers.engine import ContainerEngine, EngineRefusedError
from flops.core.ids import Digest
from flops.core.image_reference import DEFAULT_TAG, ImageReference
from flops.core.images import Descriptor, Manifest, read_manifest
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs

_NO_SPACE = "no space left"  # engines tell it in words only


class EngineImages:
    """Images that the engine has.

    Args:
        engine: the engine.
        blobs: what images are made of.
    """

    def __init__(self, engine: ContainerEngine, blobs: ImageBlobs) -> None:
        self._engine = engine
        self._blobs = blobs

    def load(self, reference: ImageReference, image: Descriptor) -> str:
        """Have the engine take in an image, unless it has it; returns the name to run it by.

        Args:
            reference: what it is called.
            image: its manifest, for this machine's platform; all its parts are in the blobs.

        Raises:
            FlopsError: ``image_damaged``, ``disk_full``, ``unreachable``, ``timeout``.
        """
        manifest = read_manifest(self._blobs.get(image.digest), image.media_type)
        if not isinstance(manifest, Manifest):
            raise FlopsError(
                ErrorCode.IMAGE_DAMAGED, f"{reference} is an index of images, where one image is needed."
            )
        name = f"{reference.host}/{reference.name}:{reference.tag or image.digest[:12] or DEFAULT_TAG}"
        try:
            if not self._has(name, manifest):
                self._engine.load(_archive(name, manifest, self._blobs))
            if not self._has(name, manifest):
                raise FlopsError(
                    ErrorCode.IMAGE_DAMAGED, f"{name} was taken in by the engine, but is another image there."
                )
        except EngineRefusedError as exc:
            code = ErrorCode.DISK_FULL if _NO_SPACE in exc.message else ErrorCode.IMAGE_DAMAGED
            raise FlopsError(code, f"The engine does not take in {name}: {exc.message}.") from exc
        return name

    def remove(self, name: str) -> bool:
        """Remove an image; whether it could be: not while a container uses it.

        Raises: FlopsError: ``unreachable``, ``timeout``.
        """
        try:
            self._engine.remove_image(name)
        except EngineRefusedError:
            return False
        return True

    def _has(self, name: str, manifest: Manifest) -> bool:
        found = self._engine.image(name) or {}
        # What stays the same in every engine's store is what the layers unpack to.
        layers = (found.get("RootFS") or {}).get("Layers")
        return layers is not None and layers == _diff_ids(manifest, self._blobs)


def _diff_ids(manifest: Manifest, blobs: ImageBlobs) -> list[str]:
    config: dict[str, Any] = json.loads(blobs.get(manifest.config.digest))
    return [str(digest) for digest in config["rootfs"]["diff_ids"]]


def _archive(name: str, manifest: Manifest, blobs: ImageBlobs) -> Iterator[bytes]:
    """The archive that ``docker load`` takes, piece by piece; layers stay compressed."""
    config = f"{manifest.config.digest}.json"
    layers = {layer.digest: f"{layer.digest}.tar" for layer in manifest.layers}
    yield from _member(config, manifest.config.digest, blobs)
    for digest, file in layers.items():
        yield from _member(file, digest, blobs)
    listing = json.dumps(
        [
            {
                "Config": config,
                "RepoTags": [name],
                "Layers": [layers[layer.digest] for layer in manifest.layers],
            }
        ]
    ).encode()
    yield _head("manifest.json", len(listing)) + listing + _padding(len(listing))
    yield bytes(2 * tarfile.BLOCKSIZE)


def _member(file: str, digest: Digest, blobs: ImageBlobs) -> Iterator[bytes]:
    size = blobs.size(digest)
    yield _head(file, size)
    yield from blobs.chunks(digest)
    yield _padding(size)


def _head(file: str, size: int) -> bytes:
    info = tarfile.TarInfo(file)
    info.size = size
    return info.tobuf()


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
