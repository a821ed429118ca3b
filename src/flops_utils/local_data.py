"""Where this process's data is. The learner sets it before it loads the ML repository's code.

State of the process is kept here on purpose: `load_dataset` and `load_table` take no arguments, because
training code must not need to know where it runs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSource:
    """The data of one learner: rows of its node's ML data server.

    Args:
        address: ``host:port`` of the ML data server.
        token: token that may read these tags.
        data_tags: which data.
        part: which of `parts` disjoint parts of it, counted from 0.
        parts: how many learners of the project share the node.
        node: name of the node, for messages.
    """

    address: str
    token: str
    data_tags: tuple[str, ...]
    part: int = 0
    parts: int = 1
    node: str = ""


class _Holder:
    source: DataSource | None = None
    rows_loaded: int = 0
    rows_arrived: int = 0


def use_source(source: DataSource | None) -> None:
    """Set where the data of this process is; None takes it away."""
    _Holder.source = source
    _Holder.rows_loaded = 0


def current_source() -> DataSource | None:
    """Where the data of this process is; None outside of a learner."""
    return _Holder.source


def note_rows(rows: int) -> None:
    """Remember how many rows were loaded last."""
    _Holder.rows_loaded = rows


def note_arrival(rows: int) -> None:
    """Count rows that have come from the ML data server."""
    _Holder.rows_arrived += rows


def rows_arrived() -> int:
    """How many rows have come from the ML data server so far."""
    return _Holder.rows_arrived


def rows_loaded() -> int:
    """How many rows were loaded last; 0 when the repository has loaded none this way."""
    return _Holder.rows_loaded
