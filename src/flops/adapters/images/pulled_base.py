"""A base image that a registry has: any with a Python and the GNU C library."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from flops.adapters.images.layer_file import ChunkFile
from flops.command import stop_if_needless
from flops.core.image_reference import ImageReference
from flops.core.images import BaseImage, Descriptor, Layer, Manifest, read_config, read_manifest
from flops.core.platforms import Platform
from flops.durable_file import write_durably
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs, Registry, Report

_INTERPRETER = re.compile(r"(?:\./|/)?(?P<path>(?:usr/local|usr|opt/[^/]+)/bin/python(?P<minor>3\.\d+))")


class PulledBase:
    """Implements `flops.image_ports.BaseImages`.

    One that is named by its digest is pulled once. One that is named by a tag is looked for each time, and
    used as it was the last time while the registry is away.

    Args:
        root: where it is written down what was pulled.
        registry: brings images here.
        reference: the image.
    """

    def __init__(self, root: Path, registry: Registry, reference: ImageReference) -> None:
        self._root = root
        self._registry = registry
        self._reference = reference

    def foreseen(self, _platform: Platform) -> BaseImage | None:
        """None: its Python is found in its layers."""
        return None

    def base(self, platform: Platform, blobs: ImageBlobs, report: Report) -> BaseImage:
        """The base for a platform.

        Raises:
            FlopsError: ``image_not_found``, ``image_damaged``, ``registry_unreachable``,
                ``registry_refused``, ``disk_full``; ``image_build_failed`` when it has no Python.
        """
        known = self._known(platform, blobs)
        if known is not None and self._reference.digest is not None:
            return known
        try:
            found = self._registry.pull(self._reference, blobs, report, platform)
        except FlopsError as exc:
            if known is None or exc.code is not ErrorCode.REGISTRY_UNREACHABLE:
                raise
            report(f"{exc.message} The base image is taken as it was the last time.")
            return known
        base = self._read(found, platform, blobs)
        write_durably(self._record_of(platform), base.model_dump_json())
        return base

    def _record_of(self, platform: Platform) -> Path:
        name = hashlib.sha256(f"{self._reference} {platform}".encode()).hexdigest()
        return self._root / f"base-{name}.json"

    def _known(self, platform: Platform, blobs: ImageBlobs) -> BaseImage | None:
        try:
            base = BaseImage.model_validate_json(self._record_of(platform).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return base if all(blobs.is_intact(layer.blob.digest) for layer in base.layers) else None

    def _read(self, found: Descriptor, platform: Platform, blobs: ImageBlobs) -> BaseImage:
        manifest = read_manifest(blobs.get(found.digest), found.media_type)
        if not isinstance(manifest, Manifest):
            raise FlopsError(
                ErrorCode.IMAGE_NOT_FOUND, f"{self._reference} leads to no image for {platform}."
            )
        diff_ids, env, _ = read_config(blobs.get(manifest.config.digest))
        if len(diff_ids) != len(manifest.layers):
            raise FlopsError(ErrorCode.IMAGE_DAMAGED, f"{self._reference} does not name all its layers.")
        layers = tuple(
            Layer(blob=blob, diff_id=diff_id, what=str(self._reference))
            for blob, diff_id in zip(manifest.layers, diff_ids, strict=True)
        )
        for layer in reversed(layers):
            for name in self._names(layer.blob, blobs):
                if (place := _INTERPRETER.fullmatch(name)) is not None:
                    return BaseImage(
                        platform=platform,
                        layers=layers,
                        python=place["minor"],
                        interpreter=f"/{place['path']}",
                        env=env,
                    )
        raise FlopsError(
            ErrorCode.IMAGE_BUILD_FAILED,
            f"{self._reference} has no Python 3 in /usr/local/bin, /usr/bin or /opt/…/bin.",
            hint="Use a base image with a Python, such as Debian's own.",
        )

    def _names(self, layer: Descriptor, blobs: ImageBlobs) -> Iterator[str]:
        try:
            with tarfile.open(fileobj=ChunkFile(blobs.chunks(layer.digest)), mode="r|*") as archive:
                for member in archive:
                    stop_if_needless()
                    yield member.name
        except tarfile.TarError as exc:
            raise FlopsError(
                ErrorCode.IMAGE_DAMAGED,
                f"A layer of {self._reference} ({layer.media_type}) cannot be read: {exc}.",
                hint="Use a base image whose layers are compressed by gzip.",
            ) from exc
