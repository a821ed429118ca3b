"""Who may call the REST API: whoever shows the admin token."""

from __future__ import annotations

import hmac

from starlette.types import Scope

from flops.errors import ErrorCode, FlopsError
from flops.wire.http_credentials import bearer_token
from flops.wire.join import MANAGER_AUTHORITY_PATH

# Readiness probes and the description of the API say nothing about the deployment.
# Whom to trust is asked before anybody is trusted: the answer is held against a fingerprint.
_OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/openapi/openapi.json", MANAGER_AUTHORITY_PATH})


def check_token(scope: Scope, token: str) -> None:
    """Let a request pass, or refuse it.

    Args:
        scope: the request, as ASGI describes it.
        token: the admin token.

    Raises:
        FlopsError: ``unauthenticated`` without a token or with another one.
    """
    if scope["path"] in _OPEN_PATHS:
        return
    shown = bearer_token(scope)
    if not shown:
        raise FlopsError(ErrorCode.UNAUTHENTICATED, f"{scope['method']} {scope['path']} needs a token.")
    if not hmac.compare_digest(shown.encode(), token.encode()):
        raise FlopsError(
            ErrorCode.UNAUTHENTICATED, f"The token sent with {scope['method']} {scope['path']} is not valid."
        )
