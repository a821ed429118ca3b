"""Packages that have no wheel for a platform: built from source in a container of the image's base.

A build runs the package's own code, and may compile: for the base's libraries, by the compiler that is there.
So it is a Dockerfile's business. What is installed then is one layer in the cache, whoever needs it.
"""

from __future__ import annotations

import os
import shlex
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from flops.adapters.images.container_folder import OpenLayout, lay_out, layers_of, made_image
from flops.adapters.images.layer_cache import LayerCache, key_of
from flops.adapters.images.layer_file import ChunkFile, pack_layer
from flops.adapters.images.stored_image import store_image
from flops.adapters.uv_program import UvProgram, uv_error
from flops.command import stop_if_needless
from flops.core.ids import Digest
from flops.core.images import BaseImage, ImageRun, Layer
from flops.core.platforms import Platform
from flops.core.resolution import locked_versions
from flops.durable_file import file_error
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import BaseImages, ContainerBuild, ContainerBuilds, ImageBlobs, Report

_BASE = "flops/base"
_DOCKERFILE = f"""\
FROM {_BASE} AS build
COPY . /build
RUN sh /build/install
FROM scratch
COPY --from=build /built /
"""
_COMMAND = (
    "/build/uv pip install --target /built --python {python} --no-deps --require-hashes --no-binary :all: "
    "--requirements /build/sources.txt"
)
_OF_THE_CONTAINER = {"UV_CACHE_DIR": "/tmp/cache", "UV_LINK_MODE": "copy", "UV_PYTHON_DOWNLOADS": "never"}  # noqa: S108
_OF_THIS_MACHINE = ("UV_CACHE_DIR", "UV_CONFIG_FILE", "UV_LINK_MODE", "UV_PYTHON", "UV_PROJECT", "UV_TOOL")
_CERTIFICATES, _CONFIGURATION = "SSL_CERT_FILE", "UV_CONFIG_FILE"
_FETCH_TIMEOUT_S = 600.0


class SourcePackages:
    """Builds source packages for images.

    Args:
        cache: of what was built.
        builds: runs containers.
        uv: uv; its settings are those of the containers, too.
        open_layout: opens the blobs of an image layout by its folder.
        runs_here: whether programs of a platform run on this machine.
        toolchain: bases with compilers, with the same libraries as the image's; None to build on its own.
        timeout_s: for all packages of an environment and one platform.
    """

    def __init__(
        self,
        cache: LayerCache,
        builds: ContainerBuilds,
        uv: UvProgram,
        open_layout: OpenLayout,
        *,
        runs_here: Callable[[Platform], bool],
        toolchain: BaseImages | None = None,
        timeout_s: float = 3_600.0,
    ) -> None:
        self._cache = cache
        self._builds = builds
        self._uv = uv
        self._open_layout = open_layout
        self._runs_here = runs_here
        self._toolchain = toolchain
        self._timeout_s = timeout_s

    def layer(self, lock: str, base: BaseImage, report: Report) -> Layer:
        """All packages of a lock, installed into the layer's root.

        Args:
            lock: of nothing but these packages.
            base: of the image.
            report: is told each step, in one sentence.

        Raises:
            FlopsError: ``dependencies_unresolvable`` when the platform's programs do not run here;
                ``image_build_failed``, ``timeout``, ``disk_full``, and what `toolchain` raises.
        """
        names = ", ".join(locked_versions(lock))
        if not self._runs_here(base.platform):
            raise FlopsError(
                ErrorCode.DEPENDENCIES_UNRESOLVABLE,
                f"{names}: there is no wheel for {base.platform}, and none can be built on "
                f"{os.uname().nodename}, which runs no programs of that platform.",
                hint="Require versions that have wheels, install qemu-user-static there (Debian: with "
                "binfmt-support), or take the platform out of supported_platforms.",
            )
        what = f"The build of {names}"
        blobs = self._cache.blobs
        if self._toolchain is not None:
            base = self._toolchain.base(base.platform, blobs, report)

        def make(notes: Path, descriptor: int) -> Layer:
            report(f"{names}: built from source for {base.platform}, as there is no wheel.")
            root, folder = notes / "root", notes / "build"
            run = ImageRun(env=base.env, user="0:0", work_dir="/")
            image = store_image(blobs, base.platform, base.layers, run)
            try:
                root.mkdir()
                folder.mkdir()
                context = self._context(notes, lock, base)
                lay_out(folder, _DOCKERFILE, context, [image], blobs, self._open_layout)
                build = ContainerBuild(folder, base.platform, (_BASE,), self._timeout_s, what)
                self._builds.run(build, report, [descriptor])
                made, built = made_image(folder, self._open_layout)
                for _, layer in layers_of(made, built):
                    _unpack(made, layer.digest, root)
            except OSError as exc:
                raise file_error(exc, notes) from exc
            return pack_layer(root, blobs, f"{names}, built from source")

        key = key_of("built", lock, base.platform, base.python, *(layer.diff_id for layer in base.layers))
        try:
            return self._cache.layer(key, f"{what} for {base.platform}", make, report)
        except FlopsError as exc:
            if exc.code is not ErrorCode.DOCKERFILE_FAILED:
                raise
            raise FlopsError(
                ErrorCode.IMAGE_BUILD_FAILED,
                exc.message,
                hint="What a source package needs, such as a compiler or a library, the Dockerfile of the "
                "repository can install (docs/images.md); or require versions that have wheels.",
                details=exc.details,
            ) from exc

    def unpack(self, built: Layer, site: Path) -> None:
        """Put the packages of a layer into a folder.

        Raises:
            FlopsError: ``disk_full``, ``image_damaged``.
        """
        try:
            _unpack(self._cache.blobs, built.blob.digest, site)
        except OSError as exc:
            raise file_error(exc, site) from exc

    def _context(self, notes: Path, lock: str, base: BaseImage) -> Mapping[str, Path]:
        """What the build needs of us: uv, its settings, and what is to be built."""
        environ = self._uv.environ
        context = {"uv": self._uv_for(base.platform, notes)}
        settings = {
            name: value
            for name, value in environ.items()
            if name.startswith("UV_") and not name.startswith(_OF_THIS_MACHINE)
        }
        for name, file in ((_CERTIFICATES, environ.get(_CERTIFICATES)), (_CONFIGURATION, _uv_file(environ))):
            if file is not None and Path(file).is_file():
                context[name] = Path(file)
                settings[name] = f"/build/{name}"
        lines = (
            f"export {name}={shlex.quote(value)}\n"
            for name, value in {**settings, **_OF_THE_CONTAINER}.items()
        )
        install = "".join(lines) + _COMMAND.format(python=base.interpreter)
        for place, text in (("install", install), ("sources.txt", lock)):
            context[place] = notes / place
            context[place].write_text(text)
        return context

    def _uv_for(self, platform: Platform, notes: Path) -> Path:
        """The uv program for a platform: this one, or the same from the package index."""
        if platform.machine == os.uname().machine:
            return self._uv.path
        version = self._uv.run(["--version"], notes, 60.0).output.decode().split()[1]
        target = notes / "tools"
        command = ["pip", "install", "--target", str(target), "--only-binary", ":all:", f"uv=={version}"]
        command += ["--python-platform", f"{platform.machine}-manylinux_2_28"]
        done = self._uv.run(command, notes, _FETCH_TIMEOUT_S)
        if done.exit_code != 0:
            raise uv_error(done, f"uv for {platform}, which builds source packages, cannot be fetched")
        return target / "bin" / "uv"


def _uv_file(environ: Mapping[str, str]) -> str | None:
    """The configuration that uv reads here."""
    folder = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "/nonexistent"), ".config"))
    return environ.get(_CONFIGURATION) or str(Path(folder, "uv", "uv.toml"))


def _unpack(blobs: ImageBlobs, digest: Digest, folder: Path) -> None:
    """Take the files of a layer, and nothing else: somebody's code made it, and links could lead anywhere."""
    try:
        with tarfile.open(fileobj=ChunkFile(blobs.chunks(digest)), mode="r|*") as archive:
            for member in archive:
                stop_if_needless()
                place = PurePosixPath(member.name)
                source = archive.extractfile(member) if member.isreg() else None
                if source is None or place.is_absolute() or ".." in place.parts:
                    continue
                target = folder / place
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    while chunk := source.read(1_048_576):
                        file.write(chunk)
                target.chmod(0o755 if member.mode & 0o111 else 0o644)
    except tarfile.TarError as exc:
        raise FlopsError(ErrorCode.IMAGE_DAMAGED, f"The layer {digest[:12]} cannot be read: {exc}.") from exc
