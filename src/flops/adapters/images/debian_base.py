"""A base image made from Debian's packages: unpacked by mmdebstrap, none of their code is run.

That takes seconds, no registry, and no emulation for other platforms: mmdebstrap's variant ``extract``
configures nothing. It has Python, the libraries that wheels count on (libstdc++, libgomp), CA certificates
and a shell.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from flops.adapters.images.bytecode import compile_modules
from flops.adapters.images.layer_cache import LayerCache, key_of
from flops.adapters.images.layer_file import pack_layer
from flops.adapters.uv_program import UvProgram, is_disk_full
from flops.command import run_command, stop_if_needless
from flops.core.images import BaseImage, Layer
from flops.core.platforms import Platform
from flops.durable_file import file_error
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs, Report

_PACKAGES = (
    "base-files",
    "python3",
    "libgomp1",
    "libstdc++6",
    "ca-certificates",
    "netbase",
    "dash",
    "tzdata",
)
_COMPILERS = ("gcc", "g++", "libc6-dev", "make", "pkg-config", "python3-dev")
_SUITE = "bookworm"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")  # Ubuntu does not install it by itself
_PYTHON_OF = {"bookworm": "3.11", "trixie": "3.13"}
_LEFT_OUT = (
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "usr/share/lintian",
    "var/cache",
    "var/log",
    "var/lib/dpkg",
)
_LEFT_OUT_ENDINGS = ("/gconv", "/pydoc_data", "/changelog.gz", "/changelog.Debian.gz")
_TIMEOUT_S = 900.0
_NO_NETWORK = (
    "Temporary failure",
    "Could not connect",
    "Could not resolve",
    "Connection failed",
    "timed out",
)
_CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "SSL_CERT_FILE": f"/{_CERTIFICATES}",
}
_ENV_OF_COMPILERS = {"CC": "gcc", "CXX": "g++"}  # nothing is configured: there are no cc and c++
_USERS = "root:x:0:0:root:/root:/usr/sbin/nologin\nflops:x:65532:65532:flops:/tmp:/usr/sbin/nologin\n"
_GROUPS = "root:x:0:\nflops:x:65532:\n"


class DebianBase:
    """Implements `flops.image_ports.BaseImages`.

    A base is made once and kept: removing what is cached makes one with today's packages.

    Args:
        root: where it is written down which bases there are, and where they are made.
        uv: uv, which finds the Python that compiles the standard library.
        environ: of mmdebstrap and uv.
        suite: of Debian, such as ``bookworm``.
        mirror: where packages come from; "" for Debian's own. One that never changes makes bases
            reproducible everywhere.
        mmdebstrap: the program.
        has_compilers: whether source packages can be built on it.
    """

    def __init__(
        self,
        root: Path,
        *,
        uv: Path,
        environ: Mapping[str, str],
        suite: str = _SUITE,
        mirror: str = "",
        mmdebstrap: str = "mmdebstrap",
        has_compilers: bool = False,
    ) -> None:
        self._root = root
        self._uv = UvProgram(uv, environ)
        self._environ = dict(environ)
        self._suite = suite
        self._mirror = mirror
        self._program = mmdebstrap
        self._packages = (*_PACKAGES, *_COMPILERS) if has_compilers else _PACKAGES
        self._env = _ENV | _ENV_OF_COMPILERS if has_compilers else _ENV

    @staticmethod
    def missing() -> tuple[str, ...]:
        """Debian packages that this machine needs for it, and has not; the same for all platforms."""
        found = {"mmdebstrap": shutil.which("mmdebstrap"), "debian-archive-keyring": _KEYRING.exists()}
        return tuple(name for name, is_there in found.items() if not is_there)

    @staticmethod
    def python() -> str:
        """The ``major.minor`` of the Python in bases of the suite that is used unless another is named."""
        return _PYTHON_OF[_SUITE]

    @staticmethod
    def is_possible() -> bool:
        """Whether this machine has all that is needed."""
        return not DebianBase.missing()

    def foreseen(self, platform: Platform) -> BaseImage:
        """The base without its layers.

        Raises:
            FlopsError: ``image_build_failed`` for an unknown suite.
        """
        python = _PYTHON_OF.get(self._suite)
        if python is None:
            raise FlopsError(
                ErrorCode.IMAGE_BUILD_FAILED,
                f"It is not known which Python Debian {self._suite} has; known are {', '.join(_PYTHON_OF)}.",
            )
        return BaseImage(
            platform=platform,
            layers=(),
            python=python,
            interpreter=f"/usr/bin/python{python}",
            env=self._env,
        )

    def base(self, platform: Platform, blobs: ImageBlobs, report: Report) -> BaseImage:
        """The base for a platform.

        Raises:
            FlopsError: ``image_build_failed``, ``unreachable``, ``timeout``, ``disk_full``.
        """
        base = self.foreseen(platform)
        python = base.python
        what = f"The base of Debian {self._suite} for {platform}"

        def make(notes: Path, descriptor: int) -> Layer:
            report(f"{what} is being made.")
            archive, root = notes / "base.tar", notes / "root"
            self._unpack_packages(platform, archive, descriptor)
            try:
                _extract(archive, root)
                archive.unlink()
                _complete(root)
            except (OSError, tarfile.TarError) as exc:
                error = exc if isinstance(exc, OSError) else OSError(str(exc))
                raise file_error(error, root) from exc
            library = root / "usr" / "lib" / f"python{python}"
            compile_modules(
                library, f"/{library.relative_to(root)}", python=python, uv=self._uv, descriptor=descriptor
            )
            return pack_layer(root, blobs, f"Debian {self._suite}: {' '.join(self._packages)}")

        key = key_of("debian", self._suite, self._mirror, platform, *self._packages)
        layer = LayerCache(self._root, blobs).layer(key, what, make, report)
        return base.model_copy(update={"layers": (layer,)})

    def _unpack_packages(self, platform: Platform, archive: Path, descriptor: int) -> None:
        # Owners are not kept, so others than root need no user namespace, which many machines forbid.
        mode = "root" if os.geteuid() == 0 else "chrootless"
        command = [self._program, "--quiet", f"--mode={mode}", "--variant=extract"]
        command += [f"--include={','.join(self._packages)}"]
        command += [f"--architectures={platform.architecture}", self._suite, str(archive)]
        try:
            done = run_command(
                [*command, *([self._mirror] if self._mirror else [])],
                environ={**self._environ, "TMPDIR": str(archive.parent), "SOURCE_DATE_EPOCH": "315532800"},
                cwd=archive.parent,
                timeout_s=_TIMEOUT_S,
                keep_open=[descriptor],
            )
        except FileNotFoundError as exc:
            raise FlopsError(
                ErrorCode.IMAGE_BUILD_FAILED,
                f"{self._program} is not installed: no base image can be made here.",
                hint="Install it (Debian: mmdebstrap), or name a base image in a registry.",
            ) from exc
        if done.is_timed_out:
            raise FlopsError(ErrorCode.TIMEOUT, f"{self._program} did not end within {_TIMEOUT_S:g} s.")
        if done.exit_code != 0:
            code = ErrorCode.IMAGE_BUILD_FAILED
            if is_disk_full(done.errors):
                code = ErrorCode.DISK_FULL
            elif any(text in done.errors for text in _NO_NETWORK):
                code = ErrorCode.UNREACHABLE
            raise FlopsError(
                code,
                f"Debian's packages for {platform} cannot be unpacked: {done.errors.strip()[-500:]}",
                details={"output": done.errors[-4_000:]},
            )


def _extract(archive: Path, root: Path) -> None:
    """Unpack what an image needs, without owners, set-user-id bits and devices."""
    root.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            stop_if_needless()
            place = PurePosixPath(member.name)
            if place.is_absolute() or ".." in place.parts or _is_left_out(str(place)):
                continue
            target = root / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if member.isdir():
                target.mkdir(exist_ok=True)
            elif member.issym():
                target.symlink_to(member.linkname)
            elif member.islnk():
                shutil.copy2(root / PurePosixPath(member.linkname), target)
            elif member.isreg() and (source := tar.extractfile(member)) is not None:
                with target.open("wb") as file:
                    shutil.copyfileobj(source, file)
                target.chmod(0o755 if member.mode & 0o111 else 0o644)


def _is_left_out(place: str) -> bool:
    return any(place == left or place.startswith(f"{left}/") for left in _LEFT_OUT) or any(
        place.endswith(ending) or f"{ending}/" in place for ending in _LEFT_OUT_ENDINGS
    )


def _complete(root: Path) -> None:
    """Write what packages write when they are installed: users, and all certificates in one file."""
    (root / "etc" / "passwd").write_text(_USERS)
    (root / "etc" / "group").write_text(_GROUPS)
    (root / "app").mkdir()
    for name in ("tmp", "var/tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(0o1777)
    certificates = sorted((root / "usr" / "share" / "ca-certificates").rglob("*.crt"))
    file = root / _CERTIFICATES
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(path.read_text().rstrip("\n") + "\n" for path in certificates))
