"""What a site keeps: fetched once, given while it comes, and never when it is not what it should be."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.system_clock import SystemClock
from flops.core.ids import Digest
from flops.errors import ErrorCode, FlopsError
from flops.relay.site_cache import SiteCache
from flops.relay.uplink import Headers

pytestmark = pytest.mark.timeout(30)

DATA = b"one two three"
DIGEST = Digest(hashlib.sha256(DATA).hexdigest())


class Slow:
    """An answer whose next piece comes when it is let go."""

    def __init__(self, pieces: list[bytes], status: int = 200) -> None:
        self.pieces = pieces
        self.status = status
        self.headers: Headers = ()
        self.asked = 0
        self.go = asyncio.Semaphore(0)

    @asynccontextmanager
    async def ask(self) -> AsyncIterator[Slow]:
        self.asked += 1
        yield self

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            await self.go.acquire()
            if not piece:
                raise FlopsError(ErrorCode.UNREACHABLE, "The manager does not answer.")
            yield piece


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


async def whole(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in pieces])


async def settled() -> None:
    """Wait for what goes on in the background."""
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))


def test_those_who_ask_meanwhile_get_what_has_come_and_then_the_rest(tmp_path: Path) -> None:
    async def test() -> None:
        cache = SiteCache(FileBlobs(tmp_path), SystemClock(), 1_000_000)
        answer = Slow([b"one ", b"two ", b"three"])
        first = await cache.open(DIGEST, 0, len(DATA), answer.ask)
        answer.go.release()
        assert await anext(first) == b"one "
        second = await cache.open(DIGEST, 2, len(DATA), answer.ask)
        assert await anext(second) == b"e "
        answer.go.release()
        answer.go.release()
        assert await whole(first) == b"two three"
        assert await whole(second) == b"two three"
        third = await cache.open(DIGEST, 4, 7, answer.ask)
        assert await whole(third) == b"two"
        assert answer.asked == 1

    run(test)


@pytest.mark.parametrize("pieces", [[b"one ", b""], [b"one "], [b"one two tree!"]])
def test_what_breaks_off_or_is_something_else_is_not_kept(tmp_path: Path, pieces: list[bytes]) -> None:
    async def test() -> None:
        blobs = FileBlobs(tmp_path)
        cache = SiteCache(blobs, SystemClock(), 1_000_000)
        answer = Slow(pieces)
        for _ in pieces:
            answer.go.release()
        body = await cache.open(DIGEST, 0, len(DATA), answer.ask)
        is_short = sum(map(len, pieces)) < len(DATA)
        with pytest.raises(FlopsError) if is_short else contextlib.suppress(FlopsError):
            await whole(body)  # all of something else is noticed by whoever asked, or here before
        again = Slow([DATA])
        again.go.release()
        await settled()
        assert blobs.digests() == []
        assert await whole(await cache.open(DIGEST, 0, len(DATA), again.ask)) == DATA
        await settled()
        assert list((tmp_path / "incoming").iterdir()) == []

    run(test)


def test_what_was_used_longest_ago_goes_when_there_is_too_much(tmp_path: Path) -> None:
    async def test() -> None:
        blobs = FileBlobs(tmp_path)
        cache = SiteCache(blobs, SystemClock(), 3 * 4096)
        digests = []
        for number in range(5):
            data = bytes([number]) * 4096
            digest = Digest(hashlib.sha256(data).hexdigest())
            digests.append(digest)
            answer = Slow([data])
            answer.go.release()
            assert await whole(await cache.open(digest, 0, len(data), answer.ask)) == data
            await settled()
        assert blobs.digests() == sorted(digests[2:])

    run(test)
