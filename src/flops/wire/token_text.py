"""Some texts as one line that people copy from one machine to another."""

from __future__ import annotations

import base64
import binascii
import json

_LONGEST = 2_000


def write_line(prefix: str, *parts: str) -> str:
    """The line of some texts; `prefix` says what kind of line it is."""
    raw = json.dumps(parts, separators=(",", ":"))
    return prefix + base64.urlsafe_b64encode(raw.encode()).decode().rstrip("=")


def read_line(prefix: str, line: str) -> list[str]:
    """The texts of a line.

    Raises:
        ValueError: it is no such line, or not a whole one.
    """
    coded = line.strip()[:_LONGEST].removeprefix(prefix)
    try:
        raw = json.loads(base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True))
    except binascii.Error as exc:
        raise ValueError(str(exc)) from exc
    if not (isinstance(raw, list) and all(isinstance(part, str) for part in raw)):
        raise ValueError("not a list of texts")
    return raw
