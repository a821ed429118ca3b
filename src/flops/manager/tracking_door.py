"""MLflow beside the REST API, for whoever shows the admin token: programs, and people in a browser."""

from __future__ import annotations

import hmac
import logging
from urllib.parse import urlsplit

from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from flops.errors import ErrorCode, FlopsError
from flops.wire.http_credentials import basic_credentials, bearer_token
from flops.wire.services import TRACKING_PATH

_READING = frozenset({"GET", "HEAD", "OPTIONS"})

_log = logging.getLogger(__name__)


class TrackingDoor:
    """ASGI application: below `TRACKING_PATH` it is MLflow, and the REST API everywhere else.

    Args:
        api: the REST API, which has its own gate.
        tracking: MLflow, which asks nobody who they are.
        token: the admin token: as a bearer token, or as a password with any user name.
    """

    def __init__(self, api: ASGIApp, tracking: ASGIApp, token: str) -> None:
        self._api = api
        self._tracking = tracking
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http" or not f"{scope['path']}/".startswith(f"{TRACKING_PATH}/"):
            await self._api(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None and scope["path"] == TRACKING_PATH:
            refusal = RedirectResponse(f"{TRACKING_PATH}/")  # the GUI's links are relative to it
        await (refusal or self._tracking)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        shown = bearer_token(scope) or basic_credentials(scope)[1]
        if not hmac.compare_digest(shown.encode(), self._token):
            wrong = ", not this one" if shown else ""
            error = FlopsError(
                ErrorCode.UNAUTHENTICATED,
                f"{scope['method']} {scope['path']} needs the admin token{wrong}.",
                hint="A browser asks for it: any user name, and the token as the password. MLflow's client "
                "takes it from MLFLOW_TRACKING_TOKEN.",
            )
        elif scope["method"] not in _READING and (origin := _foreign_origin(scope)):
            error = FlopsError(
                ErrorCode.FORBIDDEN,
                f"The web page {origin[:200]} may not change what is in MLflow.",
                hint="Only MLflow's own pages may: a browser that has logged in sends the token for all.",
            )
        else:
            return None
        client = (scope.get("client") or ("?",))[0]
        if shown:
            _log.warning("%s of %s is refused: %s", scope["method"], client, error)
        refusal = JSONResponse(error.to_dict(), error.spec.http_status)
        if error.code is ErrorCode.UNAUTHENTICATED:
            refusal.headers["WWW-Authenticate"] = 'Basic realm="FLOps", charset="UTF-8"'
        return refusal


def _foreign_origin(scope: Scope) -> str:
    """The web page that a browser sends a request for, unless it is one of this address; "" for none."""
    headers = dict(scope["headers"])
    origin = headers.get(b"origin", b"").decode("latin-1")
    return (
        "" if not origin or urlsplit(origin).netloc == headers.get(b"host", b"").decode("latin-1") else origin
    )
