"""A registry of images: what docker, podman, skopeo and FLOps use of the OCI distribution specification.

Blobs are kept once, whatever the names of the images that have them: an image under a second name costs
nothing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import functools
import hashlib
import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flops.core.ids import Digest
from flops.core.image_reference import DIGEST, TAG, is_name
from flops.core.images import MANIFEST, MAX_MANIFEST_BYTES
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import KeptImageBlobs
from flops.ports import Clock
from flops.registry.refusals import RefusedError, answer_error, answer_refusal
from flops.registry.repositories import Repositories
from flops.registry.uploads import Uploads, UploadSession
from flops.wire.byte_range import NoSuchPartError, read_range

MAX_BLOB_BYTES = 64 * 1024**3
_THREADS = 8
_TIDY_INTERVAL_S = 600.0
_GRACE_S = 3_600.0  # of uploads that nobody goes on with, and of blobs that no manifest names
_PAGE = 1_000
_ANY_TYPE = "application/octet-stream"
_CONTENT_RANGE = re.compile(r"(?:bytes )?(?P<start>\d+)-\d+(?:/.*)?")

_log = logging.getLogger(__name__)


def build_registry(
    blobs: KeptImageBlobs,
    repositories: Repositories,
    clock: Clock,
    *,
    password: str | None = None,
    max_blob_bytes: int = MAX_BLOB_BYTES,
) -> Starlette:
    """Build the ASGI application of a registry. While it runs, it removes what nobody needs any more.

    Args:
        blobs: where parts of images are kept.
        repositories: where their names are.
        clock: tells how long blobs have not been used.
        password: what everyone has to send by Basic authentication, with any user name; None for nothing.
        max_blob_bytes: larger blobs are refused.
    """
    server = _RegistryServer(blobs, repositories, clock, password, max_blob_bytes)
    serve = server.serve
    return Starlette(
        routes=[
            Route("/v2/", serve(server.answer_version), methods=["GET"]),
            Route("/v2/_catalog", serve(server.list_names), methods=["GET"]),
            Route("/v2/{name:path}/tags/list", serve(server.list_tags), methods=["GET"]),
            Route("/v2/{name:path}/blobs/uploads/", serve(server.begin_upload), methods=["POST"]),
            Route(
                "/v2/{name:path}/blobs/uploads/{upload}",
                serve(server.serve_upload),
                methods=["GET", "PATCH", "PUT", "DELETE"],
            ),
            Route("/v2/{name:path}/blobs/{digest}", serve(server.send_blob), methods=["GET"]),
            Route(
                "/v2/{name:path}/manifests/{version}",
                serve(server.serve_manifest),
                methods=["GET", "PUT", "DELETE"],
            ),
        ],
        exception_handlers={HTTPException: _answer_http_error, Exception: _answer_defect},
        lifespan=server.live,
    )


class _RegistryServer:
    def __init__(
        self,
        blobs: KeptImageBlobs,
        repositories: Repositories,
        clock: Clock,
        password: str | None,
        max_blob_bytes: int,
    ) -> None:
        self._blobs = blobs
        self._clock = clock
        self._repositories = repositories
        self._password = password
        self._max_blob_bytes = max_blob_bytes
        self._threads: ThreadPoolExecutor | None = None
        self._uploads = Uploads(blobs, self._call)

    @contextlib.asynccontextmanager
    async def live(self, _app: Starlette) -> AsyncIterator[None]:
        """Hold the threads, and tidy up now and then, while the application runs."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="registry") as self._threads:
            tidying = asyncio.create_task(self._tidy())
            try:
                yield
            finally:
                tidying.cancel()
                await asyncio.wait({tidying})
                await self._uploads.end_idle(0)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(_TIDY_INTERVAL_S)
            try:
                await self._uploads.end_idle(_GRACE_S)
                since_s = self._clock.now_s() - _GRACE_S
                freed = await self._call(functools.partial(self._repositories.collect_garbage, since_s))
                _log.info("%s bytes that no image needs were given back", freed)
            except (FlopsError, OSError) as error:
                _log.error("the registry cannot be tidied: %s", error)

    async def _call(self, function: Callable[[], Any], /) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    def serve(self, endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """Have an endpoint answer those who may ask, and refusals in the way that clients know."""

        async def serve(request: Request) -> Response:
            try:
                self._check_password(request)
                _check_name(request)
                response: Response = await endpoint(request)
            except RefusedError as error:
                response = answer_refusal(error)
            except FlopsError as error:
                if error.code is not ErrorCode.NOT_FOUND:
                    _log.warning("%s %s: %s", request.method, request.url.path, error)
                response = answer_error(error)
            except ClientDisconnect:
                response = Response(status_code=400)
            response.headers["Docker-Distribution-API-Version"] = "registry/2.0"
            return response

        return serve

    def _check_password(self, request: Request) -> None:
        if self._password is None:
            return
        kind, _, value = request.headers.get("authorization", "").partition(" ")
        given = b""
        if kind.lower() == "basic":
            with contextlib.suppress(binascii.Error):
                given = base64.b64decode(value, validate=True).partition(b":")[2]
        if not secrets.compare_digest(given, self._password.encode()):
            challenge = {"WWW-Authenticate": 'Basic realm="flops"'}
            raise RefusedError(401, "UNAUTHORIZED", "Send the registry's password.", challenge)

    async def answer_version(self, _request: Request) -> Response:
        """Say that this is a registry."""
        return JSONResponse({})

    async def list_names(self, request: Request) -> Response:
        """Names of all images, in pages."""
        return _page(request, "repositories", await self._call(self._repositories.names), {})

    async def list_tags(self, request: Request) -> Response:
        """Tags of a name, in pages."""
        name = request.path_params["name"]
        tags = await self._call(functools.partial(self._repositories.tags, name))
        if not tags and name not in await self._call(self._repositories.names):
            raise RefusedError(404, "NAME_UNKNOWN", f"There is no image {name}.")
        return _page(request, "tags", tags, {"name": name})

    async def send_blob(self, request: Request) -> Response:
        """Give a blob or a part of it, or say that it is there."""
        digest = _read_digest(request.path_params["digest"])
        size = await self._call(functools.partial(self._blobs.size, digest))
        headers = {
            "content-length": str(size),
            "docker-content-digest": f"sha256:{digest}",
            "etag": f'"sha256:{digest}"',
            "accept-ranges": "bytes",
        }
        if request.method == "HEAD":
            return Response(headers=headers, media_type=_ANY_TYPE)
        if (part := _part_asked_for(request, size)) is not None:
            start, stop = part
            headers |= {
                "content-length": str(stop - start),
                "content-range": f"bytes {start}-{stop - 1}/{size}",
            }
            chunks = self._blobs.part(digest, start, stop)
            body = self._stream(b"", chunks)
            return StreamingResponse(body, status_code=206, headers=headers, media_type=_ANY_TYPE)
        chunks = self._blobs.chunks(digest)
        try:
            first = await self._call(lambda: next(chunks, b""))  # damage is found before anything is sent
        except FlopsError as error:
            if error.code is not ErrorCode.INTERNAL:
                raise
            _log.error("a damaged blob is removed; it has to be pushed again: %s", error)
            await self._call(functools.partial(self._blobs.remove, digest))
            raise RefusedError(404, "BLOB_UNKNOWN", f"sha256:{digest} was damaged; push it again.") from error
        return StreamingResponse(self._stream(first, chunks), headers=headers, media_type=_ANY_TYPE)

    async def _stream(self, first: bytes, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
        if first:
            yield first
        while chunk := await self._call(lambda: next(chunks, b"")):
            yield chunk

    async def begin_upload(self, request: Request) -> Response:
        """Begin an upload; a blob that is there under another name needs none."""
        name = request.path_params["name"]
        if (mount := request.query_params.get("mount")) is not None:
            digest = _read_digest(mount)
            if await self._call(functools.partial(self._blobs.has, digest)):
                return _created(name, "blobs", digest)
        session = await self._uploads.begin(name)
        if "digest" in request.query_params:
            return await self._finish_upload(request, session)
        return _progress(202, session)

    async def serve_upload(self, request: Request) -> Response:
        """Go on with an upload, say how far it is, finish it, or give it up."""
        session = self._uploads.find(request.path_params["name"], request.path_params["upload"])
        if request.method == "PUT":
            return await self._finish_upload(request, session)
        if request.method == "DELETE":
            await self._uploads.end(session)
            return Response(status_code=204)
        if request.method == "PATCH":
            await self._take(request, session)
            return _progress(202, session)
        return _progress(204, session)

    async def _finish_upload(self, request: Request, session: UploadSession) -> Response:
        digest = _read_digest(request.query_params.get("digest", ""))
        await self._take(request, session)
        try:
            await session.commit(digest)
        finally:
            await self._uploads.end(session)
        return _created(session.name, "blobs", digest)

    async def _take(self, request: Request, session: UploadSession) -> None:
        found = _CONTENT_RANGE.fullmatch(request.headers.get("content-range", ""))
        start = int(found["start"]) if found else None
        try:
            await session.take(request.stream(), start, self._max_blob_bytes)
        except FlopsError:  # the disk is full: what has arrived does not help to empty it
            await self._uploads.end(session)
            raise

    async def serve_manifest(self, request: Request) -> Response:
        """Give, store or remove a manifest."""
        name, version = request.path_params["name"], request.path_params["version"]
        if ":" in version:
            _read_digest(version)
        elif not TAG.fullmatch(version):
            raise RefusedError(400, "TAG_INVALID", f"{version[:80]!r} is no tag.")
        if request.method == "PUT":
            return await self._store_manifest(request, name, version)
        if request.method == "DELETE":
            await self._call(functools.partial(self._repositories.delete, name, version))
            return Response(status_code=202)
        digest, media_type, data = await self._call(functools.partial(self._repositories.get, name, version))
        headers = {"docker-content-digest": f"sha256:{digest}", "etag": f'"sha256:{digest}"'}
        return Response(data, headers=headers, media_type=media_type)  # to HEAD, the server sends no body

    async def _store_manifest(self, request: Request, name: str, version: str) -> Response:
        data = b""
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_MANIFEST_BYTES:
                raise RefusedError(413, "SIZE_INVALID", f"No manifest may exceed {MAX_MANIFEST_BYTES} bytes.")
        media_type = request.headers.get("content-type", MANIFEST)
        tag = "" if ":" in version else version
        if not tag and version != f"sha256:{hashlib.sha256(data).hexdigest()}":
            raise RefusedError(400, "DIGEST_INVALID", f"The manifest's digest is not {version}.")
        store = functools.partial(self._repositories.put, name, data, media_type, tag)
        return _created(name, "manifests", await self._call(store))


def _check_name(request: Request) -> None:
    name = request.path_params.get("name")
    if name is not None and not is_name(name):
        raise RefusedError(400, "NAME_INVALID", f"{name[:80]!r} is no name of an image.")


def _created(name: str, kind: str, digest: Digest) -> Response:
    headers = {
        "Location": f"/v2/{name}/{kind}/sha256:{digest}",
        "Docker-Content-Digest": f"sha256:{digest}",
    }
    return Response(status_code=201, headers=headers)


def _progress(status: int, session: UploadSession) -> Response:
    headers = {"Location": session.location, "Range": session.range, "Docker-Upload-UUID": session.id}
    return Response(status_code=status, headers=headers)


def _page(request: Request, key: str, items: list[str], more: dict[str, str]) -> Response:
    last = request.query_params.get("last", "")
    asked = request.query_params.get("n", "")
    limit = min(int(asked), _PAGE) if asked.isdecimal() else _PAGE
    rest = [item for item in items if item > last]
    page = rest[:limit]
    headers = {}
    if page and len(rest) > limit:
        headers["Link"] = f'<{request.url.path}?n={limit}&last={page[-1]}>; rel="next"'
    return JSONResponse({**more, key: page}, headers=headers)


def _read_digest(text: str) -> Digest:
    found = DIGEST.fullmatch(text)
    if found is None:
        raise RefusedError(400, "DIGEST_INVALID", f"{text[:80]!r} is no SHA-256 digest.")
    return Digest(found["hex"])


def _part_asked_for(request: Request, size: int) -> tuple[int, int] | None:
    try:
        return read_range(request.headers.get("range", ""), size)
    except NoSuchPartError:
        headers = {"Content-Range": f"bytes */{size}"}
        raise RefusedError(416, "SIZE_INVALID", "No such part.", headers) from None


async def _answer_http_error(request: Request, exc: Exception) -> Response:
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    message = f"{request.method} {request.url.path} is not served here."
    return answer_refusal(RefusedError(status, "UNSUPPORTED", message))


async def _answer_defect(request: Request, exc: Exception) -> Response:
    _log.error("%s %s ended by a defect", request.method, request.url.path, exc_info=exc)
    return answer_refusal(RefusedError(500, "UNKNOWN", "The registry failed; its log has more."))
