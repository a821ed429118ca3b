"""A relay tells the manager that it is there, and renews its certificate when it is time."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable

from starlette.concurrency import run_in_threadpool

from flops.core.cluster import HEARTBEAT_INTERVAL_S
from flops.errors import ErrorCode, FlopsError
from flops.relay.uplink import Uplink
from flops.wire.join import PRESENCE_PATH, RelayPresence

_REFUSED_PAUSE_S = 10.0

_log = logging.getLogger(__name__)


class Presence:
    """How the relay stands with the manager.

    Args:
        uplink: the way there.
        told: what is told.
        renew: renews the certificate if it is time; runs in a thread.
    """

    def __init__(self, uplink: Uplink, told: Callable[[], RelayPresence], renew: Callable[[], None]) -> None:
        self._uplink = uplink
        self._told = told
        self._renew = renew
        self.problem: FlopsError | None = None  # why the manager does not know that we are there

    async def tell(self) -> None:
        """Tell it once; `problem` says whether the manager has heard it."""
        body = self._told().model_dump_json().encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        before = self.problem
        try:
            async with self._uplink.ask("POST", PRESENCE_PATH.encode(), headers, _once(body)) as answer:
                text = b"".join([chunk async for chunk in answer.chunks()])
            self.problem = None if answer.status == 200 else _refusal(text, answer.status)
        except FlopsError as error:
            self.problem = error
        if self.problem is not None and (before is None or before.message != self.problem.message):
            _log.warning("not connected to the manager: %s", self.problem)
        elif self.problem is None and before is not None:
            _log.info("connected to the manager")

    @property
    def is_refused(self) -> bool:
        """Whether the manager is there, and does not want us."""
        away = {ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT}
        return self.problem is not None and self.problem.code not in away

    async def keep(self) -> None:
        """Tell it again and again."""
        while True:
            await run_in_threadpool(self._renew)
            await self.tell()
            await asyncio.sleep(_REFUSED_PAUSE_S if self.is_refused else HEARTBEAT_INTERVAL_S)


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _refusal(text: bytes, status: int) -> FlopsError:
    try:
        return FlopsError.from_dict(json.loads(text))
    except (ValueError, AttributeError):
        return FlopsError(ErrorCode.UNREACHABLE, f"What answers there is no manager (status {status}).")
