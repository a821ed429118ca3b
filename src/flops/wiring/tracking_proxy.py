"""Serves MLflow, which listens on loopback only, on the ports of the control plane that others reach."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from flops.adapters.http_proxy import HttpProxy
from flops.wire.services import TRACKING_PATH


def with_tracking(app: Starlette, url: str, join: Callable[[ASGIApp, ASGIApp], ASGIApp]) -> Starlette:
    """An application with MLflow beside it.

    Args:
        app: what is there.
        url: where MLflow listens.
        join: makes one application of both, which decides what is for MLflow and who may ask it.
    """
    proxy = HttpProxy(url, TRACKING_PATH, "MLflow")

    @contextlib.asynccontextmanager
    async def live(_app: Starlette) -> AsyncIterator[None]:
        async with proxy.lifespan(), app.router.lifespan_context(app):
            yield

    return Starlette(routes=[Mount("", app=join(app, proxy))], lifespan=live)


def beside_cluster(cluster: ASGIApp, tracking: ASGIApp) -> ASGIApp:
    """MLflow on the cluster's port; who may ask is for its guard to say."""

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        is_tracking = scope["type"] == "http" and scope["path"].startswith(f"{TRACKING_PATH}/")
        await (tracking if is_tracking else cluster)(scope, receive, send)

    return dispatch
