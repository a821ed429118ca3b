"""Which columns the data of a project have, told from the tags that nodes announce; and whose data differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from flops.core.cluster import DataTag, Node

Schema = tuple[tuple[str, str], ...]  # names and types of columns, by name


def common_schema(nodes: Iterable[Node], tags: Sequence[str]) -> Schema | None:
    """The schema that most nodes have under any of the tags; of as many nodes that of more rows.

    None when no node tells its columns.
    """
    counts: Counter[Schema] = Counter()
    rows: Counter[Schema] = Counter()
    for node in nodes:
        found = _told(node, tags)
        counts.update({_schema(tag) for tag in found})
        for tag in found:
            rows[_schema(tag)] += tag.rows
    return min(counts, key=lambda schema: (-counts[schema], -rows[schema], schema), default=None)


def schema_obstacle(node: Node, tags: Sequence[str], expected: Schema | None) -> str:
    """Why a node's data do not fit to those of the others, "" if they do or nothing is known."""
    for tag in _told(node, tags):
        if expected is not None and (problems := _differences(dict(expected), dict(_schema(tag)))):
            return f"its rows tagged '{tag.name}' differ from those of other nodes: {', '.join(problems)}"
    return ""


def _told(node: Node, tags: Sequence[str]) -> list[DataTag]:
    return [tag for tag in node.data_tags if tag.name in tags and tag.rows and tag.columns]


def _schema(tag: DataTag) -> Schema:
    """The columns without what carries no meaning: their order, and the width of offsets."""
    return tuple(sorted((name, kind.replace("large_", "")) for name, kind in tag.columns.items()))


def _differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    problems = []
    for name in sorted({*expected, *found}):
        if name not in found:
            problems.append(f"column '{name}' is missing")
        elif name not in expected:
            problems.append(f"column '{name}' is only here")
        elif found[name] != expected[name]:
            problems.append(f"column '{name}' is {found[name]} instead of {expected[name]}")
    return problems
