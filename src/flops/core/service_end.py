"""How a service ended, in words and as an error: by what its runtime knows of its main process."""

from __future__ import annotations

import contextlib
import signal

from flops.core.cluster import ServiceState, ServiceStatus
from flops.core.ids import ServiceId
from flops.errors import ErrorCode, FlopsError

MACHINE_RESTARTED = "The machine was restarted."
WANTED_MEMORY = "needed more memory than it may use"


def stopped_status(service_id: ServiceId, exit_code: int | None, why: str = "It was ended.") -> ServiceStatus:
    """A service that was asked to end, or that ended with its machine."""
    return ServiceStatus(service_id=service_id, state=ServiceState.STOPPED, exit_code=exit_code, detail=why)


def ended_status(
    service_id: ServiceId, exit_code: int | None, *, out_of_memory: str = "", problem: str = ""
) -> ServiceStatus:
    """A service that ended by itself.

    Args:
        service_id: the service.
        exit_code: of its main process; -9 for signal 9, None when there never was one.
        out_of_memory: why it counts as killed for want of memory, as the rest of a sentence; "" when not.
        problem: why it could not be started or watched, likewise.
    """
    if exit_code == 0:
        return ServiceStatus(service_id=service_id, state=ServiceState.COMPLETED, exit_code=0)
    code = ErrorCode.OUT_OF_MEMORY if out_of_memory else ErrorCode.SERVICE_FAILED
    why = out_of_memory or problem or describe_exit(exit_code)
    error = FlopsError(code, f"{service_id} {why}.", details={"exit_code": exit_code})
    return ServiceStatus(
        service_id=service_id,
        state=ServiceState.FAILED,
        exit_code=exit_code,
        detail=error.message,
        error=error.to_dict(),
    )


def describe_exit(code: int | None) -> str:
    """An exit code as the rest of a sentence."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def restart_heading(attempt: int, before: ServiceStatus) -> str:
    """The line in a service's output at which a new start begins."""
    return f"── started again (attempt {attempt}): {before.detail or 'It had done its work.'}"
