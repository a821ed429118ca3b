"""Blobs on their way into the registry: each upload is a session that a broken connection does not end."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from flops.core.ids import Digest
from flops.image_ports import ImageBlobs
from flops.ports import BlobUpload
from flops.registry.refusals import RefusedError


class Call(Protocol):
    """Runs a function in a thread, and waits for it without holding up others."""

    async def __call__(self, function: Callable[[], Any], /) -> Any:
        """Run it; what it raises is raised."""
        ...


class UploadSession:
    """One upload: bytes in their order, from whoever asked last."""

    def __init__(self, session_id: str, name: str, upload: BlobUpload, call: Call) -> None:
        self.id = session_id
        self.name = name
        self.size_bytes = 0
        self.used_s = time.monotonic()
        self._upload = upload
        self._call = call
        self._turn = 0
        self._lock = asyncio.Lock()

    async def take(self, chunks: AsyncIterator[bytes], start: int | None, max_bytes: int) -> None:
        """Take in bytes.

        Who began before us and still sends is a connection that broke unnoticed: its next bytes are refused.

        Args:
            chunks: the bytes.
            start: the place of the first one; None for the next one.
            max_bytes: of the whole blob.

        Raises:
            RefusedError: `start` is another one than the next; too large; another connection went on.
            FlopsError: ``disk_full``.
        """
        async with self._lock:
            self._turn += 1
            turn = self._turn
            if start is not None and start != self.size_bytes:
                raise RefusedError(
                    416,
                    "BLOB_UPLOAD_INVALID",
                    f"The next byte is number {self.size_bytes}, not {start}.",
                    {"Range": self.range, "Location": self.location},
                )
        async for chunk in chunks:
            async with self._lock:
                if turn != self._turn:
                    raise RefusedError(409, "BLOB_UPLOAD_INVALID", "Another connection went on with it.")
                if self.size_bytes + len(chunk) > max_bytes:
                    raise RefusedError(413, "SIZE_INVALID", f"No blob may exceed {max_bytes} bytes.")
                await self._call(functools.partial(self._upload.write, chunk))
                self.size_bytes += len(chunk)
                self.used_s = time.monotonic()

    async def commit(self, digest: Digest) -> None:
        """Store the bytes.

        Raises:
            FlopsError: ``upload_incomplete`` when their digest is another one; ``disk_full``.
        """
        async with self._lock:
            self._turn += 1
            await self._call(functools.partial(self._upload.commit, digest))

    async def discard(self) -> None:
        """Forget the bytes."""
        async with self._lock:
            self._turn += 1
            await self._call(self._upload.discard)

    @property
    def range(self) -> str:
        """What has arrived, as the distribution's clients read it."""
        return f"0-{max(self.size_bytes - 1, 0)}"

    @property
    def location(self) -> str:
        """Where the upload goes on."""
        return f"/v2/{self.name}/blobs/uploads/{self.id}"


class Uploads:
    """All sessions; for one event loop."""

    def __init__(self, blobs: ImageBlobs, call: Call) -> None:
        self._blobs = blobs
        self._call = call
        self._sessions: dict[str, UploadSession] = {}

    async def begin(self, name: str) -> UploadSession:
        """Begin an upload.

        Raises:
            FlopsError: ``disk_full``.
        """
        upload = await self._call(self._blobs.upload)
        session = UploadSession(secrets.token_hex(16), name, upload, self._call)
        self._sessions[session.id] = session
        return session

    def find(self, name: str, session_id: str) -> UploadSession:
        """An upload that was begun.

        Raises:
            RefusedError: it is not known, or not any more.
        """
        session = self._sessions.get(session_id)
        if session is None or session.name != name:
            raise RefusedError(404, "BLOB_UPLOAD_UNKNOWN", f"There is no upload {session_id[:80]}.")
        return session

    async def end(self, session: UploadSession) -> None:
        """Forget a session, with what was not stored of it."""
        if self._sessions.pop(session.id, None) is not None:
            await session.discard()

    async def end_idle(self, idle_s: float) -> None:
        """Forget sessions that nobody has used for `idle_s` seconds."""
        now_s = time.monotonic()
        for session in [found for found in self._sessions.values() if now_s - found.used_s >= idle_s]:
            await self.end(session)
