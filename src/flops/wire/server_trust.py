"""How a Flight server that encrypts is known; of an ML data server, it stands in the tokens for it.

A device has a token and an address, and nothing else. What the server's certificate has to be stands in the
token, after a tilde: the name in it, and the authority that signed it. It is not sent along, and no secret.

This module is part of the actor kit: it imports the standard library only.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from flops.errors import ErrorCode, FlopsError
from flops.wire.flight import DIRECTLY

_BEFORE = "~"  # stands in no token


@dataclass(frozen=True)
class ServerTrust:
    """What a server's certificate has to be.

    Args:
        name: in it, at whatever address the server is dialled.
        authority: certificate of who signed it, PEM.
    """

    name: str
    authority: str


def with_trust(token: str, trust: ServerTrust | None) -> str:
    """A token that says how its server is known; unchanged for one that does not encrypt."""
    if trust is None:
        return token
    raw = json.dumps({"name": trust.name, "authority": trust.authority})
    return f"{token}{_BEFORE}{base64.urlsafe_b64encode(raw.encode()).decode().rstrip('=')}"


def split_trust(text: str) -> tuple[str, ServerTrust | None]:
    """The token itself, and how its server is known; None where it does not encrypt.

    Raises:
        FlopsError: ``unauthenticated`` for a token that is not whole.
    """
    token, tilde, coded = text.partition(_BEFORE)
    if not tilde:
        return token, None
    try:
        raw = json.loads(base64.urlsafe_b64decode(coded + "=" * (-len(coded) % 4)))
        return token, ServerTrust(str(raw["name"]), str(raw["authority"]))
    except (ValueError, KeyError, TypeError) as exc:
        raise FlopsError(
            ErrorCode.UNAUTHENTICATED,
            "The token is not whole: what it says about the server cannot be read.",
            hint="Copy all of what `flops data token` printed, one line.",
        ) from exc


def dial_options(address: str, trust: ServerTrust | None) -> tuple[str, dict[str, Any]]:
    """Location and options for a Flight client of a server, past the proxies of the environment."""
    options: dict[str, Any] = {"generic_options": list(DIRECTLY)}
    if trust is None:
        return f"grpc://{address}", options
    options |= {"tls_root_certs": trust.authority.encode(), "override_hostname": trust.name}
    return f"grpc+tls://{address}", options
