"""What is served on the cluster's port: nodes and blobs, and beside them the registry of images."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from flops.core.cluster import Service
from flops.orchestrator.admission import Admission
from flops.orchestrator.cluster import ClusterOrchestrator
from flops.orchestrator.port_guard import PortGuard

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


def guarded(app: Starlette, admission: Admission, orchestrator: ClusterOrchestrator) -> Starlette:
    """The same, for nodes with a certificate and the services on them only."""

    def running(service_id: str) -> Service | None:
        found = (s for s in orchestrator.services() if s.spec.id == service_id)
        return next((s for s in found if not s.status.state.is_final), None)

    guard = Middleware(PortGuard, admission=admission, running=running, call=run_in_threadpool)
    app.user_middleware.insert(0, guard)
    return app
