"""Images put together from layers: without a container, without root, for any platform."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

from flops.adapters.images.at_once import at_once
from flops.adapters.images.bytecode import compile_modules
from flops.adapters.images.dependency_layer import ENVIRONMENT, DependencyLayers, Locked
from flops.adapters.images.folder_content import files_in, fingerprint
from flops.adapters.images.layer_cache import LayerCache, key_of
from flops.adapters.images.layer_file import pack_layer
from flops.adapters.images.source_packages import SourcePackages
from flops.adapters.images.stored_image import store, store_image
from flops.adapters.uv_program import UvProgram
from flops.core.images import (
    INDEX,
    PYTHON_LABEL,
    BaseImage,
    Descriptor,
    Layer,
    index_bytes,
)
from flops.core.platforms import Platform
from flops.durable_file import file_error
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import BaseImages, ImageBlobs, ImageRecipe, Report
from flops.package_ports import SitePackages

_INSTALL_TIMEOUT_S = 3_600.0
_PYTHON = re.compile(r"# python (?P<python>\d+\.\d+)\n")


class OciAssembler:
    """Implements `flops.image_ports.ImageAssembler`.

    Args:
        root: where it is written down which layers there are, and where they are made.
        blobs: where all parts of images are stored.
        bases: what images are put on.
        uv: uv, with its environment.
        environ: of uv; its ``UV_*`` variables decide which index, cache and links are used.
        site: who near has packages; nobody if not given.
        sources: builds packages that have no wheel; without it they are refused.
    """

    def __init__(
        self,
        root: Path,
        blobs: ImageBlobs,
        bases: BaseImages,
        *,
        uv: Path,
        environ: Mapping[str, str],
        site: SitePackages | None = None,
        sources: SourcePackages | None = None,
    ) -> None:
        self._cache = LayerCache(root, blobs)
        self._blobs = blobs
        self._bases = bases
        self._uv = UvProgram(uv, environ)
        self._dependencies = DependencyLayers(self._cache, self._uv, _INSTALL_TIMEOUT_S, site, sources)

    def assemble(self, recipe: ImageRecipe, report: Report) -> Descriptor:
        """Make an image for each platform of the recipe; returns the descriptor of their index.

        Raises:
            FlopsError: see `flops.image_ports.ImageAssembler.assemble`.
        """
        images = at_once([partial(self._image, recipe, each, report) for each in recipe.platforms])
        return store(self._blobs, index_bytes(images), INDEX)

    def _image(self, recipe: ImageRecipe, platform: Platform, report: Report) -> Descriptor:
        foreseen = self._bases.foreseen(platform)
        base = foreseen or self._bases.base(platform, self._blobs, report)
        locks = {**({ENVIRONMENT: recipe.lock} if recipe.lock else {}), **recipe.environments}
        works: list[Callable[[], Sequence[Layer]]] = []
        if foreseen is not None:
            works.append(lambda: self._bases.base(platform, self._blobs, report).layers)
        for path, lock in locks.items():
            _check_python(lock, base)
            works.append(partial(self._dependencies.layers, base, Locked(path, lock), report))
        if recipe.modules:
            works.append(
                partial(self._layer, "the modules it needs", {}, recipe.modules, base.python, report)
            )
        works.append(partial(self._layer, "the code", recipe.files, recipe.folders, base.python, report))
        layers = [*base.layers, *chain.from_iterable(at_once(works))]
        run = recipe.run.model_copy(
            update={
                "env": {**_environment(base, locks), **recipe.run.env},
                "labels": {PYTHON_LABEL: base.python, **recipe.run.labels},
            }
        )
        return store_image(self._blobs, platform, layers, run)

    def _layer(
        self,
        of: str,
        content: Mapping[str, bytes],
        folders: Mapping[str, Path],
        python: str,
        report: Report,
    ) -> tuple[Layer]:
        """A layer of files, the same for all platforms; named by its content, it is made once."""
        what = f"The layer of {of}"
        files = {path: hashlib.sha256(data).hexdigest() for path, data in content.items()}
        try:
            for inside, folder in folders.items():
                for path in files_in(folder):
                    place = str(PurePosixPath(inside) / path.relative_to(folder).as_posix())
                    files[place] = fingerprint(path)
        except OSError as exc:
            raise file_error(exc, folder) from exc

        def make(notes: Path, descriptor: int) -> Layer:
            report(f"{what} is being made of {len(files)} files.")
            root = notes / "root"
            try:
                _lay_out(root, content, folders)
            except OSError as exc:
                raise file_error(exc, root) from exc
            compile_modules(root, "", python=python, uv=self._uv, descriptor=descriptor)
            return pack_layer(root, self._blobs, f"{len(files)} files of {of}")

        key = key_of("code", python, *(f"{path}\0{digest}" for path, digest in sorted(files.items())))
        return (self._cache.layer(key, what, make, report),)


def _check_python(lock: str, base: BaseImage) -> None:
    found = _PYTHON.match(lock)
    if found is not None and found["python"] != base.python:
        raise FlopsError(
            ErrorCode.IMAGE_BUILD_FAILED,
            f"The dependencies are locked for Python {found['python']}, the base image for {base.platform} "
            f"has Python {base.python}.",
            hint=f"Ask for Python {base.python} in the dependency file, or use another base image.",
        )


def _environment(base: BaseImage, environments: Iterable[str]) -> dict[str, str]:
    path = base.env.get("PATH", "/usr/local/bin:/usr/bin:/bin")
    return {
        **base.env,
        "PATH": ":".join([*(f"{environment}/bin" for environment in environments), path]),
        "PYTHONDONTWRITEBYTECODE": "1",  # its files cannot be written, and have it already
        "PYTHONUNBUFFERED": "1",
        "HOME": "/tmp",  # noqa: S108 (of the container; the one place it may write to)
    }


def _lay_out(root: Path, content: Mapping[str, bytes], folders: Mapping[str, Path]) -> None:
    root.mkdir()
    for inside, folder in folders.items():
        for path in files_in(folder):
            target = _place(root, PurePosixPath(inside) / path.relative_to(folder).as_posix())
            shutil.copy2(path, target, follow_symlinks=False)
    for inside, data in content.items():
        _place(root, PurePosixPath(inside)).write_bytes(data)


def _place(root: Path, inside: PurePosixPath) -> Path:
    parts = [part for part in inside.parts if part != "/"]
    if not parts or ".." in parts:
        raise FlopsError(ErrorCode.IMAGE_BUILD_FAILED, f"{inside} is no place in an image.")
    target = root.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
