"""A folder as a layer: the same content gives the same bytes, whoever packs it, when and where.

Nothing of a file but its path, its content and whether it can be run is kept: all belongs to root, all is of
one time. Bytes also depend on the zlib that compresses them; the digest of the archive inside does not.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

from flops.command import stop_if_needless
from flops.core.ids import Digest
from flops.core.images import LAYER_GZIP, Descriptor, Layer
from flops.durable_file import file_error
from flops.image_ports import ImageBlobs
from flops.ports import BlobUpload

_LEVEL = 1  # 6 makes a scikit-learn layer 12 % smaller, and takes almost three times as long
_TIME_S = 315_532_800  # 1980-01-01: zip files and some tools know no earlier time


def pack_layer(folder: Path, blobs: ImageBlobs, what: str) -> Layer:
    """Pack a folder, which becomes the root of the layer, and store it.

    Args:
        folder: files, folders and symbolic links; anything else in it is left out.
        blobs: where the layer is stored.
        what: for people, a line of the image's history.

    Raises:
        FlopsError: ``disk_full``, ``file_unreadable``.
        StoppedError: the work became needless.
    """
    upload = blobs.upload()
    try:
        packed = _Hashed(_Upload(upload))
        with gzip.GzipFile("", "wb", _LEVEL, packed, mtime=0) as compressed:
            plain = _Hashed(compressed)
            with tarfile.open(fileobj=plain, mode="w|", format=tarfile.PAX_FORMAT) as archive:
                for path in _walk(folder):
                    stop_if_needless()
                    _add(archive, folder, path)
        upload.commit(packed.digest)
    except OSError as exc:
        raise file_error(exc, folder) from exc
    finally:
        upload.discard()
    blob = Descriptor(media_type=LAYER_GZIP, digest=packed.digest, size=packed.size)
    return Layer(blob=blob, diff_id=plain.digest, what=what)


def _walk(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda found: found.name):
        path = Path(entry.path)
        yield path
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path)


def _add(archive: tarfile.TarFile, folder: Path, path: Path) -> None:
    info = tarfile.TarInfo(str(path.relative_to(folder)))
    info.mtime = _TIME_S
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode):
        info.type = tarfile.DIRTYPE
        info.mode = 0o1777 if found.st_mode & stat.S_ISVTX else 0o755
        archive.addfile(info)
    elif stat.S_ISLNK(found.st_mode):
        info.type = tarfile.SYMTYPE
        info.mode = 0o777
        info.linkname = str(path.readlink())
        archive.addfile(info)
    elif stat.S_ISREG(found.st_mode):
        info.mode = 0o755 if found.st_mode & 0o111 else 0o644
        with path.open("rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            archive.addfile(info, file)


class _Upload(io.RawIOBase):
    def __init__(self, upload: BlobUpload) -> None:
        self._upload = upload

    def write(self, data: object, /) -> int:
        chunk = bytes(data)  # type: ignore[call-overload]
        self._upload.write(chunk)
        return len(chunk)


class _Hashed(io.RawIOBase):
    """Hands bytes on, and knows their digest and number."""

    def __init__(self, sink: io.RawIOBase | gzip.GzipFile) -> None:
        self._sink = sink
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: object, /) -> int:
        chunk = bytes(data)  # type: ignore[call-overload]
        self._hash.update(chunk)
        self.size += len(chunk)
        self._sink.write(chunk)
        return len(chunk)

    @property
    def digest(self) -> Digest:
        """Of all bytes so far."""
        return Digest(self._hash.hexdigest())


class ChunkFile(io.RawIOBase):
    """Chunks as a file that is read from its start to its end."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""
        while size < 0 or len(self._rest) < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                size = len(self._rest)
            self._rest += chunk
        data, self._rest = self._rest[:size], self._rest[size:]
        return data
