"""One connection to the cluster, from hello to its end: commands in, reports out, all in one thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Protocol

from flops.core.cluster import (
    HEARTBEAT_INTERVAL_S,
    Addon,
    DataTag,
    NodeFacts,
    NodeLoad,
    ServiceState,
    ServiceStatus,
    ServiceUsage,
)
from flops.core.ids import ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.node.event_log import EventLogReader
from flops.node.supervisor import Supervisor
from flops.wire.node import (
    Acknowledged,
    ActorEventReport,
    CommandResult,
    FetchLogs,
    FromCluster,
    FromNode,
    Goodbye,
    Heartbeat,
    Hello,
    Refused,
    RemoveService,
    ServiceChanged,
    StartService,
    StopService,
    Welcome,
)

WELCOME_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.05
_MAX_TAIL_BYTES = 1_048_576

_log = logging.getLogger(__name__)


class ClusterConnection(Protocol):
    """A connection to the cluster; both methods raise ``unreachable`` when it has ended."""

    def send(self, message: FromNode) -> None:
        """Send a message."""
        ...

    def receive(self, timeout_s: float) -> FromCluster | None:
        """The next message; None when none comes in time."""
        ...

    def close(self) -> None:
        """End the connection; never raises."""
        ...


@dataclass(frozen=True)
class NodeView:
    """What the node tells about itself; the functions are called whenever it is told."""

    node_id: str
    name: str
    facts: Callable[[], NodeFacts]
    load: Callable[[], NodeLoad]
    addons: Callable[[], tuple[Addon, ...]]
    data_tags: Callable[[], tuple[DataTag, ...]]
    clock_s: Callable[[], float]


class Session:
    """Serves one connection.

    Args:
        connection: a fresh connection.
        view: what to tell.
        supervisor: what the cluster commands.
    """

    def __init__(self, connection: ClusterConnection, view: NodeView, supervisor: Supervisor) -> None:
        self._connection = connection
        self._view = view
        self._supervisor = supervisor
        self._readers: dict[ServiceId, EventLogReader] = {}
        self._told: dict[ServiceId, ServiceStatus] = {}
        self._told_addons: tuple[tuple[Addon, ...], tuple[DataTag, ...]] = ((), ())
        self._acknowledged: dict[str, int] = {}
        self._heartbeat_at_s = 0.0

    def open(self) -> Welcome:
        """Say hello, and do what the cluster's welcome asks for.

        Raises:
            FlopsError: ``unreachable``; ``timeout`` without an answer; what the cluster refuses with.
        """
        facts, addons, tags = self._view.facts(), self._view.addons(), self._view.data_tags()
        statuses = {i: self._as_told(status) for i, status in self._supervisor.statuses().items()}
        self._connection.send(
            Hello(
                node_id=self._view.node_id,
                name=self._view.name,
                facts=facts,
                addons=addons,
                data_tags=tags,
                services=tuple(statuses.values()),
                clock_s=self._view.clock_s(),
            )
        )
        self._told, self._told_addons = dict(statuses), (addons, tags)
        welcome = self._expect_welcome()
        self._acknowledged = dict(welcome.acknowledged)
        self._readers.clear()  # made before it was known where they begin
        self._supervisor.ensure(welcome.services, welcome.stopping)
        return welcome

    def _expect_welcome(self) -> Welcome:
        message = self._connection.receive(WELCOME_TIMEOUT_S)
        if isinstance(message, Welcome):
            return message
        if isinstance(message, Refused):
            raise FlopsError.from_dict(message.error)
        what = "did not answer" if message is None else f"answered {message.type}"
        raise FlopsError(ErrorCode.TIMEOUT, f"The cluster {what} when the node said hello.")

    def serve(self, is_stopping: Callable[[], bool]) -> None:
        """Serve the connection until the node stops.

        Raises:
            FlopsError: ``unreachable`` when the connection ends; what the cluster refuses with.
        """
        while not is_stopping():
            message = self._connection.receive(POLL_INTERVAL_S)
            while message is not None:
                self._obey(message)
                message = self._connection.receive(0)
            self.report()

    def report(self) -> None:
        """Send what has changed, and a heartbeat when it is time."""
        statuses = self._supervisor.statuses()
        self._forget_all_but(statuses)
        for service_id, status in statuses.items():
            self._send_events(service_id, status)
            told = self._as_told(status)
            self._send_change(service_id, told)
            if told.state.is_final:
                self._supervisor.free(service_id)
        now_s = time.monotonic()
        is_changed = (self._view.addons(), self._view.data_tags()) != self._told_addons
        if is_changed or now_s - self._heartbeat_at_s >= HEARTBEAT_INTERVAL_S:
            self._heartbeat_at_s = now_s
            self._send_heartbeat()

    def _forget_all_but(self, services: Container[str]) -> None:
        self._readers = {i: reader for i, reader in self._readers.items() if i in services}
        self._told = {i: status for i, status in self._told.items() if i in services}
        self._acknowledged = {i: line for i, line in self._acknowledged.items() if i in services}

    def say_goodbye(self, *, timeout_s: float) -> None:
        """Tell that the node stops, after its last events and states; gives up after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        try:
            self.report()
            while not self._is_drained() and time.monotonic() < deadline_s:
                message = self._connection.receive(POLL_INTERVAL_S)
                if isinstance(message, Acknowledged):
                    self._obey(message)
                self.report()
            self._connection.send(Goodbye())
        except FlopsError as error:
            _log.info("the cluster was not told goodbye: %s", error.message)

    def _is_drained(self) -> bool:
        return all(self._reader(i).is_drained() for i in self._supervisor.ids())

    def _as_told(self, status: ServiceStatus) -> ServiceStatus:
        """A final state is told only when every event of the service is stored: what it said comes first."""
        plain = status.model_copy(update={"usage": ServiceUsage()})
        if not status.state.is_final or self._reader(status.service_id).is_drained():
            return plain
        detail = "It has ended; its last events are being sent."
        return ServiceStatus(
            service_id=status.service_id, state=ServiceState.RUNNING, detail=detail, restarts=status.restarts
        )

    def _reader(self, service_id: ServiceId) -> EventLogReader:
        reader = self._readers.get(service_id)
        if reader is None:
            path = self._supervisor.events_file(service_id)
            reader = EventLogReader(path, self._acknowledged.get(service_id, 0))
            self._readers[service_id] = reader
        return reader

    def _send_events(self, service_id: ServiceId, status: ServiceStatus) -> None:
        reader = self._reader(service_id)
        for line, event in reader.next_lines(is_final=status.state.is_final):
            self._connection.send(ActorEventReport(service_id=service_id, line=line, event=event))

    def _send_change(self, service_id: ServiceId, status: ServiceStatus) -> None:
        if self._told.get(service_id) != status:
            self._told[service_id] = status
            self._connection.send(ServiceChanged(status=status))

    def _send_heartbeat(self) -> None:
        statuses = self._supervisor.statuses(with_usage=True)
        told = [self._as_told(s).model_copy(update={"usage": s.usage}) for s in statuses.values()]
        addons, tags = self._view.addons(), self._view.data_tags()
        self._told_addons = (addons, tags)
        self._connection.send(
            Heartbeat(
                load=self._view.load(),
                addons=addons,
                data_tags=tags,
                services=tuple(told),
                clock_s=self._view.clock_s(),
            )
        )

    def _obey(self, message: FromCluster) -> None:
        match message:
            case StartService():
                self._supervisor.start(message.spec)
            case StopService():
                self._supervisor.stop(ServiceId(message.service_id))
            case RemoveService():
                self._supervisor.remove(ServiceId(message.service_id))
            case FetchLogs():
                self._connection.send(self._logs(message))
            case Acknowledged():
                if message.service_id in self._readers:
                    self._readers[ServiceId(message.service_id)].acknowledge(message.line)
            case Welcome():
                self._supervisor.ensure(message.services, message.stopping)
            case Refused():
                raise FlopsError.from_dict(message.error)

    def _logs(self, request: FetchLogs) -> CommandResult:
        tail_bytes = min(max(request.tail_bytes, 0), _MAX_TAIL_BYTES)
        try:
            output = self._supervisor.output(ServiceId(request.service_id), request.after, tail_bytes)
        except FlopsError as error:
            return CommandResult(request_id=request.request_id, error=error.to_dict())
        return CommandResult(request_id=request.request_id, output=output)
