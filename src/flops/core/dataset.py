"""What a data server keeps under a tag: fragments, their limits, and what has become unreadable."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from flops.core.cluster import DataTag
from flops.core.model import StrictValue, Value

Limit = Annotated[int, Field(ge=1)]


class Fragment(Value):
    """One upload, as it is stored. Fragments never change."""

    tag: str
    id: str  # unique in its tag; the content's digest unless the uploader named it
    digest: str  # of the rows, by `flops.wire.content_digest`: how they were cut into batches does not matter
    first_row: int  # of the tag's rows, counted in the order of arrival; never changes
    rows: int
    size_bytes: int
    stored_at_s: float


class Stored(Value):
    """The result of an upload."""

    fragment: Fragment
    is_new: bool  # false when the same rows were there already, perhaps under another id
    dropped: int = 0  # older fragments that retention removed in exchange


class Bounds(StrictValue):
    """Most rows and bytes; None is unlimited."""

    max_rows: Limit | None = None
    max_bytes: Limit | None = None

    def admit(self, rows: int, size_bytes: int) -> bool:
        """Whether this much is within the bounds."""
        return (self.max_rows is None or rows <= self.max_rows) and (
            self.max_bytes is None or size_bytes <= self.max_bytes
        )

    def __str__(self) -> str:
        parts = []
        if self.max_rows is not None:
            parts.append(f"{self.max_rows} rows")
        if self.max_bytes is not None:
            parts.append(f"{self.max_bytes} bytes")
        return " and ".join(parts) or "unlimited"


class TagLimits(Value):
    """Limits of a tag. Above `retention` the oldest fragments go; above `quota` uploads are refused."""

    retention: Bounds = Bounds()
    quota: Bounds = Bounds()


class Damage(Value):
    """A stored file that cannot be read and was put aside; the others are not affected."""

    name: str
    reason: str
    path: str  # where it lies now


class ColumnStatistics(Value):
    """What a scan of a column has found."""

    nulls: int = 0
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    counts: dict[str, int] | None = None  # rows per value, of columns with few values


class TagDescription(Value):
    """Everything known about a tag."""

    tag: DataTag
    fragments: tuple[Fragment, ...] = ()
    limits: TagLimits = TagLimits()
    damaged: tuple[Damage, ...] = ()
    metadata: dict[str, Any] = Field(default_factory=dict)  # of the schema, such as "huggingface"
    statistics: dict[str, ColumnStatistics] | None = None  # by column, when asked for


def fragments_to_drop(
    fragments: list[Fragment], retention: Bounds, *, rows: int = 0, size_bytes: int = 0
) -> list[Fragment]:
    """The oldest fragments that have to go, so that the rest is within the retention.

    Args:
        fragments: oldest first.
        retention: most rows and bytes of the tag.
        rows: rows that come in addition to the fragments and stay in any case.
        size_bytes: bytes of those rows.
    """
    kept_rows = rows + sum(f.rows for f in fragments)
    kept_bytes = size_bytes + sum(f.size_bytes for f in fragments)
    dropped = []
    for fragment in fragments:
        if retention.admit(kept_rows, kept_bytes):
            break
        dropped.append(fragment)
        kept_rows -= fragment.rows
        kept_bytes -= fragment.size_bytes
    return dropped
