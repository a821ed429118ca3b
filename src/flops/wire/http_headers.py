"""Which headers of HTTP a proxy passes on."""

from __future__ import annotations

from collections.abc import Iterable

_OF_ONE_CONNECTION = frozenset(
    b"connection keep-alive te trailer transfer-encoding upgrade".split()
)  # RFC 9110


def passed_on(
    headers: Iterable[tuple[bytes, bytes]], *, without: frozenset[bytes] = frozenset()
) -> list[tuple[bytes, bytes]]:
    """The headers that are not about one connection only, names in lower case.

    Args:
        headers: of a request, or of an answer.
        without: names, in lower case, that are left out as well.
    """
    lowered = ((name.lower(), value) for name, value in headers)
    return [(name, value) for name, value in lowered if name not in _OF_ONE_CONNECTION | without]
