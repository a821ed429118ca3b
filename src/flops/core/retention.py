"""What is given up when more is kept than may be: the least recently used first, never what is in use.

Pure. Whoever holds the things says how large and how old they are, and removes what is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable

from flops.core.model import Value


class Entry(Value):
    """Something that is kept, and could be made anew or be missed."""

    key: str
    used_at_s: float  # when it was used last, seconds since the epoch
    size_bytes: int = 0  # what is given back when it goes, and all that was used less recently is gone
    is_in_use: bool = False  # now: it stays


class Limits(Value):
    """How much may be kept; None is unlimited. What is in use counts, and stays."""

    max_bytes: int | None = None
    max_count: int | None = None
    max_age_s: float | None = None  # since its last use


def keep_order(entries: Iterable[Entry]) -> list[Entry]:
    """What is in use first, then what was used last: the later an entry stands, the sooner it goes."""
    return sorted(entries, key=lambda entry: (not entry.is_in_use, -entry.used_at_s, entry.key))


def choose_victims(entries: Iterable[Entry], limits: Limits, now_s: float) -> list[Entry]:
    """What has to go so that the rest keeps to the limits, in the order to remove it; no more than that."""
    kept = keep_order(entries)
    total = sum(entry.size_bytes for entry in kept)
    victims: list[Entry] = []
    while kept and not kept[-1].is_in_use and _exceeds(kept, total, limits, now_s):
        victims.append(kept.pop())
        total -= victims[-1].size_bytes
    return victims


def _exceeds(kept: list[Entry], total: int, limits: Limits, now_s: float) -> bool:
    return (
        (limits.max_bytes is not None and total > limits.max_bytes)
        or (limits.max_count is not None and len(kept) > limits.max_count)
        or (limits.max_age_s is not None and now_s - kept[-1].used_at_s > limits.max_age_s)
    )


def bytes_allowed(max_bytes: int, *, kept: int, free: int, wanted_free: int) -> int:
    """How much may be kept on a disk that others fill, too; all in bytes.

    Args:
        max_bytes: never more than this.
        kept: what is kept now.
        free: what is free on the disk now.
        wanted_free: what should be free.
    """
    return max(0, min(max_bytes, kept + free - wanted_free))
