"""Packages: of the index that the cluster fetches from, and of the cluster as nodes ask for them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import httpx

from flops.core.package_page import PackageFile, read_page
from flops.errors import ErrorCode, FlopsError

_TIMEOUT_S = 30.0  # without a single byte
_ASK_TIMEOUT_S = 5.0  # a node that waits longer is better off with the index
_CHUNK_BYTES = 1_048_576

_log = logging.getLogger(__name__)


class HttpPackageIndex:
    """Implements `flops.package_ports.PackageIndex`: an index of simple pages (PEP 503).

    Args:
        url: of the list of packages; a package's page is ``<url>/<name>/``. It may hold credentials.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._client = httpx.Client(timeout=_TIMEOUT_S, follow_redirects=True)

    def files(self, name: str) -> tuple[PackageFile, ...]:
        """The files of a package.

        Raises:
            FlopsError: see `flops.package_ports.PackageIndex.files`.
        """
        try:
            answer = self._client.get(f"{self._url}/{name}/", headers={"Accept": "text/html"})
        except httpx.HTTPError as exc:
            raise _away(f"the page of {name}", exc) from exc
        _check(answer, f"the page of {name}")
        return read_page(answer.text, str(answer.url))

    def chunks(self, file: PackageFile) -> Iterator[bytes]:
        """The bytes of a file.

        Raises:
            FlopsError: see `flops.package_ports.PackageIndex.chunks`.
        """
        try:
            with self._client.stream("GET", file.url, headers={"Accept-Encoding": "identity"}) as answer:
                _check(answer, file.name)
                yield from answer.iter_bytes(_CHUNK_BYTES)
        except httpx.HTTPError as exc:
            raise _away(file.name, exc) from exc

    def close(self) -> None:
        """Close its connections."""
        self._client.close()


class ClusterPackages:
    """Implements `flops.package_ports.SitePackages`: what the cluster serves, if it does.

    Args:
        reach: opens a way to the packages of the cluster, and says at which base URL they are then. It may
            raise `FlopsError`.
    """

    def __init__(self, reach: Callable[[], AbstractContextManager[str]]) -> None:
        self._reach = reach

    @contextmanager
    def serving(self, lock: str) -> Iterator[str]:
        """URL of an index that has the files of a lock; see `SitePackages`."""
        with ExitStack() as way:
            try:
                url = way.enter_context(self._reach())
                found = f"{url}/simple/" if _takes(url, lock) else ""
            except (httpx.HTTPError, FlopsError) as exc:
                _log.info("the cluster is not asked for packages: %s", exc)
                found = ""
            yield found


def _takes(url: str, lock: str) -> bool:
    """Whether the cluster serves the files of a lock; raises `httpx.HTTPError`."""
    digest = hashlib.sha256(lock.encode()).hexdigest()
    with httpx.Client(trust_env=False, timeout=_ASK_TIMEOUT_S) as client:
        return client.post(f"{url}/locks/{digest}").status_code == httpx.codes.NO_CONTENT


def _check(answer: httpx.Response, what: str) -> None:
    if answer.is_success:
        return
    if answer.status_code in {httpx.codes.NOT_FOUND, httpx.codes.GONE}:
        raise FlopsError(ErrorCode.NOT_FOUND, f"The package index has not {what}.")
    raise FlopsError(
        ErrorCode.UNREACHABLE, f"The package index answered {answer.status_code} when asked for {what}."
    )


def _away(what: str, exc: httpx.HTTPError) -> FlopsError:
    problem = str(exc) or type(exc).__name__
    return FlopsError(ErrorCode.UNREACHABLE, f"The package index does not give {what}: {problem}.")
