"""Which part of something a request asks for, by HTTP's ``Range``."""

from __future__ import annotations

import re

_RANGE = re.compile(r"bytes=(?P<start>\d*)-(?P<last>\d*)")


class NoSuchPartError(Exception):
    """The part lies beyond the end."""


def read_range(text: str, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last; None for the whole, also of several parts.

    Args:
        text: the header, "" for none.
        size: of the whole, in bytes.

    Raises:
        NoSuchPartError: it lies beyond the end.
    """
    found = _RANGE.fullmatch(text)
    if found is None or found["start"] == found["last"] == "":
        return None
    if found["start"] == "":
        start, stop = max(size - int(found["last"]), 0), size
    else:
        start = int(found["start"])
        stop = min(int(found["last"]) + 1, size) if found["last"] else size
    if start >= stop:
        raise NoSuchPartError
    return start, stop
