"""What the cluster serves on its port: the connections of nodes, and the blobs of services."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from flops.core.ids import Digest
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.cluster import TICK_INTERVAL_S, ClusterOrchestrator
from flops.orchestrator.node_socket import serve_node
from flops.ports import BlobStreams, BlobUpload
from flops.wire.rest import BlobStored, Message

MAX_BLOB_BYTES = 16 * 1024**3
_THREADS = 8
_DIGEST = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)

T = TypeVar("T")


def build_app(
    orchestrator: ClusterOrchestrator,
    blobs: BlobStreams,
    *,
    max_blob_bytes: int = MAX_BLOB_BYTES,
    more: Sequence[BaseRoute] = (),
) -> Starlette:
    """Build the ASGI application of the cluster's port.

    While it runs, it also watches for nodes that have gone silent.

    Args:
        orchestrator: takes in what nodes say.
        blobs: what is served under ``/api/blobs``.
        max_blob_bytes: larger uploads are refused.
        more: is served, too.
    """
    server = _ClusterServer(orchestrator, blobs, max_blob_bytes)
    return Starlette(
        routes=[
            Route("/", server.answer_root, methods=["GET"]),
            Route("/api/blobs/{digest}", server.serve_blob, methods=["GET", "HEAD", "PUT"]),
            WebSocketRoute("/api/node/link", server.link_node),
            *more,
        ],
        exception_handlers={
            FlopsError: _answer_error,
            HTTPException: _answer_http_error,
            Exception: _answer_defect,
        },
        lifespan=server.live,
    )


class _ClusterServer:
    def __init__(self, orchestrator: ClusterOrchestrator, blobs: BlobStreams, max_blob_bytes: int) -> None:
        self._orchestrator = orchestrator
        self._blobs = blobs
        self._max_blob_bytes = max_blob_bytes
        self._threads: ThreadPoolExecutor | None = None

    @contextlib.asynccontextmanager
    async def live(self, _app: Starlette) -> AsyncIterator[None]:
        """Hold the threads and the watch over silent nodes while the application runs."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="cluster") as self._threads:
            watch = asyncio.create_task(self._watch_nodes())
            try:
                yield
            finally:
                watch.cancel()
                await asyncio.wait({watch})

    async def _watch_nodes(self) -> None:
        while True:
            try:
                await self._call(self._orchestrator.tick)
            except FlopsError as error:
                _log.error("silent nodes cannot be noted: %s", error)
            await asyncio.sleep(TICK_INTERVAL_S)

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def answer_root(self, _request: Request) -> Response:
        """Say that the cluster is there."""
        return JSONResponse(Message(message="ok").model_dump())

    async def link_node(self, websocket: WebSocket) -> None:
        """Serve a node's connection."""
        await serve_node(websocket, self._orchestrator, self._call)

    async def serve_blob(self, request: Request) -> Response:
        """Give, look for, or take in a blob."""
        digest = Digest(request.path_params["digest"])
        if not _DIGEST.fullmatch(digest):
            raise FlopsError(
                ErrorCode.USAGE,
                f"{digest[:80]!r} is not the digest of a blob.",
                hint="Give a SHA-256 as 64 lower-case hex characters.",
            )
        if request.method == "PUT":
            return await self._take_blob(request, digest)
        size = await self._call(functools.partial(self._blobs.size, digest))
        headers = {"content-length": str(size), "etag": f'"{digest}"'}
        if request.method == "HEAD":
            return Response(headers=headers, media_type="application/octet-stream")
        chunks = self._blobs.chunks(digest)
        first = await self._call(lambda: next(chunks, b""))  # damage is found here, before anything is sent
        body = _stream(first, chunks, self._call)
        return StreamingResponse(body, headers=headers, media_type="application/octet-stream")

    async def _take_blob(self, request: Request, digest: Digest) -> Response:
        self._check_size(digest, int(request.headers.get("content-length", "0")))
        upload = await self._call(self._blobs.upload)
        try:
            await self._receive(request, digest, upload)
            await self._call(lambda: upload.commit(digest))
        except ClientDisconnect as exc:
            raise FlopsError(ErrorCode.UPLOAD_INCOMPLETE, f"The upload of blob {digest} broke off.") from exc
        finally:
            await self._call(upload.discard)
        return JSONResponse(BlobStored(digest=digest).model_dump())

    async def _receive(self, request: Request, digest: Digest, upload: BlobUpload) -> None:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            self._check_size(digest, size)
            await self._call(functools.partial(upload.write, chunk))

    def _check_size(self, digest: Digest, size: int) -> None:
        if size > self._max_blob_bytes:
            raise FlopsError(
                ErrorCode.QUOTA_EXCEEDED,
                f"Blob {digest} is larger than the {self._max_blob_bytes} bytes this cluster takes.",
                hint="Make the repository or the model smaller.",
            )


async def _stream(
    first: bytes, chunks: Iterator[bytes], call: Callable[[Callable[[], bytes]], Awaitable[bytes]]
) -> AsyncIterator[bytes]:
    chunk = first
    while chunk:
        yield chunk
        chunk = await call(lambda: next(chunks, b""))


async def _answer_error(_request: Request, exc: Exception) -> Response:
    error = exc if isinstance(exc, FlopsError) else FlopsError(ErrorCode.INTERNAL, str(exc))
    return JSONResponse(error.to_dict(), status_code=error.spec.http_status)


async def _answer_http_error(request: Request, exc: Exception) -> Response:
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    code = ErrorCode.NOT_FOUND if status == 404 else ErrorCode.USAGE
    error = FlopsError(
        code,
        f"{request.method} {request.url.path} is not served here.",
        hint="The cluster's port serves nodes and their services; people use the REST API of the manager.",
    )
    return JSONResponse(error.to_dict(), status_code=status)


async def _answer_defect(request: Request, exc: Exception) -> Response:
    _log.error("%s %s ended by a defect", request.method, request.url.path, exc_info=exc)
    error = FlopsError(ErrorCode.INTERNAL, f"{request.method} {request.url.path} failed; the log has more.")
    return JSONResponse(error.to_dict(), status_code=500)
