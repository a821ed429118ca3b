"""The uv program: run with a deadline, its failures as our errors, and the Pythons of this machine."""

from __future__ import annotations

import json
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import urlsplit

from packaging.version import Version

from flops.command import Completed, run_command
from flops.core.requirements import OLDEST_PYTHON
from flops.core.resolution import essence
from flops.errors import ErrorCode, FlopsError
from flops.package_ports import SitePackages

OWN_MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
_FULL_DISK = re.compile(r"no space left on device|os error 28|disk quota exceeded", re.IGNORECASE)
_NO_INDEX = re.compile(
    r"failed to fetch|error sending request|dns error|connection refused|timed out", re.IGNORECASE
)
_BUILD_FAILED = re.compile(r"Failed to build `(?P<what>[^`]+)`")
_NEAR_TIMEOUT_S = "600"
_PYTHON_VARIABLES = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX")


class UvProgram:
    """Runs uv.

    Args:
        uv: the program.
        environ: its environment. Its ``UV_*`` variables decide which index, cache and links are used.
    """

    def __init__(self, uv: Path, environ: Mapping[str, str]) -> None:
        self.path = uv
        self.environ = _tool_environment(environ)

    def having(self, **environ: str) -> UvProgram:
        """The same program with more in its environment."""
        return UvProgram(self.path, {**self.environ, **environ})

    def through(self, index: str) -> UvProgram:
        """The same program with another default index, which is near and may have to fetch a file first."""
        host = urlsplit(index).hostname or ""
        names = ("NO_PROXY", "no_proxy")
        direct = {name: ",".join(filter(None, (self.environ.get(name), host))) for name in names}
        return self.having(UV_DEFAULT_INDEX=index, UV_HTTP_TIMEOUT=_NEAR_TIMEOUT_S, **direct)

    def run(
        self,
        arguments: Sequence[str],
        cwd: Path,
        timeout_s: float,
        watch: Callable[[str], None] = lambda _: None,
        keep_open: Sequence[int] = (),
    ) -> Completed:
        """Run it to its end.

        Args:
            arguments: of uv.
            cwd: the folder it runs in.
            timeout_s: seconds after which it is killed.
            watch: is told what is new on standard error.
            keep_open: file descriptors it inherits, such as a lock that must outlive us.

        Raises:
            FlopsError: ``timeout``; ``environment_build_failed`` when it is not there.
            StoppedError: the work became needless.
        """
        try:
            done = run_command(
                [str(self.path), *arguments],
                environ=self.environ,
                cwd=cwd,
                timeout_s=timeout_s,
                watch=watch,
                keep_open=keep_open,
            )
        except FileNotFoundError as exc:
            raise FlopsError(ErrorCode.ENVIRONMENT_BUILD_FAILED, f"{self.path} is not there.") from exc
        if done.is_timed_out:
            raise FlopsError(
                ErrorCode.TIMEOUT, f"uv {' '.join(arguments[:2])} did not end within {timeout_s:g} s."
            )
        return done

    def find_python(self, minor: str) -> Path:
        """An interpreter of this machine by its ``major.minor``.

        Raises:
            FlopsError: ``environment_build_failed`` when there is none.
        """
        if minor == OWN_MINOR:
            return own_python()
        for version, path in self.installed_pythons():
            if minor_of(version) == minor:
                return path
        raise FlopsError(
            ErrorCode.ENVIRONMENT_BUILD_FAILED,
            f"Python {minor} is not installed on {platform.node()}.",
            hint=f"Install Python {minor} there, or ask for another one in the dependency file.",
        )

    def installed_pythons(self) -> list[tuple[str, Path]]:
        """Versions and interpreters that can be used, newest first."""
        command = ["python", "list", "--only-installed", "--output-format", "json"]
        with tempfile.TemporaryDirectory() as scratch:
            done = self.run(command, Path(scratch), 60.0)
        if done.exit_code != 0:
            return []
        found = [
            (Version(entry["version"]), Path(entry["path"]))
            for entry in json.loads(done.output)
            if entry.get("implementation") == "cpython" and entry.get("variant") == "default"
        ]
        usable = [(version, path) for version, path in found if version.release[:2] >= OLDEST_PYTHON]
        usable.sort(key=lambda item: item[0], reverse=True)
        return [(str(version), path) for version, path in usable]


def with_site_packages(
    uv: UvProgram,
    site: SitePackages | None,
    lock: str,
    install: Callable[[UvProgram], Completed],
    report: Callable[[str], None],
) -> Completed:
    """Install a lock's packages from who near has them; from the index when that fails, or nobody has.

    Args:
        uv: the program.
        site: who near may have them.
        lock: what is installed, with the hash of every file.
        install: runs uv.
        report: is told what fails.
    """
    with nullcontext("") if site is None else site.serving(lock) as index:
        done = install(uv.through(index)) if index else None
    if done is not None:
        if done.exit_code == 0:
            return done
        report(f"The cluster's packages cannot be used, the package index is: {essence(done.errors)}")
    return install(uv)


def own_python() -> Path:
    """The interpreter that our own virtual environment was made from."""
    path = Path(sys.base_prefix) / "bin" / f"python{OWN_MINOR}"
    return path if path.exists() else Path(sys.executable).resolve()


def minor_of(version: str) -> str:
    """The ``major.minor`` of a version."""
    return ".".join(version.split(".")[:2])


def release_of(version: str) -> tuple[int, ...]:
    """The numbers of a version, which can be compared."""
    return Version(version).release


def is_disk_full(errors: str) -> bool:
    """Whether what a program wrote to standard error says that a disk is full."""
    return bool(_FULL_DISK.search(errors))


def uv_error(done: Completed, what: str) -> FlopsError:
    """The error users see when uv failed."""
    code, hint = ErrorCode.ENVIRONMENT_BUILD_FAILED, None
    if is_disk_full(done.errors):
        code = ErrorCode.DISK_FULL
    elif _NO_INDEX.search(done.errors):
        code = ErrorCode.UNREACHABLE
    elif (failed := _BUILD_FAILED.search(done.errors)) is not None:
        hint = (
            f"{failed['what']} has no wheel for this machine, and its sources do not build here: require a "
            f"version that has wheels, or install what the build needs on {platform.node()} and all nodes of "
            "the project, such as a compiler (Debian: build-essential, python3-dev)."
        )
    message = f"{what}: {essence(done.errors)}"
    return FlopsError(code, message, hint=hint, details={"output": done.errors[-4_000:]})


def _tool_environment(environ: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in environ.items() if name not in _PYTHON_VARIABLES}
    return kept | {"UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1", "NO_COLOR": "1"}
