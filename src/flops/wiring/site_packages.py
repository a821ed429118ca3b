"""The packages that a cluster has for its site, as uv can ask for them: also where the cluster encrypts.

uv knows neither the cluster's authority nor by which name the cluster is known. So a small server on loopback
passes on what uv asks for, while it installs, to the cluster and to nothing else there.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import urljoin, urlsplit

from starlette.applications import Starlette
from starlette.routing import Mount

from flops.adapters.http_proxy import HttpProxy
from flops.adapters.http_server import HttpServer
from flops.adapters.package_index import ClusterPackages
from flops.errors import ErrorCode, FlopsError

_PATH = "/api/packages"
_PORT = 10_101


def site_packages(blobs_url: str, options: Callable[[], Mapping[str, Any]]) -> ClusterPackages:
    """The packages of a cluster.

    Args:
        blobs_url: base URL of its blobs.
        options: of an HTTP client that speaks to it, asked for at each use, since certificates are renewed;
            may raise `FlopsError`.
    """
    url = urljoin(blobs_url, _PATH)

    def reach() -> AbstractContextManager[str]:
        return _passed_on(url, options()) if urlsplit(url).scheme == "https" else nullcontext(url)

    return ClusterPackages(reach)


@contextlib.contextmanager
def _passed_on(url: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Serve a URL on loopback until the end of the block."""
    proxy = HttpProxy(url, "", "The cluster", **options)

    @contextlib.asynccontextmanager
    async def live(_app: Starlette) -> AsyncIterator[None]:
        async with proxy.lifespan():
            yield

    app = Starlette(routes=[Mount("", app=proxy)], lifespan=live)
    host = _own_address(url)
    server = HttpServer(app, host, _PORT)
    try:
        server.start()
    except FlopsError as error:
        if error.code is not ErrorCode.PORT_OCCUPIED:
            raise
        server = HttpServer(app, host, 0)  # while another one builds: uv fetches again what it has
        server.start()
    try:
        yield f"http://{host}:{server.port}"
    finally:
        server.close()


def _own_address(url: str) -> str:
    """An address of loopback for a cluster, always the same: uv caches by address."""
    second, third, last = hashlib.sha256(url.encode()).digest()[:3]
    return f"127.{second % 253 + 1}.{third}.{last % 253 + 1}"
