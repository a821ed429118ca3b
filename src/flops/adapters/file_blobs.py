"""Blobs as files under their SHA-256: ``<folder>/<first two characters>/<digest>``.

A blob is written to ``<folder>/incoming``, fsynced, and renamed; it is whole or it is not there. Every read
is verified. Several threads and processes may use one folder.

The time of access of a blob's file is that of its last use: it was stored again, asked for, or read. Who uses
one holds ``incoming`` locked with others, who removes what is not used holds it alone. An extended attribute
says in which state a file was read and found intact; on disks that keep none, it is read every time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from flops.core.ids import Digest
from flops.durable_file import sync_folder
from flops.errors import ErrorCode, FlopsError
from flops.retention_ports import KeptBlob

_CHUNK_BYTES = 1_048_576
_DIGEST = re.compile(r"[0-9a-f]{64}")
_INTACT = "user.flops.intact"  # an attribute: size and time of change when the bytes had their digest


class FileBlobs:
    """Implements `flops.ports.BlobStreams`, `flops.image_ports.ImageBlobs` and
    `flops.retention_ports.KeptBlobs`.

    Args:
        folder: where blobs are; it is created when it does not exist. What killed processes left unfinished
            in it is removed.
        is_oci_layout: the folder is an image layout of the OCI's, which other programs read, too: blobs are
            ``<folder>/blobs/sha256/<digest>``.
    """

    def __init__(self, folder: Path, *, is_oci_layout: bool = False) -> None:
        self._folder = folder / "blobs" / "sha256" if is_oci_layout else folder
        self._is_flat = is_oci_layout
        self._incoming = folder / "incoming"
        with _translated(self._incoming):
            self._incoming.mkdir(parents=True, exist_ok=True)
            self._folder.mkdir(parents=True, exist_ok=True)
        self.sweep()

    def put(self, data: bytes) -> Digest:
        """Store bytes durably; the same bytes again change nothing, unless the stored ones are damaged."""
        digest = Digest(hashlib.sha256(data).hexdigest())
        upload = self.upload()
        try:
            upload.write(data)
            upload.commit(digest)
        finally:
            upload.discard()
        return digest

    def get(self, digest: Digest) -> bytes:
        """Load bytes.

        Raises:
            FlopsError: ``not_found``, or ``internal`` when the stored bytes are damaged.
        """
        path = self._existing(digest)
        with _translated(path):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            _doubt(path)
            raise _damaged(path)
        return data

    def has(self, digest: Digest) -> bool:
        """Whether the bytes are stored."""
        if not _DIGEST.fullmatch(digest):
            return False
        with _translated(self._incoming), _locked(self._incoming, fcntl.LOCK_SH):
            return _mark_used(self._path_of(digest))

    def upload(self) -> FileUpload:
        """Begin an upload."""
        # Its lock ends with this process, and tells others that it is being written; no sweep comes between.
        with _translated(self._incoming), _locked(self._incoming, fcntl.LOCK_SH):
            descriptor, name = tempfile.mkstemp(dir=self._incoming)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        return FileUpload(os.fdopen(descriptor, "wb"), Path(name), self._path_of)

    def size(self, digest: Digest) -> int:
        """Size in bytes.

        Raises:
            FlopsError: ``not_found``.
        """
        path = self._existing(digest)
        with _translated(path):
            return path.stat().st_size

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """The bytes in pieces of 1 MiB, verified before the first piece is given.

        Raises:
            FlopsError: ``not_found``, or ``internal`` when the stored bytes are damaged.
        """
        path = self._existing(digest)
        with _translated(path), path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                _doubt(path)
                raise _damaged(path)
            file.seek(0)
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def part(self, digest: Digest, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to `stop`, in pieces of 1 MiB at most; not verified.

        Raises:
            FlopsError: ``not_found``.
        """
        path = self._existing(digest)
        with _translated(path), path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(min(_CHUNK_BYTES, stop - file.tell())):
                yield chunk

    def is_intact(self, digest: Digest) -> bool:
        """Whether the bytes are stored, and have their digest.

        A file that was found intact, and not written to since then, is not read again. Whoever reads it for
        good finds out about a disk that lost bytes by itself; from then on it is not intact here, either.
        """
        if not self.has(digest):
            return False
        path = self._path_of(digest)
        with _translated(path):
            try:
                with path.open("rb") as file:
                    state = _state_of(file.fileno())
                    if _noted_state(path) == state:
                        return True
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        return False
                    _note_intact(file.fileno(), state)
            except FileNotFoundError:
                return False
        return True

    def digests(self) -> list[Digest]:
        """Every blob there is, sorted."""
        pattern = "*" if self._is_flat else "??/*"
        return sorted(
            Digest(path.name) for path in self._folder.glob(pattern) if _DIGEST.fullmatch(path.name)
        )

    def kept(self) -> list[KeptBlob]:
        """Every blob there is, with its size on the disk and its last use."""
        found = []
        for digest in self.digests():
            with contextlib.suppress(FileNotFoundError):
                status = self._path_of(digest).stat()
                found.append(KeptBlob(digest, status.st_blocks * 512, status.st_atime))
        return found

    def remove(self, digest: Digest) -> None:
        """Remove a blob; nothing happens when it is not there. Who reads it may finish."""
        if self.has(digest):
            path = self._path_of(digest)
            with _translated(path):
                path.unlink(missing_ok=True)
                sync_folder(path.parent)

    def remove_unless_used(self, digest: Digest, since_s: float) -> int:
        """Remove a blob that was not used since then; returns the bytes given back."""
        path = self._path_of(digest)
        with _translated(path):
            try:
                with _locked(self._incoming, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    found = path.stat()
                    if found.st_atime >= since_s:
                        return 0
                    path.unlink()
            except (BlockingIOError, FileNotFoundError):
                return 0
        return found.st_blocks * 512

    def sweep(self) -> None:
        """Remove what killed processes left unfinished."""
        with _translated(self._incoming), _locked(self._incoming, fcntl.LOCK_EX):
            for path in self._incoming.iterdir():
                _remove_if_abandoned(path)

    def _path_of(self, digest: Digest) -> Path:
        return self._folder / digest if self._is_flat else self._folder / digest[:2] / digest

    def _existing(self, digest: Digest) -> Path:
        if not self.has(digest):
            raise FlopsError(ErrorCode.NOT_FOUND, f"There is no blob {digest[:80]}.")
        return self._path_of(digest)


class FileUpload:
    """Implements `flops.ports.BlobUpload`; made by `FileBlobs.upload`, used by one thread at a time."""

    def __init__(self, file: BinaryIO, path: Path, path_of: Callable[[Digest], Path]) -> None:
        self._file = file
        self._path = path
        self._path_of = path_of
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        """Take in the next bytes.

        Raises:
            FlopsError: ``disk_full``.
        """
        with _translated(self._path):
            self._file.write(chunk)
        self._hash.update(chunk)

    def read(self, start: int, stop: int) -> bytes:
        """Of the bytes written so far, those from `start` up to `stop`.

        Raises:
            FlopsError: ``disk_full``.
        """
        with _translated(self._path):
            self._file.flush()
            return os.pread(self._file.fileno(), stop - start, start)

    def commit(self, expected: Digest) -> None:
        """Store the bytes durably; on failure nothing is stored.

        Raises:
            FlopsError: ``upload_incomplete`` when their digest is another one; ``disk_full``.
        """
        found = self._hash.hexdigest()
        if found != expected:
            raise FlopsError(
                ErrorCode.UPLOAD_INCOMPLETE, f"The bytes sent as blob {expected} have the digest {found}."
            )
        final = self._path_of(expected)
        with _translated(final):
            with _locked(self._path.parent, fcntl.LOCK_SH):
                is_there = _mark_used(final)
            if is_there and _is_intact(final, expected):
                return
            self._file.flush()
            _note_intact(self._file.fileno(), _state_of(self._file.fileno()))
            os.fsync(self._file.fileno())
            final.parent.mkdir(exist_ok=True)
            self._path.chmod(0o600)
            self._path.replace(final)
            sync_folder(final.parent)
            sync_folder(final.parent.parent)

    def discard(self) -> None:
        """Forget the bytes; nothing happens after `commit`."""
        with contextlib.suppress(OSError):  # closing flushes, which fails on a full disk
            self._file.close()
        self._path.unlink(missing_ok=True)


def _is_intact(path: Path, digest: Digest) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except FileNotFoundError:
        return False


def _mark_used(path: Path) -> bool:
    """Whether the file is there; if so, it counts as used now."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except PermissionError:
        return path.is_file()
    except OSError:
        return False
    return True


def _state_of(descriptor: int) -> bytes:
    found = os.fstat(descriptor)
    return f"{found.st_size} {found.st_mtime_ns}".encode()


def _noted_state(path: Path) -> bytes:
    try:
        return os.getxattr(path, _INTACT)
    except OSError:
        return b""


def _note_intact(descriptor: int, state: bytes) -> None:
    with contextlib.suppress(OSError):  # the disk keeps no attributes, or the file is another user's
        os.setxattr(descriptor, _INTACT, state)


def _doubt(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.removexattr(path, _INTACT)


@contextlib.contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """Hold a folder; a kill frees it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def _remove_if_abandoned(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def _damaged(path: Path) -> FlopsError:
    return FlopsError(
        ErrorCode.INTERNAL,
        f"The blob {path} is damaged: its bytes do not have the digest it is named by.",
        hint="Delete the file, check the disk, and store the bytes again (submit the project anew).",
    )


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        is_full = exc.errno in {errno.ENOSPC, errno.EDQUOT}
        raise FlopsError(
            ErrorCode.DISK_FULL if is_full else ErrorCode.INTERNAL,
            f"{path} cannot be used: {exc.strerror or exc}.",
        ) from exc
