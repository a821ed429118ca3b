"""Images of repositories' Dockerfiles: made once for what they begin with, and for the files they take."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flops.adapters.images.container_folder import (
    OpenLayout,
    copy_blob,
    lay_out,
    layers_of,
    made_image,
    manifest_of,
)
from flops.adapters.images.folder_content import files_in, fingerprint
from flops.adapters.images.layer_cache import LayerCache, key_of
from flops.adapters.images.stored_image import store
from flops.core.dockerfile import NAMES, Dockerfile, base_reference, read_dockerfile
from flops.core.ids import Digest
from flops.core.image_reference import DIGEST, ImageReference
from flops.core.images import (
    INDEX,
    MANIFEST,
    Descriptor,
    PlatformImage,
    index_bytes,
    manifest_bytes,
)
from flops.core.platforms import Platform
from flops.durable_file import file_error, write_durably
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ContainerBuild, ContainerBuilds, ImageBlobs, Registry, Report

_IGNORES = (".dockerignore", ".containerignore")


class DockerfileImages:
    """Implements `flops.image_ports.RepositoryImages`.

    Args:
        root: where it is written down what was made, and where it is made.
        blobs: where all parts of images are stored.
        registry: brings the images that Dockerfiles begin with.
        builds: runs Dockerfiles.
        open_layout: opens the blobs of an image layout by its folder, which may be new.
        runs_here: whether programs of a platform run on this machine.
        timeout_s: for a Dockerfile and one platform.
    """

    def __init__(
        self,
        root: Path,
        blobs: ImageBlobs,
        registry: Registry,
        builds: ContainerBuilds,
        open_layout: OpenLayout,
        *,
        runs_here: Callable[[Platform], bool],
        timeout_s: float = 3_600.0,
    ) -> None:
        self._root = root
        self._cache = LayerCache(root, blobs)
        self._blobs = blobs
        self._registry = registry
        self._builds = builds
        self._open_layout = open_layout
        self._runs_here = runs_here
        self._timeout_s = timeout_s

    def make(self, repository: Path, platforms: Sequence[Platform], report: Report) -> Descriptor:
        """The image of the repository's Dockerfile for each platform; returns the index's descriptor.

        Raises:
            FlopsError: see `flops.image_ports.RepositoryImages.make`; ``dockerfile_failed`` also when it asks
                for another platform, ``image_build_failed`` also when a platform's programs do not run here.
        """
        file = _file_in(repository)
        if file is None:
            raise FlopsError(ErrorCode.DOCKERFILE_FAILED, f"The repository has no {' or '.join(NAMES)}.")
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise FlopsError(ErrorCode.DOCKERFILE_FAILED, f"{file.name} cannot be read: {exc}.") from exc
        recipe = read_dockerfile(text, file.name)
        for platform in platforms:
            self._check(recipe, file.name, platform)
        images = [self._image(repository, recipe, platform, report) for platform in platforms]
        return store(self._blobs, index_bytes(images), INDEX)

    def _check(self, recipe: Dockerfile, name: str, platform: Platform) -> None:
        if other := [asked for asked in recipe.platforms if asked != platform]:
            raise FlopsError(
                ErrorCode.DOCKERFILE_FAILED,
                f"{name} asks for the platform {other[0]}, the project for {platform}.",
                hint="Leave --platform out of FROM: supported_platforms says what images are made for.",
            )
        if recipe.runs_programs and not self._runs_here(platform):
            raise FlopsError(
                ErrorCode.IMAGE_BUILD_FAILED,
                f"{name} runs programs for {platform}, which do not run on {os.uname().nodename}.",
                hint="Install qemu-user-static there (Debian: with binfmt-support), build on a node of that "
                "platform, or take it out of supported_platforms.",
            )

    def _image(self, repository: Path, recipe: Dockerfile, platform: Platform, report: Report) -> Descriptor:
        pinned = [self._pinned(base_reference(name), report) for name in recipe.bases]
        context = dict(_context(repository, recipe))
        what = f"The image of the Dockerfile for {platform}"

        def make(notes: Path, descriptor: int) -> PlatformImage:
            report(f"{what} is being made.")
            bases = [self._registry.pull(base, self._blobs, report, platform.value) for base in pinned]
            try:
                lay_out(notes, recipe.text, context, bases, self._blobs, self._open_layout)
                build = ContainerBuild(notes, platform, recipe.bases, self._timeout_s)
                self._builds.run(build, report, [descriptor])
                return self._take(notes, platform, bases)
            except OSError as exc:
                raise file_error(exc, notes) from exc

        files = (f"{place}\0{fingerprint(path)}" for place, path in sorted(context.items()))
        key = key_of("dockerfile", platform, recipe.text, *map(str, pinned), *files)
        return self._cache.made(PlatformImage, key, what, make, report).manifest

    def _pinned(self, reference: ImageReference, report: Report) -> ImageReference:
        """Which image a name leads to; what it led to the last time while the registry is away."""
        if reference.digest is not None:
            return reference
        record = self._root / f"{hashlib.sha256(str(reference).encode()).hexdigest()}.from"
        try:
            digest = self._registry.find(reference).digest
        except FlopsError as exc:
            known = DIGEST.fullmatch(record.read_text()) if record.is_file() else None
            if known is None or exc.code is not ErrorCode.REGISTRY_UNREACHABLE:
                raise
            report(f"{exc.message} The image is taken as it was the last time.")
            return reference.at(Digest(known["hex"]))
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            write_durably(record, f"sha256:{digest}")
        except OSError as exc:
            raise file_error(exc, record) from exc
        return reference.at(digest)

    def _take(self, notes: Path, platform: Platform, bases: Sequence[Descriptor]) -> PlatformImage:
        """Store an image that was made; of what it began with, it keeps the layers as they are there."""
        source, image = made_image(notes, self._open_layout)
        known = dict(pair for base in bases for pair in layers_of(self._blobs, base))
        layers = [known.get(diff_id, blob) for diff_id, blob in layers_of(source, image)]
        config = manifest_of(source, image).config
        for part in (*layers, config):
            if not self._blobs.has(part.digest):
                copy_blob(part.digest, source, self._blobs)
        manifest = store(self._blobs, manifest_bytes(config, layers), MANIFEST, platform)
        return PlatformImage(manifest=manifest, parts=(*(layer.digest for layer in layers), config.digest))


def _file_in(repository: Path) -> Path | None:
    """The Dockerfile of a repository, if it has one in its root."""
    return next((path for name in NAMES if (path := repository / name).is_file()), None)


def _context(repository: Path, recipe: Dockerfile) -> Iterator[tuple[str, Path]]:
    """Files that the Dockerfile may take, by their path in the repository."""
    for path in files_in(repository):
        place = path.relative_to(repository).as_posix()
        if recipe.sources is None or place in _IGNORES or _is_in(place, recipe.sources):
            yield place, path


def _is_in(place: str, sources: Sequence[str]) -> bool:
    return any(place == source or place.startswith(f"{source}/") for source in sources)
