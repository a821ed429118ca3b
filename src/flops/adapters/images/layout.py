"""Images of this machine by name, in a folder as the OCI lays it out; skopeo reads it as ``oci:FOLDER:NAME``.

::

    <root>/oci-layout             says what the folder is
    <root>/index.json             names, and the images they lead to
    <root>/blobs/sha256/<digest>  their parts; see `flops.adapters.file_blobs.FileBlobs`
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from flops.core.ids import Digest
from flops.core.images import Descriptor, Index, index_bytes, read_manifest
from flops.durable_file import file_error, write_durably
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs

_NAME = "org.opencontainers.image.ref.name"


class ImageLayout:
    """Names of images; several processes may use one root.

    Args:
        root: the folder.
        blobs: its blobs.
    """

    def __init__(self, root: Path, blobs: ImageBlobs) -> None:
        self._root = root
        self._blobs = blobs

    def images(self) -> dict[str, Descriptor]:
        """All images by their names, sorted.

        Raises:
            FlopsError: ``image_damaged`` when the file of names cannot be read.
        """
        found = {image.annotations.get(_NAME, ""): image for image in self._read()}
        return {name: found[name].model_copy(update={"annotations": {}}) for name in sorted(found) if name}

    def put(self, name: str, image: Descriptor) -> None:
        """Have a name lead to an image, and to no other any more; durably.

        Raises:
            FlopsError: ``image_not_found`` when the image is not here; ``disk_full``, ``file_unreadable``.
        """
        if not self._blobs.has(image.digest):
            raise FlopsError(
                ErrorCode.IMAGE_NOT_FOUND, f"There is no image {image.digest[:12]} in {self._root}."
            )
        with self._changed() as images:
            images[name] = image

    def remove(self, name: str) -> None:
        """Forget a name; an unknown one is no error."""
        with self._changed() as images:
            images.pop(name, None)

    def parts(self, image: Descriptor) -> dict[Digest, int]:
        """Everything an image is made of, each with its size in bytes; of an index, all its images."""
        found = {image.digest: image.size}
        manifest = read_manifest(self._blobs.get(image.digest), image.media_type)
        if isinstance(manifest, Index):
            for inner in manifest.manifests:
                found |= self.parts(inner)
        else:
            found |= {part.digest: part.size for part in manifest.blobs}
        return found

    def _read(self) -> tuple[Descriptor, ...]:
        try:
            data = (self._root / "index.json").read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as exc:
            raise file_error(exc, self._root / "index.json") from exc
        index = read_manifest(data)
        return index.manifests if isinstance(index, Index) else ()

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, Descriptor]]:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with (self._root / "index.lock").open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                images = self.images()
                yield images
                named = [
                    image.model_copy(update={"annotations": {_NAME: name}}) for name, image in images.items()
                ]
                if not (self._root / "oci-layout").exists():
                    write_durably(self._root / "oci-layout", '{"imageLayoutVersion": "1.0.0"}')
                write_durably(self._root / "index.json", index_bytes(named).decode())
        except OSError as exc:
            raise file_error(exc, self._root) from exc
