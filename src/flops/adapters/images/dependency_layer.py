"""A layer of dependencies: a virtual environment such as ``/opt/env``, made by uv from wheels.

No code of a package that has a wheel is run, so a layer can be made for a platform that this machine is not.
What has sources only is built in a container. What uv writes about this machine and this moment is left out.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from packaging.utils import canonicalize_name

from flops.adapters.images.bytecode import compile_modules
from flops.adapters.images.layer_cache import LayerCache, key_of
from flops.adapters.images.layer_file import pack_layer
from flops.adapters.images.source_packages import SourcePackages
from flops.adapters.uv_program import UvProgram, uv_error, with_site_packages
from flops.command import Completed
from flops.core.images import BaseImage, Layer
from flops.core.platforms import Platform
from flops.core.resolution import essence, locked_versions, split_lock
from flops.durable_file import file_error
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import Report
from flops.package_ports import SitePackages

ENVIRONMENT = "/opt/env"
_LIBC = "manylinux_2_28"  # Debian 10, RHEL 8, and what is newer
_UNSOLVED = "No solution found when resolving dependencies"
_SOURCE_ONLY = "building from source is disabled"  # uv's words for a package that has no wheel it can use
_WHEEL_WANTED = re.compile(r"Wheels are required for `(?P<name>[^`]+)` because building from source")
_OF_THIS_MACHINE = ("uv_cache.json", "direct_url.json")
_WITH_NOTES_OF_IT = re.compile(r"(?:bin/|[^/]+\.dist-info/(?:uv_cache|direct_url)\.json).*\n")


class Locked(NamedTuple):
    """A lock, and where its environment is in the image."""

    path: str
    lock: str


class _WheelLayer(Layer):
    """A layer of packages that have wheels."""

    lacking: tuple[str, ...] = ()  # names of those that have none


class DependencyLayers:
    """Makes the layers of locks.

    Args:
        cache: of layers.
        uv: uv.
        timeout_s: for downloading and unpacking the wheels of one lock and platform.
        near: who near has packages; nobody if not given.
        sources: builds packages that have no wheel; without it they are refused.
    """

    def __init__(
        self,
        cache: LayerCache,
        uv: UvProgram,
        timeout_s: float,
        near: SitePackages | None = None,
        sources: SourcePackages | None = None,
    ) -> None:
        self._cache = cache
        self._uv = uv
        self._timeout_s = timeout_s
        self._near = near
        self._sources = sources

    def layers(self, base: BaseImage, locked: Locked, report: Report) -> tuple[Layer, ...]:
        """The layers of a lock at a path for a base, from the cache if they are there.

        A newer base with the same Python keeps that of the wheels, which ask for no more of a system than its
        libc. What was built from source is another layer, for this very base.

        Raises:
            FlopsError: ``dependencies_unresolvable``, ``image_build_failed``, ``unreachable``, ``timeout``,
                ``disk_full``.
        """
        path, lock = locked
        count = len(locked_versions(lock))
        what = f"The layer of {count} packages for {base.platform}"

        def make(notes: Path, descriptor: int) -> _WheelLayer:
            report(f"{what} is being made.")
            lacking = self._install(notes, _site(notes, path, base), lock, base, report, descriptor)
            _make_environment(notes / "root" / path[1:], base)
            layer = self._pack(notes, path, base, f"{count - len(lacking)} packages", descriptor)
            return _WheelLayer(**dict(layer), lacking=tuple(sorted(lacking)))

        key = key_of("dependencies", path, lock, base.platform, base.python, base.interpreter, _LIBC)
        made = self._cache.made(_WheelLayer, key, what, make, report)
        if not made.lacking:
            return (made,)
        return made, self._source_layer(base, Locked(path, split_lock(lock, made.lacking)[1]), report)

    def _source_layer(self, base: BaseImage, locked: Locked, report: Report) -> Layer:
        if self._sources is None:
            raise _without_containers(base.platform, ", ".join(locked_versions(locked.lock)))
        sources = self._sources
        path, lock = locked
        built = sources.layer(lock, base, report)
        names = ", ".join(locked_versions(lock))

        def make(notes: Path, descriptor: int) -> Layer:
            sources.unpack(built, _site(notes, path, base))
            return self._pack(notes, path, base, f"{names}, built from source,", descriptor)

        key = key_of("sources", path, built.diff_id, base.platform, base.python)
        return self._cache.layer(key, f"The layer of {names} for {base.platform}", make, report)

    def _install(
        self, notes: Path, site: Path, lock: str, base: BaseImage, report: Report, descriptor: int
    ) -> set[str]:
        """Install what has a wheel; returns the names of the others."""
        file = notes / "lock.txt"
        command = ["pip", "install", "--target", str(site), "--requirements", str(file), "--require-hashes"]
        command += ["--only-binary", ":all:", "--python-version", base.python]
        command += ["--python-platform", f"{base.platform.machine}-{_LIBC}"]
        command += ["--python", str(self._uv.find_python(base.python)), "--link-mode", "hardlink"]

        def watch(news: str) -> None:
            for line in news.splitlines():
                if line.strip().startswith("Downloading"):
                    report(f"{line.strip()}.")

        def install(uv: UvProgram) -> Completed:
            return uv.run(command, notes, self._timeout_s, watch, [descriptor])

        lacking: set[str] = set()
        while True:
            wheels, _ = split_lock(lock, lacking)
            file.write_text(wheels)
            done = with_site_packages(self._uv, self._near, wheels, install, report)
            new = _source_only(done.errors) & locked_versions(wheels).keys()
            if done.exit_code == 0 or not new or self._sources is None:
                break
            lacking |= new
            if len(lacking) == len(new):  # the first: others may need it, which is in the lock, but not here
                command.append("--no-deps")
        if done.exit_code != 0:
            raise _error(done, base.platform)
        return lacking

    def _pack(self, notes: Path, path: str, base: BaseImage, what: str, descriptor: int) -> Layer:
        root, site = notes / "root", _site(notes, path, base)
        try:
            _tidy(site)
            place = f"/{site.relative_to(root)}"
            compile_modules(site, place, python=base.python, uv=self._uv, descriptor=descriptor)
        except OSError as exc:
            raise file_error(exc, root) from exc
        return pack_layer(root, self._cache.blobs, f"{what} in {path}")


def _site(notes: Path, path: str, base: BaseImage) -> Path:
    """Where packages are in a layer that is being made; the folder is there."""
    site = notes / "root" / path[1:] / "lib" / f"python{base.python}" / "site-packages"
    try:
        site.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise file_error(exc, site) from exc
    return site


def _source_only(errors: str) -> set[str]:
    """Names of packages that uv did not install because they have no wheel that it can use."""
    return {str(canonicalize_name(found["name"])) for found in _WHEEL_WANTED.finditer(errors)}


def _without_containers(
    platform: Platform, what: str, details: Mapping[str, str] | None = None
) -> FlopsError:
    return FlopsError(
        ErrorCode.DEPENDENCIES_UNRESOLVABLE,
        f"There are no wheels of all dependencies for {platform}: {what}",
        hint="It has sources only, which are not built here: require versions that have wheels, or have the "
        "project run from environments (packaging: environment).",
        details=details,
    )


def _error(done: Completed, platform: Platform) -> FlopsError:
    """What to tell users when uv failed, as it does for want of a wheel for a platform, or of any."""
    if _UNSOLVED not in done.errors:
        error = uv_error(done, f"The dependencies cannot be installed for {platform}")
        if error.code is not ErrorCode.ENVIRONMENT_BUILD_FAILED:
            return error
        return FlopsError(ErrorCode.IMAGE_BUILD_FAILED, error.message, details=error.details)
    explanation = essence(done.errors[done.errors.index(_UNSOLVED) :])
    details = {"output": done.errors[-4_000:], "platform": platform.value}
    if _SOURCE_ONLY in done.errors:
        return _without_containers(platform, explanation, details)
    return FlopsError(
        ErrorCode.DEPENDENCIES_UNRESOLVABLE,
        f"There are no wheels of all dependencies for {platform}: {explanation}",
        hint="Require versions that have wheels for it, or take it out of supported_platforms.",
        details=details,
    )


def _tidy(site: Path) -> None:
    """Leave out what is of this machine: the scripts begin with the path of its Python."""
    shutil.rmtree(site / "bin", ignore_errors=True)
    (site / ".lock").unlink(missing_ok=True)
    for info in site.glob("*.dist-info"):
        for name in _OF_THIS_MACHINE:
            (info / name).unlink(missing_ok=True)
        record = info / "RECORD"
        if record.is_file():
            kept = [
                line
                for line in record.read_text().splitlines(keepends=True)
                if not _WITH_NOTES_OF_IT.fullmatch(line)
            ]
            record.unlink()  # it may be a link into uv's cache
            record.write_text("".join(kept))


def _make_environment(folder: Path, base: BaseImage) -> None:
    try:
        (folder / "bin").mkdir()
        for name in ("python", "python3"):
            (folder / "bin" / name).symlink_to(base.interpreter)
        home = str(Path(base.interpreter).parent)
        (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    except OSError as exc:
        raise file_error(exc, folder) from exc
