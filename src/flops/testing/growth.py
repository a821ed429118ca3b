"""How much an object graph and a database hold: what must not grow with every project."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any


def elements(*roots: object) -> Counter[str]:
    """How many elements all dicts, lists, sets and deques hold that belong to objects of ours.

    Args:
        roots: where to begin; what they refer to is followed.

    Returns:
        By the attribute that holds them, such as ``Session._told``.
    """
    seen: set[int] = set()
    found: Counter[str] = Counter()
    waiting: list[tuple[str, Any]] = [(type(root).__name__, root) for root in roots]
    while waiting:
        name, item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Mapping | Set | list | tuple | deque):
            if not isinstance(item, tuple):
                found[name] += len(item)
            items = [*item.keys(), *item.values()] if isinstance(item, Mapping) else list(item)
            waiting += [(f"{name}[]", part) for part in items]
        elif type(item).__module__.startswith("flops") and hasattr(item, "__dict__"):
            waiting += [(f"{type(item).__name__}.{key}", part) for key, part in vars(item).items()]
    return found


def rows(file: Path) -> dict[str, int]:
    """How many rows each table of an SQLite file has."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {table: _count(database, table) for table in tables if not table.startswith("sqlite_")}


def _count(database: sqlite3.Connection, table: str) -> int:
    answer: Iterator[tuple[int]] = database.execute(f'SELECT COUNT(*) FROM "{table}"')  # noqa: S608 (a name)
    return next(answer)[0]
