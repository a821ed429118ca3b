"""Blobs on their way to and from a registry: each goes on where its connection broke."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import httpx

from flops.adapters.registry_client.link import Link, PassingError
from flops.command import stop_if_needless
from flops.core.images import Descriptor
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs, Report
from flops.ports import BlobUpload

_SENT_AT_ONCE_BYTES = 16 * 1024**2
_READ_BYTES = 1_048_576
_REPORT_INTERVAL_S = 2.0
_RANGE = re.compile(r"(?:bytes=)?0-(?P<last>\d+)")
_GONE = frozenset({404, 405})  # of an upload: it is not known, or the registry does not tell


def push_blob(link: Link, part: Descriptor, blobs: ImageBlobs, report: Report) -> int:
    """Send a blob unless the registry has it; returns the bytes that were sent.

    Raises:
        FlopsError: ``registry_unreachable``, ``registry_refused``, ``image_damaged``.
    """
    if _is_there(link, part):
        return 0
    sending = _Sending(link, part, blobs, _Progress(report, "Sent", part.size))
    link.persist(sending.go_on, progress=lambda: sending.offset)
    return sending.sent


def pull_blob(link: Link, part: Descriptor, blobs: ImageBlobs, report: Report) -> None:
    """Fetch a blob unless it is here, whole.

    Raises:
        FlopsError: ``image_not_found``, ``image_damaged``, ``registry_unreachable``, ``registry_refused``,
            ``disk_full``.
    """
    if blobs.is_intact(part.digest):
        return
    fetching = _Fetching(link, part, blobs, _Progress(report, "Fetched", part.size))
    try:
        link.persist(fetching.go_on, progress=lambda: fetching.offset)
    finally:
        fetching.upload.discard()


class _Progress:
    """Tells how far a transfer is, not more often than people read."""

    def __init__(self, report: Report, verb: str, size: int) -> None:
        self._report = report
        self._verb = verb
        self._size = size
        self._told_s = time.monotonic()

    def tell(self, done: int) -> None:
        stop_if_needless()
        if (now_s := time.monotonic()) - self._told_s >= _REPORT_INTERVAL_S:
            self._told_s = now_s
            self._report(f"{self._verb} {done / 1e6:.0f} of {self._size / 1e6:.0f} MB of a layer.")


class _Sending:
    """One blob's upload; `go_on` may be called again after it failed."""

    def __init__(self, link: Link, part: Descriptor, blobs: ImageBlobs, progress: _Progress) -> None:
        self._link = link
        self._part = part
        self._blobs = blobs
        self._progress = progress
        self._location: httpx.URL | None = None
        self._is_interrupted = False
        self.offset = 0
        self.sent = 0

    def go_on(self) -> None:
        if self._is_interrupted:
            if _is_there(self._link, self._part):  # it had arrived, only the answer had not
                return
            self._ask_how_far()
        self._is_interrupted = True
        if self._location is None:
            self._begin()
        while self.offset < self._part.size - _SENT_AT_ONCE_BYTES:
            self._send("PATCH", self._read(_SENT_AT_ONCE_BYTES), {202})
        self._send("PUT", self._read(self._part.size - self.offset), {201})

    def _begin(self) -> None:
        response = self._link.client.post(f"{self._link.base}/blobs/uploads/")
        self._link.check(response, {202})
        self._take_location(response)
        self.offset = 0

    def _ask_how_far(self) -> None:
        if self._location is None:
            return
        response = self._link.client.get(self._location)
        found = _RANGE.fullmatch(response.headers.get("range", ""))
        if response.status_code in _GONE or found is None:
            self._location = None
            return
        self._link.check(response, {200, 202, 204})
        self._take_location(response)
        last = int(found["last"])
        self.offset = last + 1 if last else 0  # 0-0 is said of nothing, too

    def _send(self, method: str, data: bytes, accept: set[int]) -> None:
        assert self._location is not None  # noqa: S101 (for the type checker)
        headers = {"Content-Type": "application/octet-stream"}
        url = self._location
        if method == "PUT":
            url = url.copy_merge_params({"digest": f"sha256:{self._part.digest}"})
        if data:
            headers["Content-Range"] = f"{self.offset}-{self.offset + len(data) - 1}"
        response = self._link.client.request(method, url, content=data, headers=headers)
        if response.status_code in {400, 404}:  # other bytes than said; a session that is gone
            self._location = None
            self._look_for_damage()
            raise PassingError(f"the upload was given up: {response.status_code} {response.text[:300]}")
        self._link.check(response, accept)
        self._take_location(response)
        self.offset += len(data)
        self.sent += len(data)
        self._progress.tell(self.offset)

    def _take_location(self, response: httpx.Response) -> None:
        if "location" in response.headers:
            self._location = response.url.join(response.headers["location"])

    def _read(self, count: int) -> bytes:
        try:
            data = b"".join(self._blobs.part(self._part.digest, self.offset, self.offset + count))
        except FlopsError as exc:
            raise _damaged_here(self._link, exc) from exc
        if len(data) != count:
            raise _damaged_here(self._link, None)
        return data

    def _look_for_damage(self) -> None:
        try:
            for _ in self._blobs.chunks(self._part.digest):
                break
        except FlopsError as exc:
            raise _damaged_here(self._link, exc) from exc


class _Fetching:
    """One blob's download; `go_on` may be called again after it failed."""

    def __init__(self, link: Link, part: Descriptor, blobs: ImageBlobs, progress: _Progress) -> None:
        self._link = link
        self._part = part
        self._open: Callable[[], BlobUpload] = blobs.upload
        self._progress = progress
        self.upload = self._open()
        self.offset = 0

    def go_on(self) -> None:
        url = f"{self._link.base}/blobs/sha256:{self._part.digest}"
        headers = {"Range": f"bytes={self.offset}-"} if self.offset else {}
        if self.offset < self._part.size or not self._part.size:
            with self._link.client.stream("GET", url, headers=headers) as response:
                self._receive(response)
        if self.offset < self._part.size:
            raise PassingError(f"a layer ended after {self.offset} of {self._part.size} bytes")
        try:
            self.upload.commit(self._part.digest)
        except FlopsError as exc:
            if exc.code is ErrorCode.UPLOAD_INCOMPLETE:
                raise _damaged_there(self._link, self._part) from exc
            raise

    def _receive(self, response: httpx.Response) -> None:
        if response.status_code not in {200, 206}:
            response.read()
        self._link.check(response, {200, 206})
        if response.status_code != httpx.codes.PARTIAL_CONTENT and self.offset:
            self.upload.discard()
            self.upload = self._open()
            self.offset = 0
        for chunk in response.iter_raw(_READ_BYTES):
            self.offset += len(chunk)
            if self.offset > self._part.size:
                raise _damaged_there(self._link, self._part)
            self.upload.write(chunk)
            self._progress.tell(self.offset)


def _is_there(link: Link, part: Descriptor) -> bool:
    response = link.ask("HEAD", f"{link.base}/blobs/sha256:{part.digest}", accept={200, 404})
    return response.status_code == httpx.codes.OK


def _damaged_here(link: Link, exc: FlopsError | None) -> FlopsError:
    why = exc.message if exc is not None else "a layer is shorter than it should be."
    return FlopsError(
        ErrorCode.IMAGE_DAMAGED, f"{link.reference} cannot be pushed: {why}", hint="Build the image again."
    )


def _damaged_there(link: Link, part: Descriptor) -> FlopsError:
    return FlopsError(
        ErrorCode.IMAGE_DAMAGED,
        f"A layer of {link.reference} arrived with other bytes than the {part.size} of sha256:{part.digest}.",
    )
