"""Blobs in memory, for tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from flops.core.ids import Digest
from flops.errors import ErrorCode, FlopsError


class MemoryBlobs:
    """Implements `flops.ports.BlobStreams` and `flops.image_ports.ImageBlobs`."""

    def __init__(self) -> None:
        self._blobs: dict[Digest, bytes] = {}

    def put(self, data: bytes) -> Digest:
        """Store bytes."""
        digest = Digest(hashlib.sha256(data).hexdigest())
        self._blobs[digest] = data
        return digest

    def get(self, digest: Digest) -> bytes:
        """Load bytes.

        Raises:
            FlopsError: ``not_found``.
        """
        try:
            return self._blobs[digest]
        except KeyError:
            raise FlopsError(ErrorCode.NOT_FOUND, f"There is no blob {digest}.") from None

    def has(self, digest: Digest) -> bool:
        """Whether the bytes are stored."""
        return digest in self._blobs

    def upload(self) -> MemoryUpload:
        """Begin an upload."""
        return MemoryUpload(self)

    def size(self, digest: Digest) -> int:
        """Size in bytes."""
        return len(self.get(digest))

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """The bytes, in pieces of 64 KiB."""
        data = self.get(digest)
        for start in range(0, len(data), 65_536):
            yield data[start : start + 65_536]

    def part(self, digest: Digest, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to `stop`."""
        if part := self.get(digest)[start:stop]:
            yield part

    def is_intact(self, digest: Digest) -> bool:
        """Whether the bytes are stored."""
        return digest in self._blobs

    def digests(self) -> list[Digest]:
        """Every blob there is, sorted."""
        return sorted(self._blobs)

    def remove(self, digest: Digest) -> None:
        """Remove a blob."""
        self._blobs.pop(digest, None)


class MemoryUpload:
    """Implements `flops.ports.BlobUpload`."""

    def __init__(self, blobs: MemoryBlobs) -> None:
        self._blobs = blobs
        self._data = bytearray()

    def write(self, chunk: bytes) -> None:
        """Take in the next bytes."""
        self._data += chunk

    def commit(self, expected: Digest) -> None:
        """Store the bytes.

        Raises:
            FlopsError: ``upload_incomplete`` when their digest is another one.
        """
        found = hashlib.sha256(self._data).hexdigest()
        if found != expected:
            raise FlopsError(
                ErrorCode.UPLOAD_INCOMPLETE,
                f"The {len(self._data)} bytes sent as blob {expected} have the digest {found}.",
            )
        self._blobs.put(bytes(self._data))

    def discard(self) -> None:
        """Forget the bytes."""
        self._data.clear()
