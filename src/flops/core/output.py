"""A piece of what a service has written, and where it stands in all that the service ever wrote."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from flops.core.model import Value


class Output(Value):
    """Text between two places. A place counts the bytes since the service's first start, over restarts.

    Only the newest output is kept: a `start` behind the place that was asked for means that what lies between
    is gone; one before it means that the output began anew.
    """

    text: str = ""
    start: int = 0
    end: int = 0  # where to go on
    total: int = 0  # written so far; behind `end` when there is more


def piece_of(
    read: Callable[[int, int], bytes], oldest: int, total: int, *, after: int | None, limit_bytes: int
) -> Output:
    """A piece of whole characters, which begins where it was asked for, or else with a whole line.

    Args:
        read: the bytes between two places that are kept.
        oldest: the first place that is kept.
        total: the place behind the last byte.
        after: where to begin; None for the last `limit_bytes`. What is not kept any more is left out.
        limit_bytes: how much is read.
    """
    if after is not None and oldest <= after <= total:
        data, start = read(after, min(total, after + limit_bytes)), after
    else:
        start = oldest if after is not None else max(oldest, total - limit_bytes)
        data, start = _from_whole_line(read, oldest, start, min(total, start + limit_bytes))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    end = start + len(data) - len(decoder.getstate()[0])
    return Output(text=text, start=start, end=end, total=total)


def _from_whole_line(
    read: Callable[[int, int], bytes], oldest: int, start: int, end: int
) -> tuple[bytes, int]:
    """The bytes between two places without the rest of a line that began before; where they begin then."""
    if start == 0:
        return read(start, end), start
    begin = max(oldest, start - 1)  # the byte before tells whether a line begins at `start`
    data = read(begin, end)
    skipped = data.find(b"\n", 0, -1) + 1 or start - begin  # the end of one long line is better than nothing
    return data[skipped:], begin + skipped
