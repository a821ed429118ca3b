"""What a data server keeps its rows in, as it sees it; beside `flops.ports`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from flops.core.dataset import Damage, Fragment, TagLimits


class FragmentUpload(Protocol):
    """Rows that arrive batch by batch; nothing of them is visible before `publish`. For one thread."""

    def write(self, batch: Any) -> None:
        """Take in the next rows, a ``pyarrow.RecordBatch`` of the upload's schema.

        Raises: FlopsError: ``disk_full``.
        """
        ...

    def size_bytes(self) -> int:
        """Bytes on disk so far; exact after `seal`."""
        ...

    def seal(self) -> None:
        """Make the rows durable; no more follow.

        Raises: FlopsError: ``disk_full``.
        """
        ...

    def publish(self, fragment_id: str, digest: str, first_row: int, rows: int) -> Fragment:
        """Give the sealed rows their place; a fragment is whole or it is not there.

        That it is there is durable when the store has settled.

        Raises: FlopsError: ``disk_full``; nothing is stored then.
        """
        ...

    def discard(self) -> None:
        """Forget the rows; nothing happens after `publish`."""
        ...


class FragmentStore(Protocol):
    """Fragments of the data server. Schemas are ``pyarrow.Schema``, batches ``pyarrow.RecordBatch``."""

    def fragments(self) -> list[tuple[Fragment, Any]]:
        """All readable fragments with their schemas, by tag and first row; damaged ones are set aside."""
        ...

    def begin(self, tag: str, schema: Any) -> FragmentUpload:
        """Begin an upload.

        Raises: FlopsError: ``disk_full``.
        """
        ...

    def settle(self, tag: str) -> None:
        """Have everything durable that was published under a tag until now; several threads wait together.

        Raises: FlopsError: ``disk_full``, ``file_unreadable``.
        """
        ...

    def path(self, fragment: Fragment) -> str:
        """The Parquet file of a fragment, "" where there is none."""
        ...

    def read(self, fragment: Fragment) -> Iterator[Any]:
        """The rows in batches of a few MB at most, unless a single row is larger.

        Raises: FlopsError: ``fragment_not_found`` when it was removed; ``fragment_damaged``.
        """
        ...

    def remove(self, fragment: Fragment) -> None:
        """Remove a fragment durably; readers that have begun may finish. Nothing happens if it is gone."""
        ...

    def set_aside(self, fragment: Fragment, reason: str) -> None:
        """Put a damaged fragment where it is no longer found, but can be looked at."""
        ...

    def damaged(self, tag: str) -> list[Damage]:
        """What was set aside."""
        ...

    def limits(self) -> dict[str, TagLimits]:
        """Limits by tag, of tags that have any."""
        ...

    def put_limits(self, tag: str, limits: TagLimits) -> None:
        """Store the limits of a tag durably."""
        ...
