"""Fragments as Parquet files whose names say all the data server has to know about them.

``<folder>/tags/<tag>/<first row>.<rows>.<digest>.<id>.parquet`` is a fragment; ``limits.json`` beside it has
the tag's limits. An upload is written to ``<folder>/incoming``, fsynced and renamed: the rename is the moment
from which it exists, and there is no other file that could disagree. ``<folder>/damaged/<tag>`` holds what
could not be read, each with its reason beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flops.core.dataset import Damage, Fragment, TagLimits
from flops.durable_file import SharedSync, file_error, sync_folder, write_durably
from flops.errors import ErrorCode, FlopsError
from flops.wire.flight import TAGS_FOLDER

ROW_GROUP_BYTES = 16 * 1_048_576  # of values in memory: what an upload and a reader hold at once
ROW_GROUP_ROWS = 1_048_576
BATCH_BYTES = 4 * 1_048_576
# Dictionaries pay where values repeat. Columns whose values do not, and small uploads, are written plain: to
# encode them takes up to five times as long, and more room on the disk.
_DICTIONARY_BYTES = 16_384  # a column chunk whose different values take more goes on plain
_DICTIONARY_ROWS = 1_024  # below this, an upload has none
_WRITE_BYTES = 1_048_576  # gathered for one write: a file of many columns has thousands of pages
_LIMITS_FILE = "limits.json"
_REASON_SUFFIX = ".reason"
_NAME = re.compile(
    r"(?P<first_row>\d{15})\.(?P<rows>\d+)\.(?P<digest>[0-9a-f]{64})\.(?P<id>[A-Za-z0-9_-]+)\.parquet"
)


class ParquetStore:
    """Implements `flops.fragment_ports.FragmentStore`. One process at a time uses a folder.

    Args:
        folder: where the fragments are; it is created when it does not exist. What a killed process left
            unfinished in it is removed.

    Raises:
        FlopsError: ``already_running`` when another process uses the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._tags = folder / TAGS_FOLDER
        self._incoming = folder / "incoming"
        self._damaged = folder / "damaged"
        self._numbers = itertools.count()
        self._encoders = ThreadPoolExecutor(os.cpu_count(), "encoder")
        self._syncs: dict[str, SharedSync] = {}  # by tag
        with _translated(folder):
            for path in (self._tags, self._incoming, self._damaged):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _lock(folder)
            for path in self._incoming.iterdir():
                path.unlink()

    def close(self) -> None:
        """Let another process use the folder."""
        self._encoders.shutdown()
        os.close(self._lock)

    def fragments(self) -> list[tuple[Fragment, Any]]:
        """All readable fragments with their schemas, by tag and first row; damaged ones are set aside."""
        found = []
        for path in sorted(self._tags.glob("*/*")):
            if path.name == _LIMITS_FILE or path.name.startswith("."):
                continue
            try:
                found.append((_fragment_at(path), pq.read_schema(path)))
            except (ValueError, pa.ArrowException, OSError) as exc:
                if not _is_damage(exc):
                    raise _unusable(path, exc) from exc
                self._move_aside(path, str(exc))
        return found

    def begin(self, tag: str, schema: Any) -> ParquetUpload:
        """Begin an upload.

        Raises:
            FlopsError: ``disk_full``.
        """
        path = self._incoming / f"{next(self._numbers)}.parquet"
        return ParquetUpload(path, self._tags / tag, schema, self._encoders)

    def settle(self, tag: str) -> None:
        """Have everything durable that was published under a tag until now.

        Raises:
            FlopsError: ``disk_full``, ``file_unreadable``.
        """
        folder = self._tags / tag
        with _translated(folder):
            self._syncs.setdefault(tag, SharedSync(partial(sync_folder, folder))).wait()

    def path(self, fragment: Fragment) -> str:
        """The Parquet file of a fragment."""
        return str(self._path_of(fragment).absolute())

    def read(self, fragment: Fragment) -> Iterator[Any]:
        """The rows in batches of a few MB at most, unless a single row is larger.

        Raises:
            FlopsError: ``fragment_not_found`` when it was removed; ``fragment_damaged``.
        """
        path = self._path_of(fragment)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
                rows = 0
                for index in range(file.num_row_groups):
                    for batch in file.iter_batches(ROW_GROUP_ROWS, row_groups=[index], use_threads=False):
                        rows += batch.num_rows
                        yield from _cut(batch, BATCH_BYTES)
                if rows != fragment.rows:
                    raise ValueError(f"it has {rows} rows instead of {fragment.rows}")  # noqa: TRY301
        except FileNotFoundError as exc:
            raise FlopsError(
                ErrorCode.FRAGMENT_NOT_FOUND, f"{fragment.id} of tag {fragment.tag} was removed."
            ) from exc
        except (ValueError, pa.ArrowException, OSError) as exc:
            if not _is_damage(exc):
                raise _unusable(path, exc) from exc
            raise FlopsError(
                ErrorCode.FRAGMENT_DAMAGED,
                f"{fragment.id} of tag {fragment.tag} cannot be read: {_first_line(exc)}.",
            ) from exc

    def remove(self, fragment: Fragment) -> None:
        """Remove a fragment durably; readers that have begun may finish. Nothing happens if it is gone."""
        path = self._path_of(fragment)
        with _translated(path):
            path.unlink(missing_ok=True)
            sync_folder(path.parent)

    def set_aside(self, fragment: Fragment, reason: str) -> None:
        """Move a damaged fragment to ``damaged``, with the reason in a file beside it."""
        path = self._path_of(fragment)
        if path.exists():
            self._move_aside(path, reason)

    def damaged(self, tag: str) -> list[Damage]:
        """What was set aside."""
        return [
            Damage(
                name=path.name.removesuffix(_REASON_SUFFIX),
                reason=path.read_text(errors="replace"),
                path=str(path.with_name(path.name.removesuffix(_REASON_SUFFIX))),
            )
            for path in sorted((self._damaged / tag).glob(f"*{_REASON_SUFFIX}"))
        ]

    def limits(self) -> dict[str, TagLimits]:
        """Limits by tag, of tags that have any.

        Raises:
            FlopsError: ``config_corrupt``, naming the file.
        """
        found = {}
        for path in self._tags.glob(f"*/{_LIMITS_FILE}"):
            try:
                found[path.parent.name] = TagLimits.model_validate_json(path.read_text())
            except ValueError as exc:
                raise FlopsError(
                    ErrorCode.CONFIG_CORRUPT,
                    f"{path} does not hold the limits of a tag: {_first_line(exc)}.",
                    hint="Repair the file or delete it, then set the tag's retention and quota again.",
                ) from exc
        return found

    def put_limits(self, tag: str, limits: TagLimits) -> None:
        """Store the limits of a tag durably."""
        folder = self._tags / tag
        with _translated(folder):
            _make_folder(folder)
        write_durably(folder / _LIMITS_FILE, limits.model_dump_json())

    def _path_of(self, fragment: Fragment) -> Path:
        return self._tags / fragment.tag / _file_name(fragment)

    def _move_aside(self, path: Path, reason: str) -> None:
        folder = self._damaged / path.parent.name
        with _translated(folder):
            folder.mkdir(exist_ok=True)
            (folder / f"{path.name}{_REASON_SUFFIX}").write_text(reason)
            path.replace(folder / path.name)


class ParquetUpload:
    """Implements `flops.fragment_ports.FragmentUpload`; made by `ParquetStore.begin`.

    A full row group is encoded by another thread, while the next one comes in.
    """

    def __init__(self, path: Path, folder: Path, schema: pa.Schema, encoders: Executor) -> None:
        self._path = path
        self._folder = folder
        self._schema = schema
        self._encoders = encoders
        self._encoding: Future[None] | None = None
        self._pending: list[Any] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._writer: Any = None
        with _translated(path):
            self._file = pa.OSFile(str(path), "wb")
            self._buffered = pa.BufferedOutputStream(self._file, _WRITE_BYTES)

    def write(self, batch: Any) -> None:
        """Take in the next rows; they are written in row groups of `ROW_GROUP_BYTES`.

        Raises:
            FlopsError: ``disk_full``.
        """
        for piece in _cut(batch, ROW_GROUP_BYTES):
            self._pending.append(piece)
            self._pending_rows += piece.num_rows
            self._pending_bytes += piece.nbytes
            if self._pending_rows >= ROW_GROUP_ROWS or self._pending_bytes >= ROW_GROUP_BYTES:
                with _translated(self._path):
                    self._wait_for_encoder()
                    self._encoding = self._encoders.submit(self._encode, self._take_pending())

    def size_bytes(self) -> int:
        """Bytes on disk so far; exact after `seal`."""
        return self._path.stat().st_size

    def seal(self) -> None:
        """Write what is left and the footer, and have it all on disk.

        Raises:
            FlopsError: ``disk_full``.
        """
        with _translated(self._path):
            self._wait_for_encoder()
            if self._pending:
                self._encode(self._take_pending())
            self._writer.close()
            self._buffered.flush()
            os.fsync(self._file.fileno())
            self._buffered.close()

    def publish(self, fragment_id: str, digest: str, first_row: int, rows: int) -> Fragment:
        """Move the file to its place; `ParquetStore.settle` makes that durable.

        Raises:
            FlopsError: ``disk_full``; nothing is stored then.
        """
        with _translated(self._path):
            status = self._path.stat()
            fragment = Fragment(
                tag=self._folder.name,
                id=fragment_id,
                digest=digest,
                first_row=first_row,
                rows=rows,
                size_bytes=status.st_size,
                stored_at_s=status.st_mtime,
            )
            _make_folder(self._folder)
            self._path.replace(self._folder / _file_name(fragment))
        return fragment

    def discard(self) -> None:
        """Forget the rows; nothing happens after `publish`."""
        self._pending = []
        with contextlib.suppress(OSError, pa.ArrowException):  # closing writes, which a full disk refuses
            self._wait_for_encoder()
        with contextlib.suppress(OSError, pa.ArrowException):
            self._buffered.close()
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _take_pending(self) -> pa.Table:
        table = pa.Table.from_batches(self._pending)
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0
        return table

    def _wait_for_encoder(self) -> None:
        encoding, self._encoding = self._encoding, None
        if encoding is not None:
            encoding.result()

    def _encode(self, table: pa.Table) -> None:
        """Write a row group, and have the disk begin with it: the sync at the end has less to wait for."""
        if self._writer is None:
            self._writer = self._open_writer(has_dictionaries=table.num_rows >= _DICTIONARY_ROWS)
        start = self._file.tell()
        self._writer.write_table(table, row_group_size=table.num_rows)
        os.posix_fadvise(self._file.fileno(), start, 0, os.POSIX_FADV_DONTNEED)

    def _open_writer(self, *, has_dictionaries: bool) -> pq.ParquetWriter:
        return pq.ParquetWriter(
            self._buffered,
            self._schema,
            compression="lz4",
            write_statistics=False,
            write_page_checksum=True,
            use_dictionary=has_dictionaries,
            dictionary_pagesize_limit=_DICTIONARY_BYTES,
        )


def _file_name(fragment: Fragment) -> str:
    return f"{fragment.first_row:015d}.{fragment.rows}.{fragment.digest}.{fragment.id}.parquet"


def _fragment_at(path: Path) -> Fragment:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError("The data server did not write this file; send data to it instead.")
    status = path.stat()
    return Fragment(
        tag=path.parent.name,
        id=match["id"],
        digest=match["digest"],
        first_row=int(match["first_row"]),
        rows=int(match["rows"]),
        size_bytes=status.st_size,
        stored_at_s=status.st_mtime,
    )


def _cut(batch: Any, size_bytes: int) -> Iterator[Any]:
    """The batch in pieces of about this many bytes of values, without copying them."""
    step = max(1, min(ROW_GROUP_ROWS, batch.num_rows * size_bytes // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, step):
        yield batch.slice(start, step)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(descriptor)
        raise FlopsError(
            ErrorCode.ALREADY_RUNNING, f"Another data server uses {folder}.", hint="Stop it first."
        ) from exc
    return descriptor


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(exist_ok=True, mode=0o700)
        sync_folder(folder.parent)


def _is_damage(exc: Exception) -> bool:
    """Whether the bytes are wrong; an error with a number comes from the system, and may pass."""
    return not isinstance(exc, OSError) or exc.errno is None


def _first_line(exc: Exception) -> str:
    return str(exc).strip().partition("\n")[0].rstrip(".")


def _unusable(path: Path, exc: Exception) -> FlopsError:
    if isinstance(exc, OSError) and exc.errno is not None:
        return file_error(OSError(exc.errno, os.strerror(exc.errno)), path)
    return FlopsError(ErrorCode.INTERNAL, f"{path} cannot be used: {_first_line(exc)}.")


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as exc:
        raise _unusable(path, exc) from exc
