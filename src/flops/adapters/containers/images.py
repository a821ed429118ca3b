"""Images for the engine of this machine, handed over from the node's own blobs.

The node brings images here itself, by `flops.image_ports.Registry`: credentials, certificates and broken
connections are dealt with in one place, and no engine has to be told which registries speak plain HTTP. What
is handed over is an archive as ``docker save`` writes it, without the layers that the engine has already.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Iterator
from itertools import takewhile

from flops.adapters.containers.engine import ContainerEngine, EngineRefusedError
from flops.core.ids import Digest
from flops.core.image_reference import DEFAULT_TAG, ImageReference
from flops.core.images import PYTHON_LABEL, Descriptor, Manifest, index_bytes, read_config, read_manifest
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs

_NO_SPACE = "no space left"  # engines tell it in words only
_LOOKED_AT = 20  # images of ours in the engine, to find layers that need no sending
_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")  # annotations; of Docker, Podman


class EngineImages:
    """Implements `flops.image_ports.ImageEngine`.

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
        name = _engine_name(reference, image)
        layers = [f"sha256:{digest}" for digest in read_config(self._blobs.get(manifest.config.digest))[0]]
        try:
            if self._layers_of(name) != layers:
                self._hand_over(name, image, manifest, layers)
            if self._layers_of(name) != layers:
                raise FlopsError(
                    ErrorCode.IMAGE_DAMAGED, f"{name} was taken in by the engine, but is another image there."
                )
        except EngineRefusedError as exc:
            code = ErrorCode.DISK_FULL if _NO_SPACE in exc.message else ErrorCode.IMAGE_DAMAGED
            raise FlopsError(code, f"The engine does not take in {name}: {exc.message}.") from exc
        return name

    def unload(self, reference: ImageReference, image: Descriptor) -> bool:
        """Remove an image; whether it could be: not while a container uses it.

        Raises: FlopsError: ``unreachable``, ``timeout``.
        """
        try:
            self._engine.remove_image(_engine_name(reference, image))
        except EngineRefusedError:
            return False
        return True

    def _hand_over(self, name: str, image: Descriptor, manifest: Manifest, layers: list[str]) -> None:
        if known := self._count_known(layers):
            # Refused when one is gone meanwhile: another may remove images, too.
            with contextlib.suppress(EngineRefusedError):
                self._engine.load(_archive(name, image, manifest, self._blobs, left_out=known))
            if self._layers_of(name) == layers:
                return
        self._engine.load(_archive(name, image, manifest, self._blobs))

    def _count_known(self, layers: list[str]) -> int:
        """How many layers, from the first one on, an image of ours in the engine has, too."""
        known = 0
        for name in self._engine.images(PYTHON_LABEL)[:_LOOKED_AT]:
            pairs = zip(layers, self._layers_of(name) or (), strict=False)
            known = max(known, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
            if known >= len(layers) - 1:
                break
        return known

    def _layers_of(self, name: str) -> list[str] | None:
        # What stays the same in every engine's store is what the layers unpack to.
        return ((self._engine.image(name) or {}).get("RootFS") or {}).get("Layers")


def _engine_name(reference: ImageReference, image: Descriptor) -> str:
    return f"{reference.host}/{reference.name}:{reference.tag or image.digest[:12] or DEFAULT_TAG}"


def _archive(
    name: str, image: Descriptor, manifest: Manifest, blobs: ImageBlobs, *, left_out: int = 0
) -> Iterator[bytes]:
    """The archive that engines load, piece by piece: Podman by the OCI's index, Docker by its own listing.

    Layers stay compressed; the first `left_out` are named, and not there.
    """
    named = image.model_copy(update={"annotations": dict.fromkeys(_NAMES, name)})
    listing = {
        "Config": _path_of(manifest.config.digest),
        "RepoTags": [name],
        "Layers": [_path_of(layer.digest) for layer in manifest.layers],
    }
    yield from _file("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
    yield from _file("index.json", index_bytes([named]))
    yield from _file("manifest.json", json.dumps([listing]).encode())
    sent = {layer.digest for layer in manifest.layers[left_out:]}
    for digest in (image.digest, manifest.config.digest, *sorted(sent)):
        yield from _member(digest, blobs)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _path_of(digest: Digest) -> str:
    return f"blobs/sha256/{digest}"


def _file(name: str, content: bytes) -> Iterator[bytes]:
    yield _head(name, len(content)) + content + _padding(len(content))


def _member(digest: Digest, blobs: ImageBlobs) -> Iterator[bytes]:
    size = blobs.size(digest)
    yield _head(_path_of(digest), size)
    yield from blobs.chunks(digest)
    yield _padding(size)


def _head(file: str, size: int) -> bytes:
    info = tarfile.TarInfo(file)
    info.size = size
    return info.tobuf()


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
