"""Passes HTTP requests on to another server, as they come and without holding them in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flops.errors import ErrorCode, FlopsError
from flops.wire.http_headers import passed_on

_ANSWER_S = 600.0  # the longest wait for bytes: some answers are made from a whole database
_CONNECT_S = 10.0
_CONNECTIONS = 64
# What is for this side of the proxy.
_NOT_PASSED_ON = frozenset(
    b"proxy-authenticate proxy-authorization host authorization cookie origin referer".split()
)


class HttpProxy:
    """An ASGI application that answers what another server answers; who may ask is decided before it.

    It serves one event loop, while its `lifespan` is entered.

    Args:
        url: of the server; paths are appended to it.
        prefix: what is taken off the beginning of paths.
        name: what the server is called in messages.
        options: of the HTTP client, such as `verify`: how to encrypt.
    """

    def __init__(self, url: str, prefix: str, name: str, **options: Any) -> None:
        self._url = httpx.URL(url)
        self._options = options
        self._prefix = prefix.encode()
        self._name = name
        self._client: httpx.AsyncClient | None = None

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Hold the connections to the server."""
        timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
        limits = httpx.Limits(max_connections=_CONNECTIONS)
        client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, **self._options)
        async with client as self._client:
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
        except httpx.HTTPError as exc:
            error = FlopsError(
                ErrorCode.UNREACHABLE, f"{self._name} does not answer: {str(exc) or type(exc).__name__}."
            )
            answer = JSONResponse(error.to_dict(), status_code=error.spec.http_status)
        except ClientDisconnect:
            return
        await answer(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if self._client is None:
            raise httpx.ConnectError("it has not been started")
        path = request.scope["raw_path"].partition(b"?")[0].removeprefix(self._prefix)
        query = b"?" + request.scope["query_string"] if request.scope["query_string"] else b""
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        asked = self._client.build_request(
            request.method,
            # Never another host, and nothing above the URL.
            self._url.copy_with(raw_path=self._url.raw_path.rstrip(b"/") + b"/" + path.lstrip(b"/") + query),
            headers=passed_on(request.headers.raw, without=_NOT_PASSED_ON),
            content=request.stream() if has_body else None,
        )
        response = await self._client.send(asked, stream=True)
        answer = StreamingResponse(
            response.aiter_raw(), response.status_code, background=BackgroundTask(response.aclose)
        )
        answer.raw_headers = passed_on(response.headers.raw, without=_NOT_PASSED_ON)
        return answer
