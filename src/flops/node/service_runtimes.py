"""Services as processes and as containers, side by side: which of a node's two runtimes has a service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flops.core.cluster import Resources, ServiceStatus, ServiceUsage
from flops.core.ids import ServiceId
from flops.core.output import Output
from flops.core.reach import Reach
from flops.errors import ErrorCode, FlopsError
from flops.ports import Runtime


class ServiceRuntimes:
    """Implements `flops.ports.Runtime` by two others.

    A service with an image needs a container. Another runs in a container where the operator prefers that,
    unless it writes to folders that it shares with the node's daemon, as builders do: it keeps a process, in
    which what it makes belongs to the node's user. Where a service was started, it is looked for, also by a
    daemon with another configuration.

    Args:
        processes: runs services as processes.
        containers: runs services as containers.
        prefers_containers: what the operator has chosen.
    """

    def __init__(self, processes: Runtime, containers: Runtime, *, prefers_containers: bool) -> None:
        self._processes = processes
        self._containers = containers
        self._prefers_containers = prefers_containers

    def start(
        self,
        service_id: ServiceId,
        argv: Sequence[str],
        env: Mapping[str, str],
        work_dir: Path,
        resources: Resources,
        reach: Reach | None = None,
    ) -> None:
        """Start a service in the runtime that it needs, or that is preferred.

        Raises:
            FlopsError: ``config_invalid`` when it has an image, and the operator allows no containers; and
                whatever the runtime raises.
        """
        has_image = reach is not None and bool(reach.image)
        if has_image and not self._prefers_containers:
            raise FlopsError(
                ErrorCode.CONFIG_INVALID,
                f"{service_id} is an image, and containers are switched off on this node.",
                hint="Switch them on: `NodeEngine config virtualization container on`, then start it again.",
            )
        shares_folders = reach is not None and bool(reach.writable)
        in_container = self._prefers_containers and (has_image or not shares_folders)
        chosen, other = (
            (self._containers, self._processes) if in_container else (self._processes, self._containers)
        )
        if other.status(service_id) is not None:
            other.remove(service_id)
        chosen.start(service_id, argv, env, work_dir, resources, reach)

    def status(self, service_id: ServiceId) -> ServiceStatus | None:
        """The service's state; None when neither runtime has started it."""
        status = self._processes.status(service_id)
        return status if status is not None else self._containers.status(service_id)

    def stop(self, service_id: ServiceId, *, grace_s: float = 5.0) -> None:
        """End the service with all its children."""
        self._of(service_id).stop(service_id, grace_s=grace_s)

    def remove(self, service_id: ServiceId) -> None:
        """Stop the service and forget it, with its output."""
        for runtime in (self._processes, self._containers):
            runtime.remove(service_id)

    def running(self) -> list[ServiceId]:
        """Every service that runs now."""
        return sorted({*self._processes.running(), *self._containers.running()})

    def usage(self, service_id: ServiceId) -> ServiceUsage:
        """What the service uses now."""
        return self._of(service_id).usage(service_id)

    def output(self, service_id: ServiceId, *, tail_bytes: int = 65_536) -> str:
        """The end of the service's output."""
        return self._of(service_id).output(service_id, tail_bytes=tail_bytes)

    def read_output(self, service_id: ServiceId, after: int | None, limit_bytes: int) -> Output:
        """What follows a place in the service's output; its end when `after` is None."""
        return self._of(service_id).read_output(service_id, after, limit_bytes)

    def limits(self) -> tuple[tuple[str, ...], str]:
        """What can be enforced on most services here."""
        return (self._containers if self._prefers_containers else self._processes).limits()

    def _of(self, service_id: ServiceId) -> Runtime:
        is_process = self._processes.status(service_id) is not None
        has_container = not is_process and self._containers.status(service_id) is not None
        return self._containers if has_container else self._processes
