"""Packages for the nodes of a site: each file is fetched from the index once, and kept.

Nodes name the lock they build from, and then find an index of its files here. What no such lock allows is
not served, so this is no way to the rest of the index; what comes from the index is compared with the lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from flops.core.ids import Digest
from flops.core.package_page import PackageFile, locked_files, normal_name, package_of, write_page
from flops.core.resolution import locked_versions
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import KeptImageBlobs
from flops.package_ports import PackageIndex
from flops.ports import BlobStreams, Clock
from flops.wire.byte_range import NoSuchPartError, read_range

_LOCKS = 1_000  # that are remembered; a node names its lock again at its next build
_PAGE_S = 60.0  # that a page of the index is remembered
_KEPT_S = 30 * 86_400.0
_MAX_LOCK_BYTES = 16 * 1024**2
_ANY_TYPE = "application/octet-stream"

_log = logging.getLogger(__name__)


class _Locked(NamedTuple):
    """What a lock allows."""

    names: frozenset[str]
    files: frozenset[Digest]


class PackageCache:
    """Files of packages, by their SHA-256. Thread-safe.

    Args:
        index: where they come from.
        blobs: where they are kept.
        locks: the blobs that locks are among.
        clock: the time.
    """

    def __init__(self, index: PackageIndex, blobs: KeptImageBlobs, locks: BlobStreams, clock: Clock) -> None:
        self._index = index
        self._clock = clock
        self._blobs = blobs
        self._locks = locks
        self._allowed: OrderedDict[Digest, _Locked] = OrderedDict()
        self._pages: dict[str, tuple[float, tuple[PackageFile, ...]]] = {}
        self._asked_for: set[str] = set()
        self._lock = threading.Condition()

    def routes(self) -> list[BaseRoute]:
        """What is served."""
        return [
            Route("/api/packages/locks/{digest:str}", self._take_lock, methods=["POST"]),
            Route("/api/packages/simple/{name:str}/", self._send_page, methods=["GET"]),
            Route("/api/packages/files/{digest:str}/{name:str}", self._send_file, methods=["GET", "HEAD"]),
        ]

    def shrink(self) -> None:
        """Remove what nobody asked for in a month."""
        since_s = self._clock.now_s() - _KEPT_S
        freed = sum(self._blobs.remove_unless_used(digest, since_s) for digest in self._blobs.digests())
        if freed:
            _log.info("removed %d MB of packages that were not used lately", freed // 1024**2)

    def _take_lock(self, request: Request) -> Response:
        digest = Digest(request.path_params["digest"])
        with self._lock:
            if digest in self._allowed:
                self._allowed.move_to_end(digest)
                return Response(status_code=204)
        if not self._locks.has(digest) or self._locks.size(digest) > _MAX_LOCK_BYTES:
            raise FlopsError(ErrorCode.NOT_FOUND, f"The cluster has no lock {digest[:64]}.")
        text = self._locks.get(digest).decode(errors="replace")
        names = frozenset(map(normal_name, locked_versions(text)))
        with self._lock:
            self._allowed[digest] = _Locked(names, locked_files(text))
            if len(self._allowed) > _LOCKS:
                self._allowed.popitem(last=False)
        return Response(status_code=204)

    def _send_page(self, request: Request) -> Response:
        name = normal_name(request.path_params["name"])
        with self._lock:
            is_allowed = any(name in locked.names for locked in self._allowed.values())
        if not is_allowed:
            raise FlopsError(ErrorCode.NOT_FOUND, f"No lock has a package {name[:80]}.")
        return HTMLResponse(write_page(file for file in self._files(name) if self._is_allowed(file.sha256)))

    def _send_file(self, request: Request) -> Response:
        digest, name = Digest(request.path_params["digest"]), request.path_params["name"]
        if not self._is_allowed(digest):
            raise FlopsError(ErrorCode.NOT_FOUND, f"No lock has {name[:80]} with the SHA-256 {digest[:64]}.")
        with self._alone(digest):
            if not self._blobs.is_intact(digest):
                self._fetch(digest, name)
        size = self._blobs.size(digest)
        headers = {"content-length": str(size), "accept-ranges": "bytes", "etag": f'"{digest}"'}
        if request.method == "HEAD":
            return Response(headers=headers, media_type=_ANY_TYPE)
        try:
            part = read_range(request.headers.get("range", ""), size)
        except NoSuchPartError:
            return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
        start, stop = part or (0, size)
        headers["content-length"] = str(stop - start)
        if part is not None:
            headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
        return StreamingResponse(
            self._blobs.part(digest, start, stop),
            status_code=200 if part is None else 206,
            headers=headers,
            media_type=_ANY_TYPE,
        )

    def _is_allowed(self, digest: Digest) -> bool:
        with self._lock:
            return any(digest in locked.files for locked in self._allowed.values())

    def _files(self, name: str) -> tuple[PackageFile, ...]:
        with self._alone(name):
            now_s = time.monotonic()
            with self._lock:
                self._pages = {key: page for key, page in self._pages.items() if now_s - page[0] < _PAGE_S}
                found = self._pages.get(name)
            if found is None:
                found = self._pages[name] = (now_s, self._index.files(name))
            return found[1]

    def _fetch(self, digest: Digest, name: str) -> None:
        found = next((file for file in self._files(package_of(name)) if file.sha256 == digest), None)
        if found is None:
            raise FlopsError(ErrorCode.NOT_FOUND, f"The package index has no {name[:80]} that is locked.")
        upload = self._blobs.upload()
        try:
            for chunk in self._index.chunks(found):
                upload.write(chunk)
            upload.commit(digest)
        finally:
            upload.discard()
        _log.info("fetched %s from the package index", found.name)

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Of several requests for the same, one asks the index, and the others wait for it."""
        with self._lock:
            self._lock.wait_for(lambda: key not in self._asked_for)
            self._asked_for.add(key)
        try:
            yield
        finally:
            with self._lock:
                self._asked_for.remove(key)
                self._lock.notify_all()
