"""What a node reveals when users' code fails on it. Its operator chooses; the node's own logs have it all.

Exceptions quote data, and a traceback or a last line of output may, too. So the choice is applied where the
failure is met, before anything of it leaves the node.

This module is part of the actor kit: it imports the standard library only.
"""

from __future__ import annotations

from enum import StrEnum

from flops.errors import ErrorCode, FlopsError


class Disclosure(StrEnum):
    """How much of a failure of users' code leaves the node."""

    FULL = "full"  # message, traceback, last lines of output
    MESSAGE = "message"  # the exception's type and text with file and line; no traceback, no output
    NONE = "none"  # only that it failed, on which node, in which phase

    @property
    def meaning(self) -> str:
        """The choice in words."""
        return {
            Disclosure.FULL: "failures of users' code are told with traceback and last output",
            Disclosure.MESSAGE: "failures of users' code are told by exception, file and line",
            Disclosure.NONE: "of users' code is told only that it failed",
        }[self]

    @property
    def is_output_told(self) -> bool:
        """Whether what users' code prints may leave the node."""
        return self is Disclosure.FULL


_PLAIN_DETAILS = frozenset({"node", "round", "phase", "learner", "service_id", "exit_code"})
_OWN_WORDS = frozenset(  # codes whose messages are written by us, of things that are no secret
    {
        ErrorCode.UNREACHABLE,
        ErrorCode.TIMEOUT,
        ErrorCode.UNAUTHENTICATED,
        ErrorCode.PORT_OCCUPIED,
        ErrorCode.DISK_FULL,
        ErrorCode.CONFIG_INVALID,
        ErrorCode.NO_MATCHING_DATA,
        ErrorCode.SERVICE_FAILED,
        ErrorCode.OUT_OF_MEMORY,
        ErrorCode.OUT_OF_STORAGE,
    }
)


def parse_disclosure(value: str) -> Disclosure:
    """Read a choice.

    Raises:
        FlopsError: ``config_invalid``.
    """
    try:
        return Disclosure(value.strip().lower())
    except ValueError as exc:
        raise FlopsError(
            ErrorCode.CONFIG_INVALID,
            f"{value!r} does not say what the node reveals about failures.",
            hint=f"Say one of {', '.join(Disclosure)}; nothing was changed.",
        ) from exc


def disclosed(error: FlopsError, disclosure: Disclosure, node: str) -> FlopsError:
    """A failure of users' code as others may see it; doing it twice is the same as once.

    Args:
        error: the whole failure; it stays as it is.
        disclosure: the operator's choice.
        node: name of the node where it failed.
    """
    if disclosure is Disclosure.FULL:
        return error
    details = {name: value for name, value in error.details.items() if name in _PLAIN_DETAILS}
    details |= {"node": node, "disclosure": disclosure.value}
    if disclosure is Disclosure.MESSAGE or error.code in _OWN_WORDS:
        return FlopsError(error.code, error.message, hint=error.hint, details=details)
    phase = details.get("phase")
    what = f"The ML repository failed to {phase}" if phase else "The ML repository's code failed"
    return FlopsError(
        error.code,
        f"{what} on {node}, which does not reveal why.",
        hint=f"Ask the operator of {node}: the node's own log has the whole failure.",
        details=details,
    )


def withheld_output(service_id: str, node: str) -> FlopsError:
    """The answer to who asks for output that the node does not reveal."""
    return FlopsError(
        ErrorCode.FORBIDDEN,
        f"{node} does not reveal the output of {service_id}: it may quote the data of the node.",
        hint=f"Ask the operator of {node}: the output is kept there.",
        details={"node": node, "service_id": service_id},
    )
