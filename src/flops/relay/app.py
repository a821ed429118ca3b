"""What a relay serves on its cluster's port: what its nodes ask of the manager, passed on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from flops.core.ids import Digest
from flops.errors import ErrorCode, FlopsError
from flops.relay.node_pipe import pass_link
from flops.relay.site_cache import SiteCache
from flops.relay.uplink import NOT_PASSED_ON, Answer, Headers, Uplink, vouched
from flops.wire.byte_range import NoSuchPartError, read_range
from flops.wire.http_headers import passed_on

_KEPT = re.compile(
    r"/api/blobs/(?P<blob>[0-9a-f]{64})|/v2/.+/blobs/sha256:(?P<layer>[0-9a-f]{64})"
    r"|/api/packages/files/(?P<package>[0-9a-f]{64})/[^/]+"
)
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
_OF_RELAYS = "/api/cluster/"

_log = logging.getLogger(__name__)


def build_relay(
    cluster: str, uplink: Uplink, cache: SiteCache, background: Callable[[], Coroutine[Any, Any, None]]
) -> Starlette:
    """Build the ASGI application of a relay's port.

    It decides nothing: the manager is asked whether somebody may have what is kept here, each time.

    Args:
        cluster: its name.
        uplink: the way to the manager.
        cache: what is kept at this site.
        background: runs while the application does.
    """
    relay = _Relay(cluster, uplink, cache)

    @contextlib.asynccontextmanager
    async def live(_app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(background())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    return Starlette(
        routes=[
            WebSocketRoute("/api/node/link", relay.link),
            Route("/{path:path}", relay.answer, methods=_METHODS),
        ],
        exception_handlers={FlopsError: _answer_error},
        lifespan=live,
    )


class _PassedOn(Response):
    """What the manager answers, while it comes."""

    def __init__(self, asked: AbstractAsyncContextManager[Answer]) -> None:
        super().__init__()
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask, and send what comes."""
        try:
            async with self._asked as answer:
                response = StreamingResponse(answer.chunks(), answer.status)
                response.raw_headers = passed_on(answer.headers, without=NOT_PASSED_ON)
                await response(scope, receive, send)
        except ClientDisconnect:
            _log.info("%s %s broke off", scope["method"], scope["path"])


class _Relay:
    def __init__(self, cluster: str, uplink: Uplink, cache: SiteCache) -> None:
        self._cluster = cluster
        self._uplink = uplink
        self._cache = cache

    async def link(self, websocket: WebSocket) -> None:
        """A node's connection."""
        await pass_link(websocket, self._uplink, self._cluster)

    async def answer(self, request: Request) -> Response:
        """Answer a request from what is kept, or pass it on."""
        if request.url.path.startswith(_OF_RELAYS):
            raise FlopsError(ErrorCode.NOT_FOUND, f"{request.url.path} is not served by a relay.")
        found = _KEPT.fullmatch(request.url.path) if request.method == "GET" else None
        if found is None:
            return self._pass_on(request)
        return await self._give(request, Digest(found["blob"] or found["layer"] or found["package"]))

    async def _give(self, request: Request, digest: Digest) -> Response:
        target, headers = _target(request), self._headers(request)
        whole = [(name, value) for name, value in headers if name != b"range"]
        async with self._uplink.ask("HEAD", target, whole) as answer:
            is_given, told = answer.status == 200, dict(answer.headers)
        if not is_given or b"content-length" not in told:
            return self._pass_on(request)  # the manager says why not
        size = int(told[b"content-length"])
        try:
            part = read_range(request.headers.get("range", ""), size)
        except NoSuchPartError:
            return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
        start, stop = part or (0, size)
        ask = functools.partial(self._uplink.ask, "GET", target, whole)
        response = StreamingResponse(
            await self._cache.open(digest, start, stop, ask), 200 if part is None else 206
        )
        told[b"content-length"] = str(stop - start).encode()
        if part is not None:
            told[b"content-range"] = f"bytes {start}-{stop - 1}/{size}".encode()
        response.raw_headers = passed_on(told.items(), without=NOT_PASSED_ON)
        return response

    def _pass_on(self, request: Request) -> Response:
        has_body = {"content-length", "transfer-encoding"} & set(request.headers)
        body = request.stream() if has_body else None
        return _PassedOn(self._uplink.ask(request.method, _target(request), self._headers(request), body))

    def _headers(self, request: Request) -> Headers:
        headers = passed_on(request.headers.raw, without=NOT_PASSED_ON)
        return [*headers, *vouched(request.scope, self._cluster)]


def _target(request: Request) -> bytes:
    path, query = request.scope["raw_path"], request.scope["query_string"]
    return bytes(path + b"?" + query if query else path)


async def _answer_error(request: Request, exc: Exception) -> Response:
    error = exc if isinstance(exc, FlopsError) else FlopsError(ErrorCode.INTERNAL, str(exc))
    _log.warning("%s %s is not passed on: %s", request.method, request.url.path, error)
    return JSONResponse(error.to_dict(), status_code=error.spec.http_status)
