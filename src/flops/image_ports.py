"""What is needed from the outside world to make images and move them, as protocols; beside `flops.ports`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flops.core.ids import Digest
from flops.core.image_reference import ImageReference
from flops.core.images import BaseImage, Descriptor, ImageRun
from flops.core.platforms import Platform
from flops.ports import BlobStreams
from flops.retention_ports import KeptBlobs

Report = Callable[[str], None]


class ImageBlobs(BlobStreams, Protocol):
    """Parts of images by their SHA-256."""

    def part(self, digest: Digest, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to, not including, `stop`, piece by piece; not verified.

        Raises: FlopsError: ``not_found``.
        """
        ...

    def is_intact(self, digest: Digest) -> bool:
        """Whether the bytes are here, and are those that `digest` names; costs little when asked again."""
        ...

    def digests(self) -> list[Digest]:
        """Every blob there is."""
        ...

    def remove(self, digest: Digest) -> None:
        """Remove a blob; nothing happens when it is not there. Who reads it may finish."""
        ...


class KeptImageBlobs(ImageBlobs, KeptBlobs, Protocol):
    """Parts of images that are kept while they are needed, and a while longer."""


class NamedImages(Protocol):
    """Images of this machine by name. What no name leads to may be removed."""

    def images(self) -> dict[str, Descriptor]:
        """All images by their names.

        Raises: FlopsError: ``image_damaged`` when the names cannot be read.
        """
        ...

    def put(self, name: str, image: Descriptor) -> None:
        """Have a name lead to an image, and to no other any more; durably.

        Raises: FlopsError: ``image_not_found`` when the image is not here; ``disk_full``.
        """
        ...

    def remove(self, name: str) -> None:
        """Forget a name; an unknown one is no error."""
        ...

    def parts(self, image: Descriptor) -> dict[Digest, int]:
        """Everything an image is made of, each with its size in bytes.

        Raises: FlopsError: ``not_found``, ``image_damaged``.
        """
        ...


class ImageEngine(Protocol):
    """Takes in images, to run containers of them."""

    def load(self, reference: ImageReference, image: Descriptor) -> str:
        """Take in an image, unless it is there; returns the name to run it by.

        Raises: FlopsError: ``image_damaged``, ``disk_full``, ``unreachable``, ``timeout``.
        """
        ...

    def unload(self, reference: ImageReference, image: Descriptor) -> bool:
        """Remove an image that was taken in; False, and it stays, while a container uses it.

        Raises: FlopsError: ``unreachable``, ``timeout``.
        """
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


@dataclass(frozen=True)
class ImageRecipe:
    """What an image is made from.

    Args:
        platforms: what it is made for.
        lock: dependencies, as `flops.ports.Environments.lock` writes them, for ``/opt/env``; "" for none.
        files: content by the path in the image, such as ``app/learner.py``.
        folders: folders of this machine by the path in the image; all of each is taken, but bytecode.
        run: what a container of it does.
        environments: locks of further environments by their path in the image, such as ``/opt/model``.
        modules: further folders, in a layer of their own: they change less often than the others.
    """

    platforms: tuple[Platform, ...]
    lock: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)
    run: ImageRun = field(default_factory=ImageRun)
    environments: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, Path] = field(default_factory=dict)


class BaseImages(Protocol):
    """What images are put on."""

    def foreseen(self, platform: Platform) -> BaseImage | None:
        """The base for a platform without its layers, if all else is known before it is made."""
        ...

    def base(self, platform: Platform, blobs: ImageBlobs, report: Report) -> BaseImage:
        """The base for a platform; its layers are in `blobs`, whole.

        Raises:
            FlopsError: ``image_build_failed``, ``image_not_found``, ``image_damaged``, ``unreachable``,
                ``registry_unreachable``, ``registry_refused``, ``timeout``, ``disk_full``.
        """
        ...


@dataclass(frozen=True)
class ContainerBuild:
    """A Dockerfile that is to be run, for one platform.

    Args:
        folder: has ``Dockerfile``, the folder ``context``, and ``bases``, an image layout of the OCI's; all
            users can read them. The image is put into the layout ``made/image``; nothing else is in the
            folder.
        platform: of the image.
        bases: images that the Dockerfile names; the first is the image ``0`` in ``bases``, and so on.
        timeout_s: for all of it.
        what: it is, for people: the beginning of a sentence.
    """

    folder: Path
    platform: Platform
    bases: tuple[str, ...]
    timeout_s: float
    what: str = "The Dockerfile"


class ContainerBuilds(Protocol):
    """Runs Dockerfiles on this machine."""

    def run(self, build: ContainerBuild, report: Report, keep_open: Sequence[int] = ()) -> None:
        """Run a Dockerfile to its end. When this process ends, however, so does everything it started.

        Args:
            build: what is run.
            report: is told each step, in one sentence.
            keep_open: file descriptors that stay open until the last program has ended, such as a lock.

        Raises:
            FlopsError: ``dockerfile_failed``, naming the step; ``image_build_failed`` when this machine
                cannot run any; ``timeout``, ``disk_full``.
        """
        ...


class RepositoryImages(Protocol):
    """Images that repositories describe themselves, to be what their project's images are put on."""

    def make(self, repository: Path, platforms: Sequence[Platform], report: Report) -> Descriptor:
        """The image of the repository's Dockerfile for each platform; returns the index's descriptor.

        What was made from the same Dockerfile, images and files is used again.

        Raises:
            FlopsError: as `ContainerBuilds.run`, and as `Registry.pull` for the images it begins with.
        """
        ...


class ImageAssembler(Protocol):
    """Makes images on this machine. The same recipe gives the same digest; what was made is used again."""

    def assemble(self, recipe: ImageRecipe, report: Report) -> Descriptor:
        """Make an image for each platform of the recipe; returns the descriptor of their index.

        A build that was killed is begun anew; of two that make the same layer at once the second waits.

        Raises:
            FlopsError: ``dependencies_unresolvable`` when a wheel is missing, naming requirement and
                platform; ``image_build_failed``, ``unreachable``, ``timeout``, ``disk_full``, and what
                `BaseImages.base` raises.
        """
        ...
