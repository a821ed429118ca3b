"""What a cluster is made of: nodes with their facts, and services placed on them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, TypeVar

from pydantic import Field

from flops.core.clusters import DEFAULT_CLUSTER
from flops.core.ids import Digest, NodeId, ServiceId
from flops.core.model import Value
from flops.errors import ErrorCode, FlopsError

LEARNER_ADDON = "FLOps-learner"
IMAGE_BUILDER_ADDON = "image-builder"
CONTAINER_RUNTIME = "container"  # among `NodeFacts.runtimes`
NODE_LOST_AFTER_S = 8.0  # silence after which a node counts as gone; users see it within 10 s
HEARTBEAT_INTERVAL_S = 2.0
DEFAULT_PIDS = 2_048  # processes and threads of a service that asks for no limit
RESERVED_BYTES = 512 * 1024**2  # of memory, that no service gets; of less than 4 GiB, an eighth


class AddonState(StrEnum):
    """Health of an addon that is switched on; an addon that is off is not listed."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class Addon(Value):
    """An addon of a running node, with its health."""

    name: str
    state: AddonState
    detail: str = ""  # why it is unhealthy, in one sentence
    port: int = 0  # where what it runs listens, at the node's address; 0 for nowhere


class DataTag(Value):
    """What a node tells about the data of one tag; never the data itself."""

    name: str
    rows: int
    size_bytes: int
    columns: dict[str, str] = Field(default_factory=dict)  # column name -> Arrow type as text
    last_write_s: float = 0.0  # seconds since the epoch


class NodeFacts(Value):
    """What a node is: announced when it joins, refreshed when it changes."""

    hostname: str = ""
    address: str = "127.0.0.1"  # where others reach services of this node
    architecture: str = "x86_64"  # as `uname -m` prints it
    operating_system: str = ""
    python_version: str = ""
    flops_version: str = ""
    cpu_cores: int = 1
    memory_mb: int = 0
    disk_free_mb: int = 0
    gpus: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ("process",)
    limits: tuple[str, ...] = ()  # what it can enforce, as `Runtime.limits` names it
    limits_note: str = ""  # why not all of them


class NodeLoad(Value):
    """What changes from heartbeat to heartbeat."""

    cpu_percent: float = 0.0
    memory_percent: float = 0.0
    disk_free_mb: int = 0
    disk_total_mb: int = 0  # 0 for not known


class Node(Value):
    """A node as the cluster knows it."""

    id: NodeId
    name: str
    cluster: str = DEFAULT_CLUSTER
    facts: NodeFacts = NodeFacts()
    load: NodeLoad = NodeLoad()
    addons: tuple[Addon, ...] = ()
    data_tags: tuple[DataTag, ...] = ()
    is_connected: bool = False
    joined_at_s: float = 0.0
    last_seen_s: float = 0.0
    clock_skew_s: float | None = None  # how far its clock is ahead of the control plane's; None: not known
    has_said_goodbye: bool = False  # its NodeEngine was stopped on purpose

    def has_addon(self, name: str) -> bool:
        """Whether the addon is on and healthy."""
        return any(a.name == name and a.state is AddonState.HEALTHY for a in self.addons)

    def rows_of(self, tags: tuple[str, ...]) -> int:
        """Rows this node holds under any of the tags."""
        return sum(t.rows for t in self.data_tags if t.name in tags)


NodeType = TypeVar("NodeType", bound=Node)


def find_node(nodes: Sequence[NodeType], name: str) -> NodeType:
    """The node with a name or an id.

    Raises:
        FlopsError: ``node_not_found``; ``conflict`` when several nodes have the name.
    """
    found = [node for node in nodes if name in {node.id, node.name}]
    if not found:
        known = ", ".join(node.name for node in nodes) or "none has joined yet"
        raise FlopsError(ErrorCode.NODE_NOT_FOUND, f"There is no node {name!r}; there are: {known}.")
    if len(found) > 1:
        ids = ", ".join(f"{n.id} ({'connected' if n.is_connected else 'gone'})" for n in found)
        raise FlopsError(
            ErrorCode.CONFLICT, f"{len(found)} nodes are called {name}: {ids}.", hint="Give the id instead."
        )
    return found[0]


class ServiceKind(StrEnum):
    """What the platform runs on nodes."""

    BUILDER = "builder"
    AGGREGATOR = "aggregator"
    LEARNER = "learner"
    INFERENCE = "inference"
    MOCK_DATA_PROVIDER = "mock-data-provider"


class ServiceState(StrEnum):
    """Life of a service: pending → preparing → running → one of the final states."""

    PENDING = "pending"  # the node has not taken it yet
    PREPARING = "preparing"  # the node fetches code, builds the environment
    RUNNING = "running"
    RESTARTING = "restarting"  # ended, waits for its back-off
    COMPLETED = "completed"  # exit code 0
    FAILED = "failed"  # any other end that nobody asked for
    STOPPED = "stopped"  # ended because it was asked to
    LOST = "lost"  # its node is gone; becomes what the node reports when it is back

    @property
    def is_final(self) -> bool:
        """Whether the service will never run again."""
        return self in {ServiceState.COMPLETED, ServiceState.FAILED, ServiceState.STOPPED}


class Resources(Value):
    """Limits of a service; None is unlimited."""

    memory_mb: int | None = None
    vcpus: float | None = None
    pids: int | None = None
    storage_mb: int | None = None  # of its work folder
    vgpus: int = 0  # GPUs of the node that it uses

    def bounded(self, machine_bytes: int | None) -> Resources:
        """The same, with limits where nothing is asked for: so that a service is ended, and not its node.

        Args:
            machine_bytes: memory of the machine, of which no service gets all; None for not known.
        """
        memory_mb = self.memory_mb
        if machine_bytes is not None:
            most_mb = (machine_bytes - min(RESERVED_BYTES, machine_bytes // 8)) // 1024**2
            memory_mb = most_mb if memory_mb is None else min(memory_mb, most_mb)
        pids = DEFAULT_PIDS if self.pids is None else self.pids
        return self.model_copy(update={"memory_mb": memory_mb, "pids": pids})


class ServiceSpec(Value):
    """Everything a node needs to run a service; never changes once made.

    `config` is the kind's own configuration, one of the models in `flops.wire.services`.
    """

    id: ServiceId
    project_id: str  # the project or mock-data id it belongs to
    kind: ServiceKind
    node_id: NodeId
    config: dict[str, Any] = Field(default_factory=dict)
    bundle: Digest | None = None  # tar.gz blob unpacked for the service: the ML repository, or a model
    environment: Digest | None = None  # lock blob of the project's environment
    model_environment: Digest | None = None  # lock blob of the environment that saves and serves models
    image: str = ""  # OCI image with all of that, as ``name@sha256:…``; "" to run from environments
    resources: Resources = Resources()
    max_restarts: int = 0  # restarts by the node after a failure, with back-off
    key: str = ""  # shown to the cluster's port, if that is encrypted; put in when its node is told
    max_unheard_restarts: int | None = None  # while it has never told that it listens; None: max_restarts


class ServiceUsage(Value):
    """What a running service uses, all its processes together."""

    memory_mb: float = 0.0
    cpu_percent: float = 0.0
    processes: int = 0


class ServiceStatus(Value):
    """The state of a service as its node reports it."""

    service_id: ServiceId
    state: ServiceState
    detail: str = ""  # what it is doing or why it ended, one sentence
    exit_code: int | None = None  # -9 for signal 9
    error: dict[str, Any] | None = None  # `FlopsError.to_dict()` of a failure
    restarts: int = 0
    usage: ServiceUsage = ServiceUsage()


class Service(Value):
    """A service as the cluster knows it: what was asked for, and what is."""

    spec: ServiceSpec
    status: ServiceStatus
    should_run: bool = True  # false once a stop was asked for
    created_at_s: float = 0.0
    updated_at_s: float = 0.0


class ClusterEvent(Value):
    """Something that happened in a cluster, in the order of `seq`; delivered at least once.

    `kind` is ``service`` (payload: `ServiceStatus`), ``actor`` (payload: an event of
    `flops.wire.actor_events`, emitted by the service's own process) or ``node`` (payload:
    ``{"node_id", "is_connected"}``).
    """

    seq: int
    kind: str
    time_s: float
    project_id: str = ""
    service_id: str = ""
    node_id: str = ""
    line: int = 0  # ``actor``: line of the service's event log, from 1
    payload: dict[str, Any] = Field(default_factory=dict)
