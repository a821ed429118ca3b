"""What a registry knows beside blobs: manifests by name, and the tags that lead to them.

::

    <folder>/<name>/_manifests/<digest>    media type of a manifest, whose bytes are a blob
    <folder>/<name>/_tags/<tag>            digest of a manifest

No part of a name begins with an underscore, so names may contain each other. Files are whole or not there.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from flops.core.ids import Digest
from flops.core.images import Descriptor, Index, Manifest, read_manifest
from flops.durable_file import file_error, sync_folder, write_durably
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import KeptImageBlobs
from flops.registry.refusals import RefusedError
from flops.retention_ports import RegisteredImage

_MANIFESTS, _TAGS = "_manifests", "_tags"


class Repositories:
    """Manifests and tags; used from several threads of one process.

    Args:
        folder: where they are kept.
        blobs: holds the bytes of manifests, and everything they name.
    """

    def __init__(self, folder: Path, blobs: KeptImageBlobs) -> None:
        self._folder = folder
        self._blobs = blobs
        self._lock = threading.Lock()

    def put(self, name: str, data: bytes, media_type: str, tag: str = "") -> Digest:
        """Store a manifest whose parts are all there, and let a tag lead to it.

        Raises:
            RefusedError: a part is missing, or has another size.
            FlopsError: ``image_damaged`` when it is no manifest; ``disk_full``.
        """
        manifest = read_manifest(data, media_type)
        with self._lock:
            self._check_parts(name, manifest)
            digest = self._blobs.put(data)
            write_durably(self._folder / name / _MANIFESTS / digest, media_type)
            if tag:
                write_durably(self._folder / name / _TAGS / tag, digest)
        return digest

    def get(self, name: str, version: str) -> tuple[Digest, str, bytes]:
        """A manifest's digest, media type and bytes, by tag or ``sha256:…``.

        Raises:
            RefusedError: there is none.
        """
        digest = self._digest_of(name, version)
        try:
            record = self._folder / name / _MANIFESTS / digest
            media_type = record.read_text()
            data = self._blobs.get(digest)
            os.utime(record)  # says when it was used last
            return digest, media_type, data
        except FileNotFoundError:
            raise _unknown(name, version) from None
        except FlopsError as exc:
            if exc.code is ErrorCode.INTERNAL:  # damaged: gone is better, it can be pushed again
                self._blobs.remove(digest)
            raise _unknown(name, version) from exc

    def delete(self, name: str, version: str) -> None:
        """Remove a tag, or a manifest with all tags that lead to it.

        Raises:
            RefusedError: there is none.
        """
        digest = self._digest_of(name, version)
        with self._lock:
            if not version.startswith("sha256:"):
                self._remove(self._folder / name / _TAGS / version)
                return
            if not (self._folder / name / _MANIFESTS / digest).exists():
                raise _unknown(name, version)
            for tag in self.tags(name):
                path = self._folder / name / _TAGS / tag
                if path.read_text() == digest:
                    self._remove(path)
            self._remove(self._folder / name / _MANIFESTS / digest)

    def forget(self, name: str) -> None:
        """Remove everything of a name; its blobs go when nobody else needs them."""
        with self._lock:
            for kind in (_TAGS, _MANIFESTS):  # a tag never leads to what is gone
                for entry in list(_entries(self._folder / name / kind)):
                    self._remove(self._folder / name / kind / entry)

    def tags(self, name: str) -> list[str]:
        """All tags of a name, sorted."""
        return sorted(_entries(self._folder / name / _TAGS))

    def names(self) -> list[str]:
        """All names that have manifests, sorted."""
        found = [
            str(path.parent.relative_to(self._folder))
            for path in self._folder.rglob(_MANIFESTS)
            if next(_entries(path), None)
        ]
        return sorted(found)

    def describe(self, name: str) -> RegisteredImage:
        """What a name has; of an unknown one, nothing."""
        parts: dict[Digest, int] = {}
        platforms: set[str] = set()
        used_at_s = 0.0
        for entry in _entries(self._folder / name / _MANIFESTS):
            with contextlib.suppress(FlopsError, FileNotFoundError):  # damaged, or removed meanwhile
                used_at_s = max(used_at_s, (self._folder / name / _MANIFESTS / entry).stat().st_mtime)
                data = self._blobs.get(Digest(entry))
                manifest = read_manifest(data)
                parts[Digest(entry)] = len(data)
                parts |= {part.digest: part.size for part in _parts(manifest)}
                platforms |= {part.platform for part in _parts(manifest) if part.platform}
        tags = self.tags(name)
        with contextlib.suppress(RefusedError, IndexError):
            return RegisteredImage(
                name, tuple(tags), self._digest_of(name, tags[-1]), tuple(sorted(platforms)), parts, used_at_s
            )
        return RegisteredImage(name, (), "", tuple(sorted(platforms)), parts, used_at_s)

    def collect_garbage(self, since_s: float, among: Collection[Digest] | None = None) -> int:
        """Remove blobs that no manifest names, and that nobody sent or asked for since then.

        Blobs come before the manifest that names them: `since_s` is longer ago than any push takes.

        Args:
            since_s: seconds since the epoch.
            among: of no other blobs; None for all.

        Returns:
            The bytes given back.
        """
        used = self._used()
        return sum(
            self._blobs.remove_unless_used(digest, since_s)
            for digest in (self._blobs.digests() if among is None else among)
            if digest not in used
        )

    def _used(self) -> set[Digest]:
        used: set[Digest] = set()
        for name in self.names():
            for entry in _entries(self._folder / name / _MANIFESTS):
                digest = Digest(entry)
                used.add(digest)
                with contextlib.suppress(FlopsError):  # one that is damaged keeps nothing
                    manifest = read_manifest(self._blobs.get(digest))
                    used.update(part.digest for part in _parts(manifest))
        return used

    def _check_parts(self, name: str, manifest: Manifest | Index) -> None:
        for part in _parts(manifest):
            is_there = self._blobs.has(part.digest) and self._blobs.size(part.digest) == part.size
            if isinstance(manifest, Index):
                is_there = is_there and (self._folder / name / _MANIFESTS / part.digest).exists()
            if not is_there:
                raise RefusedError(
                    404, "MANIFEST_BLOB_UNKNOWN", f"{name} has no sha256:{part.digest} of {part.size} bytes."
                )

    def _digest_of(self, name: str, version: str) -> Digest:
        if version.startswith("sha256:"):
            return Digest(version.removeprefix("sha256:"))
        try:
            return Digest((self._folder / name / _TAGS / version).read_text())
        except FileNotFoundError:
            raise _unknown(name, version) from None

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
            sync_folder(path.parent)
        except OSError as exc:
            raise file_error(exc, path) from exc


def _parts(manifest: Manifest | Index) -> list[Descriptor]:
    return list(manifest.manifests if isinstance(manifest, Index) else manifest.blobs)


def _entries(folder: Path) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError):
        yield from (path.name for path in folder.iterdir() if not path.name.startswith("."))


def _unknown(name: str, version: str) -> RefusedError:
    return RefusedError(404, "MANIFEST_UNKNOWN", f"{name} has no {version}.")
