"""Blobs, layers and packages by their digest: each comes over the uplink once, for all nodes of the site.

While one is fetched, whoever asks for it gets what has come so far, and the rest as it comes. It is kept when
it is whole and has its digest.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from starlette.concurrency import run_in_threadpool

from flops.core.ids import Digest
from flops.core.retention import Entry, Limits, choose_victims
from flops.errors import ErrorCode, FlopsError
from flops.ports import BlobUpload, Clock
from flops.relay.uplink import Answer
from flops.retention_ports import KeptBlob

_CHUNK_BYTES = 1_048_576
_LATER_S = 0.001  # than its last use: what was used again meanwhile stays

_log = logging.getLogger(__name__)


class ReadableUpload(BlobUpload, Protocol):
    """An upload that can be read while it is written."""

    def read(self, start: int, stop: int) -> bytes:
        """Of the bytes written so far, those from `start` up to `stop`."""
        ...


class SiteBlobs(Protocol):
    """Where they are kept; see `flops.adapters.file_blobs.FileBlobs`."""

    def is_intact(self, digest: Digest) -> bool:
        """Whether the bytes are stored, and have their digest."""
        ...

    def part(self, digest: Digest, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to `stop`."""
        ...

    def upload(self) -> ReadableUpload:
        """Begin an upload."""
        ...

    def kept(self) -> list[KeptBlob]:
        """Every blob there is, with its size on the disk and its last use."""
        ...

    def remove_unless_used(self, digest: Digest, since_s: float) -> int:
        """Remove a blob that was not used since then; returns the bytes given back."""
        ...


class SiteCache:
    """To be used from one event loop.

    Args:
        blobs: where they are kept.
        clock: the time.
        max_bytes: beyond it, those used longest ago go.
    """

    def __init__(self, blobs: SiteBlobs, clock: Clock, max_bytes: int) -> None:
        self._blobs = blobs
        self._clock = clock
        self._limits = Limits(max_bytes=max_bytes)
        self._fetches: dict[Digest, _Fetch] = {}

    async def open(
        self,
        digest: Digest,
        start: int,
        stop: int,
        ask: Callable[[], AbstractAsyncContextManager[Answer]],
    ) -> AsyncIterator[bytes]:
        """The bytes from `start` up to `stop`, from here or, if they are not here, as they come.

        Args:
            digest: of the whole.
            start: first byte.
            stop: the one after the last.
            ask: asks the manager for the whole.
        """
        fetch = self._fetches.get(digest)
        if fetch is None and not await run_in_threadpool(self._blobs.is_intact, digest):
            fetch = self._fetches.get(digest) or self._begin(digest, ask)
        return self._stored(digest, start, stop) if fetch is None else self._follow(fetch, start, stop)

    def _begin(self, digest: Digest, ask: Callable[[], AbstractAsyncContextManager[Answer]]) -> _Fetch:
        fetch = self._fetches[digest] = _Fetch(digest)
        fetch.task = asyncio.create_task(self._fetch(fetch, ask))
        return fetch

    async def _fetch(self, fetch: _Fetch, ask: Callable[[], AbstractAsyncContextManager[Answer]]) -> None:
        try:
            fetch.upload = await run_in_threadpool(self._blobs.upload)
            async with ask() as answer:
                _check(answer)
                async for chunk in answer.chunks():
                    await run_in_threadpool(fetch.upload.write, chunk)
                    await fetch.grow(len(chunk))
            await run_in_threadpool(fetch.upload.commit, fetch.digest)
        except FlopsError as error:
            _log.warning("%s is not fetched: %s", fetch.digest, error)
            fetch.error = error
        finally:
            self._fetches.pop(fetch.digest, None)
            await fetch.end()
            await run_in_threadpool(fetch.close)
        await run_in_threadpool(self._shrink)

    async def _follow(self, fetch: _Fetch, start: int, stop: int) -> AsyncIterator[bytes]:
        while start < stop:
            await fetch.wait_beyond(start)
            if fetch.size <= start:  # and so it has ended
                raise fetch.error or FlopsError(ErrorCode.UPLOAD_INCOMPLETE, f"{fetch.digest} is shorter.")
            end = min(stop, fetch.size, start + _CHUNK_BYTES)
            piece = await run_in_threadpool(fetch.read, start, end)
            if not piece:  # it has ended meanwhile
                if fetch.error is not None:
                    raise fetch.error
                async for piece in self._stored(fetch.digest, start, stop):
                    yield piece
                return
            yield piece
            start += len(piece)

    async def _stored(self, digest: Digest, start: int, stop: int) -> AsyncIterator[bytes]:
        pieces = self._blobs.part(digest, start, stop)
        while piece := await run_in_threadpool(next, pieces, b""):
            yield piece

    def _shrink(self) -> None:
        kept = [
            Entry(key=b.digest, used_at_s=b.used_at_s, size_bytes=b.size_bytes) for b in self._blobs.kept()
        ]
        for victim in choose_victims(kept, self._limits, self._clock.now_s()):
            self._blobs.remove_unless_used(Digest(victim.key), victim.used_at_s + _LATER_S)


def _check(answer: Answer) -> None:
    if answer.status != 200:
        raise FlopsError(ErrorCode.UNREACHABLE, f"The manager answers {answer.status}.")


class _Fetch:
    """A blob that is coming."""

    def __init__(self, digest: Digest) -> None:
        self.digest = digest
        self.size = 0  # of what has come
        self.error: FlopsError | None = None
        self.upload: ReadableUpload | None = None
        self.task: asyncio.Task[None] | None = None  # so that it is not collected
        self._is_over = False
        self._changed = asyncio.Condition()
        self._reading = threading.Lock()

    async def grow(self, size: int) -> None:
        """More has come."""
        async with self._changed:
            self.size += size
            self._changed.notify_all()

    async def end(self) -> None:
        """No more comes."""
        async with self._changed:
            self._is_over = True
            self._changed.notify_all()

    async def wait_beyond(self, size: int) -> None:
        """Wait until more than this has come, or no more comes."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.size > size or self._is_over)

    def read(self, start: int, stop: int) -> bytes:
        """Some of what has come; nothing when it was closed."""
        with self._reading:
            return b"" if self.upload is None else self.upload.read(start, stop)

    def close(self) -> None:
        """Give its file up; what was stored is among the blobs."""
        with self._reading:
            upload, self.upload = self.upload, None
        if upload is not None:
            upload.discard()
