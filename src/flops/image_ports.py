"""What is needed from the outside world to make images and move them, as protocols; beside `flops.ports`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from flops.core.ids import Digest
from flops.core.image_reference import ImageReference
from flops.core.images import Descriptor
from flops.ports import BlobStreams

Report = Callable[[str], None]


class ImageBlobs(BlobStreams, Protocol):
    """Parts of images by their SHA-256."""

    def part(self, digest: Digest, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to, not including, `stop`, piece by piece; not verified.

        Raises: FlopsError: ``not_found``.
        """
        ...

    def digests(self) -> list[Digest]:
        """Every blob there is."""
        ...

    def remove(self, digest: Digest) -> None:
        """Remove a blob; nothing happens when it is not there. Who reads it may finish."""
        ...


class Registry(Protocol):
    """A registry of images, elsewhere. Every call takes up again what a broken connection interrupted."""

    def push(self, reference: ImageReference, image: Descriptor, blobs: ImageBlobs, report: Report) -> int:
        """Send an image, an index with all its images, and name it; returns the bytes that were sent.

        Parts that the registry has are not sent. The name is given last: it never leads to half an image.

        Raises:
            FlopsError: ``registry_unreachable``, ``registry_refused``; ``image_damaged`` when `blobs` are.
        """
        ...

    def pull(
        self, reference: ImageReference, blobs: ImageBlobs, report: Report, platform: str | None = None
    ) -> Descriptor:
        """Bring an image here, whole and verified; returns its manifest's descriptor.

        Args:
            reference: what to pull.
            blobs: where the parts are put; those that are there are not fetched.
            report: is told each step, in one sentence.
            platform: of an index, only this image is brought, and its descriptor returned.

        Raises:
            FlopsError: ``image_not_found``, ``image_damaged``, ``registry_unreachable``,
                ``registry_refused``, ``disk_full``.
        """
        ...

    def find(self, reference: ImageReference) -> Descriptor:
        """What a name leads to.

        Raises:
            FlopsError: ``image_not_found``, ``registry_unreachable``, ``registry_refused``.
        """
        ...

    def tags(self, reference: ImageReference) -> list[str]:
        """All tags of an image's name, sorted; none for a name that is not known.

        Raises:
            FlopsError: ``registry_unreachable``, ``registry_refused``.
        """
        ...

    def delete(self, reference: ImageReference) -> None:
        """Remove an image by its digest, with all tags that lead to it; an unknown one is no error.

        Raises:
            FlopsError: ``registry_unreachable``; ``registry_refused`` when the registry does not delete.
        """
        ...
