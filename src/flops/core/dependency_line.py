"""One entry of a dependency file, with the place it stands at."""

from __future__ import annotations

from dataclasses import dataclass

from flops.errors import ErrorCode, FlopsError


@dataclass(frozen=True)
class Line:
    """An entry as the file has it; `number` counts from 1."""

    file: str
    number: int
    text: str


def invalid(line: Line, reason: str) -> FlopsError:
    """The error users see for an entry that cannot be used."""
    return FlopsError(
        ErrorCode.DEPENDENCIES_INVALID,
        f"{line.file}, line {line.number}: {line.text[:200]!r} cannot be used: {reason}.",
        details={"file": line.file, "line": line.number},
    )
