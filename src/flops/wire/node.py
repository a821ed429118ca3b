"""Messages between a node and its cluster, on the node's one WebSocket connection (JSON text frames).

The node dials ``ws://<cluster>:10100/api/node/link``, says `Hello`, and gets `Welcome` or `Refused`. Then
both sides send messages until the connection ends; the node connects again by itself and says `Hello`
anew. Reports carry what is needed to take a repeated one for what it is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from flops.core.cluster import Addon, DataTag, NodeFacts, NodeLoad, ServiceSpec, ServiceStatus
from flops.core.model import Value
from flops.core.output import Output

PROTOCOL_VERSION = 1


class Hello(Value):
    """Node: who I am, what I have, what I run. First message of every connection."""

    type: Literal["hello"] = "hello"
    protocol: int = PROTOCOL_VERSION
    node_id: str
    name: str
    facts: NodeFacts
    addons: tuple[Addon, ...] = ()
    data_tags: tuple[DataTag, ...] = ()
    services: tuple[ServiceStatus, ...] = ()
    clock_s: float = 0.0  # the node's wall clock, seconds since the epoch; 0 when not told


class Heartbeat(Value):
    """Node, every `HEARTBEAT_INTERVAL_S` and on each change: what changes."""

    type: Literal["heartbeat"] = "heartbeat"
    load: NodeLoad = NodeLoad()
    addons: tuple[Addon, ...] = ()
    data_tags: tuple[DataTag, ...] = ()
    services: tuple[ServiceStatus, ...] = ()
    clock_s: float = 0.0  # as in `Hello`


class ServiceChanged(Value):
    """Node: a service's state changed. Sent at once; the heartbeat repeats it."""

    type: Literal["service_changed"] = "service_changed"
    status: ServiceStatus


class ActorEventReport(Value):
    """Node: line `line` (from 1) of a service's event log. Sent again until acknowledged.

    Lines come in order without a gap; one beyond a gap is answered by `Acknowledged` with the last line that
    is stored, and is to be sent again after the missing ones.
    """

    type: Literal["actor_event"] = "actor_event"
    service_id: str
    line: int
    event: dict[str, Any]


class CommandResult(Value):
    """Node: answer to a `FetchLogs`."""

    type: Literal["command_result"] = "command_result"
    request_id: str
    output: Output = Output()
    error: dict[str, Any] | None = None


class Goodbye(Value):
    """Node: I stop on purpose."""

    type: Literal["goodbye"] = "goodbye"


class Welcome(Value):
    """Cluster: accepted. `services` are those this node should have; any other it has is to be removed.

    A service in `services` and not in `stopping` should run: the node starts it unless it runs. One that is
    in `stopping` must not run: it was asked to stop, or has ended. The node ends it if it runs, never starts
    it, and keeps its files (its output, its event log) until it is no longer listed.

    `acknowledged` is, per service, the last line of its event log that the cluster has stored.
    """

    type: Literal["welcome"] = "welcome"
    cluster: str
    services: tuple[ServiceSpec, ...] = ()
    stopping: tuple[str, ...] = ()  # of these, the ones that must not run
    acknowledged: dict[str, int] = Field(default_factory=dict)


class Refused(Value):
    """Cluster: not accepted; `FlopsError.to_dict()`. The node tells its operator and tries again later."""

    type: Literal["refused"] = "refused"
    error: dict[str, Any]


class StartService(Value):
    """Cluster: run this service. One that exists already is left alone."""

    type: Literal["start_service"] = "start_service"
    spec: ServiceSpec


class StopService(Value):
    """Cluster: end this service with all its children; its files stay."""

    type: Literal["stop_service"] = "stop_service"
    service_id: str


class RemoveService(Value):
    """Cluster: end this service and remove its files."""

    type: Literal["remove_service"] = "remove_service"
    service_id: str


class FetchLogs(Value):
    """Cluster: send what follows the place `after` in this service's output; its end when it is None."""

    type: Literal["fetch_logs"] = "fetch_logs"
    request_id: str
    service_id: str
    after: int | None = None
    tail_bytes: int = 65_536  # at most


class Acknowledged(Value):
    """Cluster: lines of the service's event log up to `line` are stored."""

    type: Literal["acknowledged"] = "acknowledged"
    service_id: str
    line: int


FromNode = Annotated[
    Hello | Heartbeat | ServiceChanged | ActorEventReport | CommandResult | Goodbye,
    Field(discriminator="type"),
]
FromCluster = Annotated[
    Welcome | Refused | StartService | StopService | RemoveService | FetchLogs | Acknowledged,
    Field(discriminator="type"),
]
FROM_NODE: TypeAdapter[FromNode] = TypeAdapter(FromNode)
FROM_CLUSTER: TypeAdapter[FromCluster] = TypeAdapter(FromCluster)
