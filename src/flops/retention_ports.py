"""What takes up disk and can be given back, as those see it who decide what goes; beside `flops.ports`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flops.core.ids import Digest


@dataclass(frozen=True)
class Cached:
    """Something in a cache.

    Args:
        key: its name there; the digest of what it is made from.
        folder: where all of it lies.
        used_at_s: when it was used last, seconds since the epoch.
    """

    key: str
    folder: Path
    used_at_s: float


@dataclass(frozen=True)
class KeptBlob:
    """A blob on the disk.

    Args:
        digest: names it.
        size_bytes: what is given back when it goes.
        used_at_s: when it was used last, seconds since the epoch.
    """

    digest: Digest
    size_bytes: int
    used_at_s: float


class KeptBlobs(Protocol):
    """Blobs, as they are swept. Each has a time of last use: it was stored again, asked for, or read."""

    def digests(self) -> list[Digest]:
        """Every blob there is."""
        ...

    def kept(self) -> list[KeptBlob]:
        """Every blob there is, with its size and last use; to look is no use."""
        ...

    def remove_unless_used(self, digest: Digest, since_s: float) -> int:
        """Remove a blob that was not used since then; returns the bytes given back, 0 when it stays."""
        ...

    def sweep(self) -> None:
        """Remove what killed processes left unfinished."""
        ...


@dataclass(frozen=True)
class RegisteredImage:
    """What a name in the registry has.

    Args:
        name: of the image, without registry and tag.
        tags: sorted.
        digest: of what the last tag leads to; "" when there is none.
        platforms: what it is there for, sorted.
        parts: everything it is made of, each with its size in bytes.
        used_at_s: when it was pushed or asked for last, seconds since the epoch.
    """

    name: str
    tags: tuple[str, ...]
    digest: str
    platforms: tuple[str, ...]
    parts: Mapping[Digest, int]
    used_at_s: float


class RegisteredImages(Protocol):
    """Images in the control plane's registry, by name."""

    def names(self) -> list[str]:
        """All names that have images, sorted."""
        ...

    def forget(self, name: str) -> None:
        """Remove everything of a name; its blobs go when nobody else needs them.

        Raises: FlopsError: ``file_unreadable``, ``disk_full``.
        """
        ...

    def describe(self, name: str) -> RegisteredImage:
        """What a name has; of an unknown one, nothing. To look is no use."""
        ...

    def collect_garbage(self, since_s: float, among: Collection[Digest] | None = None) -> int:
        """Remove blobs that no image has, and that nobody sent or asked for since then.

        Blobs come before what names them: `since_s` is longer ago than any push takes.

        Args:
            since_s: seconds since the epoch.
            among: of no other blobs; None for all.

        Returns:
            The bytes given back.
        """
        ...


class Cache(Protocol):
    """Folders of this machine that can be made anew. Thread-safe, and safe against a kill at any moment."""

    @property
    def name(self) -> str:
        """What it holds, for people: "environments"."""
        ...

    def cached(self) -> list[Cached]:
        """What is whole. What is being made right now is not listed."""
        ...

    def drop(self, key: str, is_in_use: Callable[[], bool]) -> bool:
        """Remove something; False, and nothing is removed, when it is in use or being made.

        Whoever asks for it after `is_in_use` was called has it made anew.
        """
        ...

    def sweep(self) -> None:
        """Remove what killed processes left behind: the half-made, and the half-removed."""
        ...
