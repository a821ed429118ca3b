"""What every request passes: its id, its token, one shape for whatever goes wrong."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flops.errors import ErrorCode, FlopsError
from flops.log import log_context
from flops.manager.auth import check_token
from flops.wire.rest import ErrorBody

_log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Gate:
    """ASGI middleware around the whole API.

    Every path is served with and without a trailing slash, without a redirect. An exception that nobody
    expected is logged whole, and answered with a request id only.

    Args:
        app: the API.
        token: the admin token.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/") or "/"
        request_id = _request_id(scope)
        scope = {**scope, "path": path, "raw_path": path.encode(), "state": {"request_id": request_id}}
        is_answered = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        with log_context(request_id=request_id):
            try:
                check_token(scope, self._token)
                await self._app(scope, receive, send_with_id)
            except FlopsError as exc:
                await error_response(exc, request_id)(scope, receive, send_with_id)
            except Exception:
                _log.exception("%s %s raised", scope["method"], path)
                if is_answered:
                    raise
                error = FlopsError(ErrorCode.INTERNAL, "The manager could not answer: an internal error.")
                await error_response(error, request_id)(scope, receive, send_with_id)


def error_response(
    error: FlopsError, request_id: str, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error as `ErrorBody`, with the catalogue's status unless another is given."""
    body = ErrorBody(**error.to_dict(), request_id=request_id)
    code = status if status is not None else error.spec.http_status
    answer = JSONResponse(body.model_dump(mode="json"), status_code=code, headers=dict(headers or {}))
    if error.code is ErrorCode.UNAUTHENTICATED:
        answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    text = given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else secrets.token_hex(8)
