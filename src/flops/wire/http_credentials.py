"""Who a request says it is: what stands in its Authorization header."""

from __future__ import annotations

import base64
import binascii

from starlette.types import Scope


def bearer_token(scope: Scope) -> str:
    """The token that a request shows; "" without one."""
    return _shown(scope, "bearer")


def basic_credentials(scope: Scope) -> tuple[str, str]:
    """The user and the password that a request shows; empty without them."""
    try:
        coded = base64.b64decode(_shown(scope, "basic"), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    user, _, password = coded.partition(":")
    return user, password


def _shown(scope: Scope, wanted: str) -> str:
    shown = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, credentials = shown.decode("latin-1").partition(" ")
    return str(credentials).strip() if scheme.lower() == wanted else ""
