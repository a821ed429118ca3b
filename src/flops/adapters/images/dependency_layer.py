"""A layer of dependencies: a virtual environment such as ``/opt/env``, made by uv from wheels alone.

No code of any package is run, so a layer can be made for a platform that this machine is not. What uv writes
about this machine and this moment is left out.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from flops.adapters.images.bytecode import compile_modules
from flops.adapters.images.layer_cache import LayerCache, key_of
from flops.adapters.images.layer_file import pack_layer
from flops.adapters.uv_program import UvProgram, uv_error, with_site_packages
from flops.command import Completed
from flops.core.images import BaseImage, Layer
from flops.core.platforms import Platform
from flops.core.resolution import essence, locked_versions
from flops.durable_file import file_error
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import Report
from flops.package_ports import SitePackages

ENVIRONMENT = "/opt/env"
_LIBC = "manylinux_2_28"  # Debian 10, RHEL 8, and what is newer
_UNSOLVED = "No solution found when resolving dependencies"
_SOURCE_ONLY = "building from source is disabled"  # uv's words for a package that has no wheel it can use
_OF_THIS_MACHINE = ("uv_cache.json", "direct_url.json")
_WITH_NOTES_OF_IT = re.compile(r"(?:bin/|[^/]+\.dist-info/(?:uv_cache|direct_url)\.json).*\n")


class Locked(NamedTuple):
    """A lock, and where its environment is in the image."""

    path: str
    lock: str


def dependency_layer(
    cache: LayerCache,
    uv: UvProgram,
    base: BaseImage,
    locked: Locked,
    timeout_s: float,
    report: Report,
    near: SitePackages | None = None,
) -> Layer:
    """The layer of a lock at a path for a base, from the cache if it is there.

    A newer base with the same Python keeps it: wheels ask for no more of a system than its libc.

    Raises:
        FlopsError: ``dependencies_unresolvable``, ``image_build_failed``, ``unreachable``, ``timeout``,
            ``disk_full``.
    """
    path, lock = locked
    count = len(locked_versions(lock))
    what = f"The layer of {count} packages for {base.platform}"

    def make(notes: Path, descriptor: int) -> Layer:
        report(f"{what} is being made.")
        root = notes / "root"
        environment = root / path[1:]
        site = environment / "lib" / f"python{base.python}" / "site-packages"
        try:
            site.mkdir(parents=True)
            _install(notes, site, descriptor)
            _tidy(site)
            compile_modules(
                site,
                f"/{site.relative_to(root)}",
                python=base.python,
                uv=uv,
                descriptor=descriptor,
            )
            _make_environment(environment, base)
        except OSError as exc:
            raise file_error(exc, root) from exc
        return pack_layer(root, cache.blobs, f"{count} packages in {path}")

    def _install(notes: Path, site: Path, descriptor: int) -> None:
        file = notes / "lock.txt"
        file.write_text(lock)
        command = ["pip", "install", "--target", str(site), "--requirements", str(file), "--require-hashes"]
        command += ["--only-binary", ":all:", "--python-version", base.python]
        command += ["--python-platform", f"{base.platform.machine}-{_LIBC}"]
        command += ["--python", str(uv.find_python(base.python)), "--link-mode", "hardlink"]

        def watch(news: str) -> None:
            for line in news.splitlines():
                if line.strip().startswith("Downloading"):
                    report(f"{line.strip()}.")

        done = with_site_packages(
            uv, near, lock, lambda uv: uv.run(command, notes, timeout_s, watch, [descriptor]), report
        )
        if _UNSOLVED in done.errors:
            raise _no_wheels(done, base.platform)
        if done.exit_code != 0:
            error = uv_error(done, f"The dependencies cannot be installed for {base.platform}")
            if error.code is ErrorCode.ENVIRONMENT_BUILD_FAILED:
                raise FlopsError(ErrorCode.IMAGE_BUILD_FAILED, error.message, details=error.details)
            raise error

    key = key_of("dependencies", path, lock, base.platform, base.python, base.interpreter, _LIBC)
    return cache.layer(key, what, make, report)


def _no_wheels(done: Completed, platform: Platform) -> FlopsError:
    """What to tell users of a requirement that has no wheel for a platform, or none at all."""
    hint = "Require versions that have wheels for it, or take it out of supported_platforms."
    if _SOURCE_ONLY in done.errors:
        hint = (
            "No source package is built into an image: require versions that have wheels, or have the "
            "project run from environments (packaging: environment), for which nodes build source packages."
        )
    explanation = done.errors[done.errors.index(_UNSOLVED) :]
    return FlopsError(
        ErrorCode.DEPENDENCIES_UNRESOLVABLE,
        f"There are no wheels of all dependencies for {platform}: {essence(explanation)}",
        hint=hint,
        details={"output": done.errors[-4_000:], "platform": platform.value},
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
    (folder / "bin").mkdir()
    for name in ("python", "python3"):
        (folder / "bin" / name).symlink_to(base.interpreter)
    home = str(Path(base.interpreter).parent)
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
