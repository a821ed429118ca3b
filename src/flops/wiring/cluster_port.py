"""What is served on the cluster's port: nodes and blobs, and beside them the registry of images."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

_REGISTRY = "/v2/"  # where the OCI's distribution specification has it


def with_registry(cluster: Starlette, registry: Starlette) -> Starlette:
    """Both applications on one port: a node that reaches its cluster reaches its images."""

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        chosen = registry if scope["path"].startswith(_REGISTRY) else cluster
        await chosen(scope, receive, send)

    @contextlib.asynccontextmanager
    async def live(_app: Starlette) -> AsyncIterator[None]:
        async with (
            registry.router.lifespan_context(registry),
            cluster.router.lifespan_context(cluster),
        ):
            yield

    return Starlette(routes=[Mount("", app=dispatch)], lifespan=live)
