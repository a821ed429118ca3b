"""Requests to a registry, tried again while that may help, and what its refusals mean."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import httpx

from flops.command import stop_if_needless
from flops.core.image_reference import ImageReference
from flops.errors import ErrorCode, FlopsError

_ATTEMPTS = 6
_LONGEST_PAUSE_S = 15.0
_PASSING = frozenset({408, 409, 416, 425, 429, 500, 502, 503, 504})  # worth another try

T = TypeVar("T")


class Link:
    """Requests to one registry about one image's name; what fails in passing is tried again."""

    def __init__(
        self, client: httpx.Client, origin: httpx.URL, reference: ImageReference, first_pause_s: float
    ) -> None:
        self.client = client
        self.reference = reference
        self.base = f"{origin}/v2/{reference.name}"
        self._first_pause_s = first_pause_s

    def ask(
        self,
        method: str,
        url: str,
        *,
        accept: set[int],
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        """Send a small request, until it is answered with one of the statuses in `accept`."""

        def attempt() -> httpx.Response:
            response = self.client.request(method, url, headers=headers, content=content)
            self.check(response, accept)
            return response

        return self.persist(attempt)

    def persist(self, attempt: Callable[[], T], *, progress: Callable[[], int] = lambda: 0) -> T:
        """Try until it succeeds, with growing pauses; what gets on may fail any number of times.

        Args:
            attempt: raises `httpx.TransportError` or `PassingError` when another try may help.
            progress: how far it got, in bytes.
        """
        failures, reached = 0, progress()
        while True:
            stop_if_needless()
            try:
                return attempt()
            except (httpx.TransportError, PassingError) as exc:
                if progress() > reached:
                    failures, reached = 0, progress()
                failures += 1
                problem, cause = str(exc) or type(exc).__name__, exc
                pause_s = getattr(exc, "pause_s", 0.0)
            if failures >= _ATTEMPTS:
                raise FlopsError(
                    ErrorCode.REGISTRY_UNREACHABLE,
                    f"The registry {self.reference.host} did not do what was asked in {failures} tries: "
                    f"{problem}.",
                ) from cause
            self._pause(max(pause_s, self._first_pause_s * 2 ** (failures - 1)))

    def _pause(self, pause_s: float) -> None:
        end_s = time.monotonic() + min(pause_s, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)  # noqa: S311
        while (left_s := end_s - time.monotonic()) > 0:
            stop_if_needless()
            time.sleep(min(left_s, 0.1))

    def check(self, response: httpx.Response, accept: set[int]) -> None:
        """Raise what an answer means that is not one of those hoped for."""
        status = response.status_code
        if status in accept:
            return
        words = _words(response)
        if status in _PASSING:
            raise PassingError(f"it answered {status} {words}", response.headers.get("retry-after", ""))
        if status == httpx.codes.NOT_FOUND:
            raise FlopsError(ErrorCode.IMAGE_NOT_FOUND, f"The registry has no {self.reference}: {words}.")
        if status == httpx.codes.INSUFFICIENT_STORAGE:
            words = f"its disk is full: {words}"
        raise FlopsError(
            ErrorCode.REGISTRY_REFUSED,
            f"{self.reference.host} refuses {self.reference.name}: {status} {words}.",
        )


class PassingError(Exception):
    """An answer that may be another one in a while."""

    def __init__(self, message: str, retry_after: str = "") -> None:
        super().__init__(message)
        self.pause_s = float(retry_after) if retry_after.isdecimal() else 0.0


def _words(response: httpx.Response) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, httpx.ResponseNotRead):
        error = response.json()["errors"][0]
        return f"{error.get('code', '')} {str(error.get('message', ''))[:300]}".strip().rstrip(".")
    return response.reason_phrase
