"""Bundles on this node: fetched once, verified, unpacked safely, kept by digest."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import tarfile
import threading
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from flops.core.ids import Digest
from flops.durable_file import file_error, sync_file, sync_folder
from flops.errors import ErrorCode, FlopsError
from flops.retention_ports import Cached

MAX_UNPACKED_BYTES = 8 * 1024**3


class BundleStore:
    """Unpacked bundles, one folder per digest, whose time is that of its last use.

    Implements `flops.retention_ports.Cache`. For one process: only a node's daemon, one at a time, uses it.

    Args:
        root: where they are kept.
        fetch: brings a blob's verified bytes into a file.
        max_bytes: larger bundles are refused.
    """

    name = "bundles"

    def __init__(
        self, root: Path, fetch: Callable[[Digest, Path], None], *, max_bytes: int = MAX_UNPACKED_BYTES
    ) -> None:
        self._root = root
        self._fetch = fetch
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # between the use and the removal of a folder
        self._making: set[str] = set()  # folders of what is fetched and unpacked right now

    def folder_of(self, digest: Digest) -> Path:
        """The folder with a bundle's files, fetched and unpacked unless it is there.

        Raises:
            FlopsError: ``unreachable``, ``not_found``, ``disk_full``, or ``service_failed`` for a bundle that
                cannot be unpacked or holds paths outside itself.
        """
        folder = self._root / digest
        if self._begin_use(folder):
            return folder
        work = self._root / f".{digest[:12]}-{uuid.uuid4().hex}"
        try:
            self._making.add(work.name)
            work.mkdir(parents=True, mode=0o700)
            archive = work / "bundle.tar.gz"
            self._fetch(digest, archive)
            self._unpack(digest, archive, work / "tree")
            self._publish(work / "tree", folder)
        except OSError as exc:
            raise file_error(exc, folder) from exc
        finally:
            shutil.rmtree(work, ignore_errors=True)
            self._making.discard(work.name)
        return folder

    def cached(self) -> list[Cached]:
        """The bundles that are whole."""
        found = []
        for folder in self._folders():
            if not folder.name.startswith("."):
                with contextlib.suppress(OSError):
                    found.append(Cached(folder.name, folder, folder.stat().st_mtime))
        return found

    def drop(self, key: str, is_in_use: Callable[[], bool]) -> bool:
        """Remove a bundle; False when it is in use."""
        aside = self._root / f".{key[:12]}-{uuid.uuid4().hex}"
        with self._lock:
            if is_in_use():
                return False
            try:
                (self._root / key).rename(aside)
            except FileNotFoundError:
                return False
        shutil.rmtree(aside, ignore_errors=True)
        return True

    def sweep(self) -> None:
        """Remove what a killed daemon has half unpacked or half removed."""
        for folder in self._folders():
            if folder.name.startswith(".") and folder.name not in self._making:
                shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        try:
            return list(self._root.iterdir())
        except FileNotFoundError:
            return []

    def _begin_use(self, folder: Path) -> bool:
        with self._lock:
            try:
                os.utime(folder)
            except FileNotFoundError:
                return False
            return True

    def _unpack(self, digest: Digest, archive: Path, target: Path) -> None:
        target.mkdir(mode=0o755)
        try:
            with tarfile.open(archive, "r:gz") as tar:
                # Older releases of Python 3.11 have no such filter; ours below asks for more.
                tar.extraction_filter = getattr(tarfile, "data_filter", _keep)
                size = 0
                for member in tar:
                    size += member.size
                    if size > self._max_bytes:
                        raise _broken(digest, f"it has more than {self._max_bytes} bytes")
                    problem = _problem_of(member, target)
                    if problem:
                        raise _broken(digest, f"{member.name[:100]!r} {problem}")
                    tar.extract(member, target)
        except (tarfile.TarError, EOFError, zlib.error) as exc:
            raise _broken(digest, str(exc)) from exc

    def _publish(self, tree: Path, folder: Path) -> None:
        for path in sorted(tree.rglob("*")):
            if path.is_file() and not path.is_symlink():
                sync_file(path)
        os.utime(tree)  # the archive may have set another time
        try:
            tree.rename(folder)
        except OSError as exc:
            if exc.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise  # else another thread was quicker, with the same content
        sync_folder(self._root)


def _keep(member: tarfile.TarInfo, _path: str) -> tarfile.TarInfo:
    return member


def _problem_of(member: tarfile.TarInfo, target: Path) -> str:
    """Why a member must not be unpacked; "" when it may.

    Nothing may lie or point outside `target`. Links go up first and down then, and nothing lies behind a
    link, so that what the names say is where things are.
    """
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "lies outside the bundle"
    if not (member.isreg() or member.isdir() or member.issym()):
        return "is neither a file nor a folder"
    if any((target / parent).is_symlink() for parent in path.parents):
        return "lies behind a link"
    if member.issym():
        link = PurePosixPath(member.linkname)
        ups = len(list(itertools.takewhile(lambda part: part == "..", link.parts)))
        if link.is_absolute() or ".." in link.parts[ups:] or ups > len(path.parent.parts):
            return "points outside the bundle"
    return ""


def _broken(digest: Digest, why: str) -> FlopsError:
    return FlopsError(ErrorCode.SERVICE_FAILED, f"Bundle {digest[:12]} cannot be unpacked: {why}.")
