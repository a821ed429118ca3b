"""Files that users name on the command line."""

from __future__ import annotations

from pathlib import Path

from flops.errors import ErrorCode, FlopsError


def read_given(path: Path, failure: str, hint: str, *, encoding: str = "utf-8") -> str:
    """The text of a file.

    Args:
        path: the file.
        failure: what is said when it cannot be read; the reason follows.
        hint: what to do then.
        encoding: of the file.

    Raises:
        FlopsError: ``file_unreadable``.
    """
    try:
        return path.read_text(encoding=encoding)
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no text"
        raise FlopsError(ErrorCode.FILE_UNREADABLE, f"{failure}: {reason}.", hint=hint) from exc
