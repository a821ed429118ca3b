"""How an ML repository gets its data: the rows of its node that carry the project's data tags.

Both functions take no arguments and work inside a learner only. The data never leaves the node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import flight

from flops.errors import ErrorCode, FlopsError
from flops.wire.flight import parse_error
from flops_utils.local_data import DataSource, current_source, note_rows
from flops_utils.local_rows import read_rows

if TYPE_CHECKING:
    from datasets import Dataset

_EMPTY = (ErrorCode.TAG_NOT_FOUND, ErrorCode.DATA_EMPTY)


def load_table() -> pa.Table:
    """Return this learner's rows as an Arrow table; needs nothing beside pyarrow.

    Raises:
        FlopsError: ``no_matching_data`` when the node has no such rows, ``usage`` outside of a learner,
            ``unreachable`` when the ML data server does not answer.
    """
    source = current_source()
    if source is None:
        raise FlopsError(
            ErrorCode.USAGE,
            "Data was asked for outside of a learner.",
            hint="Only ModelManager.set_model_data() may load data: the aggregator has none.",
        )
    try:
        table = read_rows(source)
    except (flight.FlightError, pa.ArrowException, OSError) as exc:
        error = parse_error(str(exc)) or FlopsError(
            ErrorCode.UNREACHABLE,
            f"The ML data server of {source.node or 'this node'} at {source.address} does not answer: "
            f"{str(exc)[:300]}",
        )
        if error.code is ErrorCode.UNAUTHENTICATED:
            raise _stranger(source) from exc
        if error.code not in _EMPTY:
            raise error from exc
        raise _no_data(source) from exc
    if table.num_rows == 0:
        raise _no_data(source)
    note_rows(table.num_rows)
    return table


def load_dataset() -> Dataset:
    """Return this learner's rows as a Hugging Face dataset in Arrow format.

    Features (such as images) are as the data was sent. A repository that calls this needs no ``datasets`` in
    its dependencies: the platform adds it.

    Raises:
        FlopsError: as `load_table`.
    """
    from datasets import Dataset  # noqa: PLC0415 (repositories that use load_table do not have it)

    class WholeColumns(Dataset):  # type: ignore[misc]  # no types: datasets is the repository's
        """Gives whole columns by name, as all versions of `datasets` before 4 did."""

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            return found[:] if isinstance(key, str) and type(found).__name__ == "Column" else found

    return WholeColumns(load_table()).with_format("arrow")


def _stranger(source: DataSource) -> FlopsError:
    """The node made the token for its own data server: it has moved, and another has its port now."""
    return FlopsError(
        ErrorCode.UNREACHABLE,
        f"At {source.address} is not the ML data server of {source.node or 'this node'} any more.",
        hint="Nothing needs to be done: the learner is started again with the server's new address.",
    )


def _no_data(source: DataSource) -> FlopsError:
    part = f" (part {source.part + 1} of {source.parts})" if source.parts > 1 else ""
    return FlopsError(
        ErrorCode.NO_MATCHING_DATA,
        f"{source.node or 'The node'} holds no rows with the data tags {', '.join(source.data_tags)}{part}.",
        details={"node": source.node, "data_tags": list(source.data_tags)},
    )
