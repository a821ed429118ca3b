"""The cluster orchestrator: keeps what should run and what is reported, and brings both together.

Commands and messages are handled one at a time under one lock. Whatever a message changes is in the store
before it is answered, so a kill at any moment loses nothing and repeats nothing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from flops.core.admission import Caller, NodeCertificate, certificate_refused
from flops.core.cluster import (
    NODE_LOST_AFTER_S,
    Addon,
    ClusterEvent,
    Node,
    NodeLoad,
    Service,
    ServiceSpec,
    ServiceStatus,
)
from flops.core.ids import NodeId, ServiceId
from flops.core.node_removal import check_removal, status_when_node_removed
from flops.core.output import Output
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.admission import Admission, check_addons
from flops.orchestrator.log_requests import ANSWER_TIMEOUT_S, LogRequests
from flops.orchestrator.records import ClusterRecords
from flops.orchestrator.service_rules import (
    may_run,
    status_when_given_up,
    status_when_missing,
    status_when_node_lost,
    status_when_reported,
)
from flops.ports import Clock, ClusterStore
from flops.wire.node import (
    PROTOCOL_VERSION,
    Acknowledged,
    ActorEventReport,
    CommandResult,
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

_log = logging.getLogger(__name__)

TICK_INTERVAL_S = 0.5  # how often `tick` is to be called
_STALLED_AFTER_S = 3.0  # a longer pause between two ticks is ours, not the nodes' silence
_MAX_TAIL_BYTES = 1_048_576
_EVERYTHING = 2**31
_FORGET_AT_ONCE = 500


class NodeLink(Protocol):
    """The cluster's end of a connection to a node."""

    def send(self, message: FromCluster) -> None:
        """Queue a message; never blocks, never raises. A connection whose queue is full is closed."""
        ...

    def close(self, reason: str) -> None:
        """End the connection after what is queued has been sent."""
        ...


class NodeSession:
    """A node's accepted connection, as `ClusterOrchestrator.connect` returns it."""

    def __init__(
        self, node_id: NodeId, link: NodeLink, cluster: str, certificate: NodeCertificate | None = None
    ) -> None:
        self.node_id = node_id
        self.link = link
        self.cluster = cluster
        self.certificate = certificate  # None where the cluster does not encrypt


class ClusterOrchestrator:
    """Implements `flops.ports.Orchestrator`; thread-safe.

    `connect`, `receive`, `disconnect` and `tick` are for the server that holds the nodes' connections.

    Args:
        store: what survives a restart.
        clock: tells when a node was heard last.
        logs_timeout_s: how long a node may take to send a service's output.
        admission: knows the certificates of nodes; None where the cluster's port is not encrypted.
    """

    def __init__(
        self,
        store: ClusterStore,
        clock: Clock,
        *,
        logs_timeout_s: float = ANSWER_TIMEOUT_S,
        admission: Admission | None = None,
    ) -> None:
        self._store = store
        self.admission = admission
        self._clock = clock
        self._lock = threading.Lock()
        self._records = ClusterRecords(store, clock)
        self._sessions: dict[NodeId, NodeSession] = {}
        self._log_requests = LogRequests(logs_timeout_s)
        self._wakes: list[Callable[[], None]] = []
        self._ticked_at_s = clock.now_s()
        # After a restart, nodes have the usual time to come back before they count as gone.
        self._heard_at_s = {n.id: self._ticked_at_s for n in self._records.nodes.values() if n.is_connected}

    # Commands

    def nodes(self) -> list[Node]:
        """All nodes of the cluster, connected or not."""
        with self._lock:
            return list(self._records.nodes.values())

    def services(self, project_id: str | None = None) -> list[Service]:
        """All services, or those of one project."""
        with self._lock:
            services = list(self._records.services.values())
        return [service for service in services if project_id in {None, service.spec.project_id}]

    def remove_node(self, node_id: NodeId, *, is_forced: bool = False) -> None:
        """Forget a node that is gone for good. If it comes back all the same, it joins as a new one.

        One that has a certificate is locked out at once, also while it is connected.

        Args:
            node_id: the node.
            is_forced: also when it has services that would go on if it came back: they have failed then.

        Raises:
            FlopsError: ``node_not_found``; ``conflict`` for a connected node, or one with services.
        """
        with self._changing():
            node = self._records.nodes.get(node_id)
            if node is None:
                raise FlopsError(ErrorCode.NODE_NOT_FOUND, f"Node {node_id} is unknown.")
            services = [s for s in self._records.services_of(node_id) if not s.status.state.is_final]
            is_member = self.admission is not None and self.admission.is_member(node_id)
            check_removal(node, services, is_forced=is_forced, is_locked_out=is_member)
            if self.admission is not None:
                self.admission.expel(node_id)
            for service in services:  # the node comes last: after a kill, the removal can be repeated
                self._records.put_status(service, status_when_node_removed(service, node.name))
                self._send(node_id, RemoveService(service_id=service.spec.id))
            self._drop(node_id, certificate_refused(node_id, "was removed from the cluster"))
            self._heard_at_s.pop(node_id, None)
            self._records.remove_node(node_id)
        _log.warning("node %s (%s) was removed", node.name, node_id)

    def start_service(self, spec: ServiceSpec) -> None:
        """Have a node run a service. The same id again changes nothing; a node that is away gets it later.

        Raises:
            FlopsError: ``node_not_found``.
        """
        with self._changing():
            if spec.node_id not in self._records.nodes:
                raise FlopsError(
                    ErrorCode.NODE_NOT_FOUND, f"Node {spec.node_id}, which should run {spec.id}, is unknown."
                )
            if spec.id not in self._records.services:
                self._records.add_service(spec)
                self._send(spec.node_id, StartService(spec=self._with_key(spec)))

    def stop_service(self, service_id: ServiceId) -> None:
        """Have a service ended, with all its children. An unknown or ended service is no error.

        A service whose node is gone counts as stopped at once: nobody is there to answer. If the node comes
        back with the service still running, it ends it then.
        """
        with self._changing():
            service = self._records.services.get(service_id)
            if service is None or service.status.state.is_final:
                return
            node = self._records.nodes[service.spec.node_id]
            if node.is_connected:
                self._records.ask_to_stop(service)
                self._send(node.id, StopService(service_id=service_id))
            else:
                detail = f"Its node {node.name} is away, and ends it when it comes back."
                given_up = service.model_copy(update={"should_run": False})
                self._records.put_status(given_up, status_when_given_up(given_up, detail))

    def remove_service(self, service_id: ServiceId) -> None:
        """Stop a service and have its files removed from its node. An unknown service is no error.

        The node is told now if it is there; else its next `Welcome` does not list the service, which says
        the same.
        """
        with self._changing():
            service = self._records.services.get(service_id)
            if service is None:
                return
            self._records.put_status(service, status_when_given_up(service, "It was removed."))
            self._records.remove_service(service_id)
            self._send(service.spec.node_id, RemoveService(service_id=service_id))

    def service_logs(
        self, service_id: ServiceId, *, after: int | None = None, tail_bytes: int = 65_536
    ) -> Output:
        """What follows a place in a service's output, or its end when `after` is None; at most 1 MiB.

        Raises:
            FlopsError: ``service_not_found``, ``node_lost``, ``timeout``, or what the node answered.
        """
        with self._lock:
            service = self._records.services.get(service_id)
            if service is None:
                raise FlopsError(ErrorCode.SERVICE_NOT_FOUND, f"Service {service_id} does not exist.")
            node_id = service.spec.node_id
            session, node = self._sessions.get(node_id), self._records.nodes.get(node_id)
            if node is None:
                raise FlopsError(ErrorCode.NODE_LOST, f"The node that had {service_id} was removed.")
            if session is None:
                raise FlopsError(ErrorCode.NODE_LOST, f"Node {node.name}, which has {service_id}, is away.")
            tail_bytes = min(max(tail_bytes, 0), _MAX_TAIL_BYTES)
            request = self._log_requests.begin(node.id, service_id, after, tail_bytes)
            session.link.send(request.command)
        return self._log_requests.wait(request, node.name)

    def events(self, *, after: int) -> list[ClusterEvent]:
        """Events with a `seq` above `after`, in order."""
        return self._store.events(after=after, limit=_EVERYTHING)

    def forget_events(self, up_to: int) -> int:
        """Remove the events with a `seq` of `up_to` or less, which nobody will ask for again.

        In small steps, so that nodes which report meanwhile do not wait for the store. No line of an event
        log is taken in twice for it: the last line of each is kept with its service.
        """
        count = gone = self._store.forget_events(up_to, limit=_FORGET_AT_ONCE)
        while gone == _FORGET_AT_ONCE:
            gone = self._store.forget_events(up_to, limit=_FORGET_AT_ONCE)
            count += gone
        return count

    def on_event(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from any thread, whenever there are new events."""
        with self._lock:
            self._wakes.append(wake)

    # Connections of nodes

    def connect(self, hello: Hello, link: NodeLink, caller: Caller | None = None) -> NodeSession:
        """Accept a node's connection and send it `Welcome`; an earlier connection of the same node ends.

        Args:
            hello: what the node says first.
            link: our end of the connection.
            caller: who it is by its certificate, and which cluster it comes through.

        Raises:
            FlopsError: ``conflict`` for another protocol version, ``usage`` for a node without id or name,
                ``certificate_refused``, ``forbidden`` for addons that it was not invited for.
        """
        _check(hello)
        with self._changing():  # so that no node joins while it is removed
            caller = caller or Caller()
            certificate = self.admission.admit(caller, hello.node_id) if self.admission is not None else None
            cluster = certificate.cluster if certificate is not None else caller.cluster
            session = NodeSession(NodeId(hello.node_id), link, cluster, certificate)
            _check_addons(session, hello.addons, hello.name)
            self._drop(session.node_id, _replaced(hello))
            self._take_hello(session, hello)
        _log.info("node %s (%s) has joined", hello.name, hello.node_id)
        return session

    def receive(self, session: NodeSession, message: FromNode) -> None:
        """Take in a message. One of a connection that was replaced or given up is ignored.

        Raises:
            FlopsError: ``usage`` for a `Hello` of another node; whatever the store raises.
        """
        if isinstance(message, CommandResult):
            self._log_requests.answer(session.node_id, message)
            return
        with self._changing():
            if self._sessions.get(session.node_id) is not session:
                return
            self._heard_at_s[session.node_id] = self._clock.now_s()
            match message:
                case Heartbeat():
                    self._take_heartbeat(session, message)
                case ServiceChanged():
                    self._take_status(session, message.status)
                case ActorEventReport():
                    self._take_actor_event(session, message)
                case Hello():
                    self._refresh(session, message)
                case Goodbye():
                    self._lose(session.node_id, "was stopped", is_goodbye=True)

    def disconnect(self, session: NodeSession) -> None:
        """A connection has ended; its node counts as gone unless it is back in time."""
        with self._lock:
            if self._sessions.get(session.node_id) is session:
                del self._sessions[session.node_id]
                node = self._records.nodes[session.node_id]
                self._end(session, _lost(node))
                _log.info("the connection of node %s (%s) has ended", node.name, node.id)

    def tick(self) -> None:
        """Notice nodes that are silent for too long. To be called every `TICK_INTERVAL_S`.

        While this process itself stood still (a suspended machine, a clock that was set), no node was silent.
        """
        with self._changing():
            now_s = self._clock.now_s()
            pause_s = now_s - self._ticked_at_s
            self._ticked_at_s = now_s
            if not 0 <= pause_s <= _STALLED_AFTER_S:
                self._heard_at_s = {node_id: at_s + pause_s for node_id, at_s in self._heard_at_s.items()}
            for session in list(self._sessions.values()):
                if session.certificate is not None and now_s >= session.certificate.not_after_s:
                    self._drop(session.node_id, certificate_refused(session.node_id, "has expired"))
            silent = [n for n, at_s in self._heard_at_s.items() if now_s - at_s > NODE_LOST_AFTER_S]
            for node_id in silent:
                self._lose(node_id, f"was silent for {NODE_LOST_AFTER_S:g} s")

    # Under the lock

    def _refresh(self, session: NodeSession, hello: Hello) -> None:
        _check(hello)
        if hello.node_id != session.node_id:
            raise FlopsError(
                ErrorCode.USAGE, f"Node {session.node_id} said hello as {hello.node_id} on one connection."
            )
        self._take_hello(session, hello)

    def _take_hello(self, session: NodeSession, hello: Hello) -> None:
        now_s = self._clock.now_s()
        known = self._records.nodes.get(session.node_id)
        node = Node(
            id=session.node_id,
            name=hello.name,
            cluster=session.cluster,
            facts=hello.facts,
            load=known.load if known else NodeLoad(),
            addons=hello.addons,
            data_tags=hello.data_tags,
            is_connected=True,
            joined_at_s=known.joined_at_s if known else now_s,
            last_seen_s=now_s,
            clock_skew_s=self._records.skew_of(session.node_id, hello.clock_s, now_s),
        )
        self._records.put_node(node)
        self._heard_at_s[node.id] = now_s
        self._take_statuses(session, hello.services)
        reported = {status.service_id for status in hello.services if _is_there(status)}
        for service in self._records.services_of(node.id):
            if service.spec.id not in reported:
                self._records.put_status(service, status_when_missing(service, node.name))
        self._sessions[node.id] = session
        session.link.send(self._welcome(node.id))

    def _welcome(self, node_id: NodeId) -> Welcome:
        services = self._records.services_of(node_id)
        lines = self._records.lines
        return Welcome(
            cluster=self._records.nodes[node_id].cluster,
            services=tuple(self._with_key(service.spec) for service in services),
            stopping=tuple(service.spec.id for service in services if not may_run(service)),
            acknowledged={s.spec.id: lines[s.spec.id] for s in services if s.spec.id in lines},
        )

    def _with_key(self, spec: ServiceSpec) -> ServiceSpec:
        if self.admission is None:
            return spec
        return spec.model_copy(update={"key": self.admission.service_key(spec.id)})

    def _take_heartbeat(self, session: NodeSession, heartbeat: Heartbeat) -> None:
        _check_addons(session, heartbeat.addons, self._records.nodes[session.node_id].name)
        self._records.refresh_load(session.node_id, heartbeat.load, heartbeat.clock_s)
        node = self._records.nodes[session.node_id]
        changes = {"addons": heartbeat.addons, "data_tags": heartbeat.data_tags}
        self._records.put_node(node.model_copy(update=changes))
        self._take_statuses(session, heartbeat.services)

    def _take_statuses(self, session: NodeSession, statuses: Sequence[ServiceStatus]) -> None:
        for status in statuses:
            self._take_status(session, status)

    def _take_status(self, session: NodeSession, status: ServiceStatus) -> None:
        service = self._service_of(session, status.service_id)
        if service is not None:
            self._records.put_status(service, status_when_reported(service, status))
            self._records.refresh_usage(status)

    def _take_actor_event(self, session: NodeSession, report: ActorEventReport) -> None:
        service = self._service_of(session, report.service_id)
        if service is not None:
            last = self._records.append_line(service, report.line, report.event)
            session.link.send(Acknowledged(service_id=report.service_id, line=last))

    def _service_of(self, session: NodeSession, service_id: str) -> Service | None:
        service = self._records.services.get(ServiceId(service_id))
        if service is not None and service.spec.node_id == session.node_id:
            return service
        if self._sessions.get(session.node_id) is session:  # else the `Welcome` that follows says it
            session.link.send(RemoveService(service_id=service_id))
        return None

    def _lose(self, node_id: NodeId, why: str, *, is_goodbye: bool = False) -> None:
        # The node comes last: a kill, or a store that fails, in between leaves it to a later tick.
        node = self._records.nodes[node_id]
        for service in self._records.services_of(node_id):
            detail = f"Its node {node.name} {why}."
            self._records.put_status(service, status_when_node_lost(service, detail))
        changes = {"is_connected": False, "has_said_goodbye": is_goodbye}
        self._records.put_node(node.model_copy(update=changes))
        self._heard_at_s.pop(node_id, None)
        session = self._sessions.pop(node_id, None)
        if session is not None:
            self._end(session, _lost(node))
            session.link.close(f"the node {why}")
        _log.warning("node %s (%s) %s", node.name, node_id, why)

    def _drop(self, node_id: NodeId, error: FlopsError) -> None:
        """End a node's connection, if there is one, and tell it why."""
        session = self._sessions.pop(node_id, None)
        if session is not None:
            self._end(session, error)
            session.link.send(Refused(error=error.to_dict()))
            session.link.close(error.message)

    def _end(self, session: NodeSession, error: FlopsError) -> None:
        self._log_requests.fail_all(session.node_id, error)

    def _send(self, node_id: NodeId, message: FromCluster) -> None:
        session = self._sessions.get(node_id)
        if session is not None:
            session.link.send(message)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        wakes: list[Callable[[], None]] = []
        try:
            with self._lock:
                before = self._records.appended
                try:
                    yield
                finally:
                    if self._records.appended != before:
                        wakes = list(self._wakes)
        finally:
            for wake in wakes:
                wake()


def _check(hello: Hello) -> None:
    if hello.protocol != PROTOCOL_VERSION:
        raise FlopsError(
            ErrorCode.CONFLICT,
            f"Node {hello.name} speaks protocol version {hello.protocol},"
            f" this cluster version {PROTOCOL_VERSION}.",
            hint="Install the same FLOps version on the node and on the cluster.",
        )
    if not hello.node_id.strip() or not hello.name.strip():
        raise FlopsError(ErrorCode.USAGE, "The node sent no id or no name.")


def _check_addons(session: NodeSession, addons: Sequence[Addon], name: str) -> None:
    if session.certificate is not None:
        check_addons(session.certificate, {addon.name for addon in addons}, name)


def _is_there(status: ServiceStatus) -> bool:
    return not status.state.is_final


def _replaced(hello: Hello) -> FlopsError:
    return FlopsError(
        ErrorCode.CONFLICT,
        f"Another connection with the id of node {hello.name} ({hello.node_id}) was made.",
        hint="Two NodeEngines with copies of one home have the same id; remove node_id from one of them.",
    )


def _lost(node: Node) -> FlopsError:
    return FlopsError(ErrorCode.NODE_LOST, f"The connection of node {node.name} has ended.")
