"""What is trained is not lost for a full disk: the training waits for space."""

from __future__ import annotations

import time
from collections.abc import Callable

from flops.errors import ErrorCode, FlopsError

PATIENCE_S = 3_600.0
_LOOK_S = 1.0


def when_there_is_space(
    action: Callable[[], None], what: str, *, tell: Callable[[str], None], patience_s: float = PATIENCE_S
) -> None:
    """Do something that writes and may be repeated; while the disk is full, wait for space.

    Args:
        action: writes all or nothing.
        what: what it does, for people, as the beginning of a sentence.
        tell: is told that there is a wait, and its end.
        patience_s: longest wait.

    Raises:
        FlopsError: ``disk_full`` when there was no space for so long; what else the action raises.
    """
    deadline_s = time.monotonic() + patience_s
    has_waited = False
    while True:
        try:
            action()
            break
        except FlopsError as error:
            if error.code is not ErrorCode.DISK_FULL or time.monotonic() > deadline_s:
                raise
            if not has_waited:
                tell(f"{what} waits for space on the disk: {error.message}")
            has_waited = True
        time.sleep(_LOOK_S)
    if has_waited:
        tell(f"{what} is done: there is space again.")
