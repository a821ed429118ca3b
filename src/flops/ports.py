"""What the processes need from the outside world, as protocols. Adapters implement them; wiring joins them.

Every port has a contract suite in `flops.testing.contracts`, and every adapter passes it. Failure is raised,
never returned: all methods raise `FlopsError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from flops.core.cluster import (
    ClusterEvent,
    DataTag,
    Node,
    NodeFacts,
    NodeLoad,
    Resources,
    Service,
    ServiceSpec,
    ServiceStatus,
    ServiceUsage,
)
from flops.core.effects import Effect
from flops.core.ids import Digest, EnvironmentKey, NodeId, ProjectId, ServiceId
from flops.core.output import Output
from flops.core.project import Environment, MockData, Project, ProjectEvent, Repository
from flops.core.reach import Reach


class Clock(Protocol):
    """Time. Tests pass one that they move by hand."""

    def now_s(self) -> float:
        """Seconds since the epoch."""
        ...


class ProjectStore(Protocol):
    """Projects, their history and their pending effects. Stores save and load; they never decide."""

    def add(self, project: Project, events: Sequence[ProjectEvent], effects: Sequence[Effect]) -> None:
        """Store a new project with its first history and effects, all or nothing.

        Raises: FlopsError: ``conflict`` when the id exists.
        """
        ...

    def save(
        self,
        project: Project,
        events: Sequence[ProjectEvent],
        effects: Sequence[Effect],
        *,
        cursor: int | None = None,
    ) -> None:
        """Store a changed project, append history and effects, and move the cluster cursor: one transaction.

        Effects whose key is already stored (pending or done) are not added again.

        Raises: FlopsError: ``conflict`` unless the stored version is ``project.version - 1``.
        """
        ...

    def get(self, project_id: ProjectId) -> Project:
        """Load a project.

        Raises: FlopsError: ``project_not_found``.
        """
        ...

    def all(self) -> list[Project]:
        """All projects, newest first."""
        ...

    def delete(self, project_id: ProjectId) -> None:
        """Remove a project with its history and effects; nothing happens when it does not exist."""
        ...

    def history(self, project_id: ProjectId, *, after: int = 0) -> list[ProjectEvent]:
        """The project's events with a `seq` above `after`, in order."""
        ...

    def pending_effects(self) -> list[Effect]:
        """Effects that are not done, oldest first."""
        ...

    def finish_effect(self, key: str) -> None:
        """Mark an effect as done; doing it twice changes nothing."""
        ...

    def cursor(self) -> int:
        """`seq` of the last cluster event that has been taken in."""
        ...

    def move_cursor(self, seq: int) -> None:
        """Set the cursor without touching a project."""
        ...

    def put_environment(self, environment: Environment) -> None:
        """Remember a locked environment under its key; a later one replaces it."""
        ...

    def find_environment(self, key: EnvironmentKey) -> Environment | None:
        """The locked environment with this key, if one is known."""
        ...

    def environments(self) -> list[Environment]:
        """All locked environments that are known."""
        ...

    def forget_environments(self) -> int:
        """Forget all locked environments; returns how many were known."""
        ...

    def forget_finished_effects(self, project_id: ProjectId) -> None:
        """Remove the project's effects that are done; their keys may be stored again."""
        ...

    def put_mock_data(self, mock_data: MockData) -> None:
        """Store a mock data provider's record, replacing an earlier one."""
        ...

    def list_mock_data(self) -> list[MockData]:
        """All mock data records, newest first."""
        ...

    def reset(self) -> None:
        """Forget everything but the cursor."""
        ...


class ClusterStore(Protocol):
    """What a cluster orchestrator must not forget: nodes, services, and its ordered log of events."""

    def put_node(self, node: Node) -> None:
        """Store a node, replacing an earlier record of the same id."""
        ...

    def nodes(self) -> list[Node]:
        """All nodes that have ever joined and were not removed, in the order they joined."""
        ...

    def remove_node(self, node_id: str) -> None:
        """Forget a node; nothing happens when it is unknown."""
        ...

    def put_service(self, service: Service) -> None:
        """Store a service, replacing an earlier record of the same id."""
        ...

    def services(self) -> list[Service]:
        """All services that were not removed, oldest first."""
        ...

    def remove_service(self, service_id: ServiceId) -> None:
        """Forget a service; nothing happens when it is unknown."""
        ...

    def append_event(
        self,
        event: ClusterEvent,
        *,
        dedup_key: str | None = None,
        service: Service | None = None,
        node: Node | None = None,
    ) -> ClusterEvent | None:
        """Append an event and return it with its `seq`; None when `dedup_key` was appended before.

        `service` and `node` are what the event changed: stored in the same transaction, and like the event
        not at all when `dedup_key` was appended before. `seq` grows strictly, also over restarts.
        """
        ...

    def events(self, *, after: int = 0, limit: int = 1000) -> list[ClusterEvent]:
        """Events with a `seq` above `after`, in order."""
        ...

    def last_lines(self) -> dict[str, int]:
        """Per service that was not removed, the highest `line` among its ``actor`` events."""
        ...

    def forget_events(self, up_to: int, *, limit: int = 1000) -> int:
        """Remove the oldest events with a `seq` of `up_to` or less, `limit` at most; returns how many.

        Their keys are forgotten with them; `last_lines` and the growth of `seq` are not touched.
        """
        ...


class Orchestrator(Protocol):
    """Nodes and services of a cluster. All commands are idempotent."""

    def nodes(self) -> list[Node]:
        """All nodes of the cluster, connected or not."""
        ...

    def remove_node(self, node_id: NodeId, *, is_forced: bool = False) -> None:
        """Forget a node that is gone; if forced, also one with services: they have failed then.

        Raises: FlopsError: ``node_not_found``; ``conflict`` for a connected node, or one with services.
        """
        ...

    def services(self, project_id: str | None = None) -> list[Service]:
        """All services, or those of one project."""
        ...

    def start_service(self, spec: ServiceSpec) -> None:
        """Have a node run a service. The same id again changes nothing; a node that is away gets it later.

        Raises: FlopsError: ``node_not_found``.
        """
        ...

    def stop_service(self, service_id: ServiceId) -> None:
        """Have a service ended, with all its children. An unknown or ended service is no error."""
        ...

    def remove_service(self, service_id: ServiceId) -> None:
        """Stop a service and have its files removed from its node. An unknown service is no error."""
        ...

    def service_logs(
        self, service_id: ServiceId, *, after: int | None = None, tail_bytes: int = 65_536
    ) -> Output:
        """What follows a place in a service's output, or its end when `after` is None; `tail_bytes` at most.

        Raises: FlopsError: ``service_not_found``, ``node_lost``, ``timeout``.
        """
        ...

    def events(self, *, after: int) -> list[ClusterEvent]:
        """Events with a `seq` above `after`, in order."""
        ...

    def forget_events(self, up_to: int) -> int:
        """Remove the events with a `seq` of `up_to` or less, which nobody will ask for again."""
        ...

    def on_event(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from any thread, whenever there are new events."""
        ...


class Blobs(Protocol):
    """Immutable bytes by their SHA-256: code bundles, lock files, models."""

    def put(self, data: bytes) -> Digest:
        """Store bytes durably; the same bytes again change nothing."""
        ...

    def get(self, digest: Digest) -> bytes:
        """Load bytes.

        Raises: FlopsError: ``not_found``, or ``internal`` when the stored bytes are damaged.
        """
        ...

    def has(self, digest: Digest) -> bool:
        """Whether the bytes are stored."""
        ...


class BlobUpload(Protocol):
    """Bytes that arrive piece by piece; nothing of them is visible before `commit`."""

    def write(self, chunk: bytes) -> None:
        """Take in the next bytes.

        Raises: FlopsError: ``disk_full``.
        """
        ...

    def commit(self, expected: Digest) -> None:
        """Store the bytes durably; on failure nothing is stored.

        Raises: FlopsError: ``upload_incomplete`` when their digest is another one; ``disk_full``.
        """
        ...

    def discard(self) -> None:
        """Forget the bytes; nothing happens after `commit`."""
        ...


class BlobStreams(Blobs, Protocol):
    """Blobs that are served to others, and too large to be held in memory."""

    def upload(self) -> BlobUpload:
        """Begin an upload."""
        ...

    def size(self, digest: Digest) -> int:
        """Size in bytes.

        Raises: FlopsError: ``not_found``.
        """
        ...

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """The bytes, piece by piece, verified before the first piece is given.

        Raises: FlopsError: ``not_found``, or ``internal`` when the stored bytes are damaged.
        """
        ...


class MLRepos(Protocol):
    """Git repositories with training code."""

    def resolve(self, url: str, ref: str | None, flavor: str, *, needs_gpu: bool = False) -> Repository:
        """Pin a reference to a commit, check the repository contract, and store the tree as a bundle.

        Raises:
            FlopsError: ``repo_unreachable``, ``repo_ref_not_found``, ``repo_contract_broken``,
                ``dependencies_invalid``, ``disk_full``.
        """
        ...


class Environments(Protocol):
    """Locked virtual environments on this machine, by the digest of their lock."""

    def lock(
        self, repo: Path, flavor: str, report: Callable[[str], None], *, needs_gpu: bool = False
    ) -> tuple[str, str, Environment]:
        """Resolve a repository's dependency file; returns both locks' text, and the environment.

        Args:
            repo: folder of the unpacked repository.
            flavor: the MLflow flavor whose libraries are needed to save the model.
            report: is told each step, in one sentence.
            needs_gpu: whether learners use GPUs; else CUDA is kept out.

        Raises: FlopsError: ``repo_contract_broken``, ``dependencies_invalid``, ``dependencies_unresolvable``,
            ``environment_build_failed``, ``unreachable``, ``timeout``, ``disk_full``.
        """
        ...

    def materialise(self, lock: str, report: Callable[[str], None]) -> Path:
        """Build the environment of a lock unless it exists; returns its Python interpreter.

        Raises: FlopsError: ``environment_build_failed``, ``unreachable``, ``timeout``, ``disk_full``.
        """
        ...


class Runtime(Protocol):
    """Processes of services on this machine. They outlive the process that started them."""

    def start(
        self,
        service_id: ServiceId,
        argv: Sequence[str],
        env: Mapping[str, str],
        work_dir: Path,
        resources: Resources,
        reach: Reach | None = None,
    ) -> None:
        """Start a service's process with limits; an already running one is left alone.

        It is confined to `work_dir` and `reach`, as far as `limits` tells; without a reach it is not.

        Raises:
            FlopsError: ``service_failed``, ``disk_full`` or ``file_unreadable`` when it cannot be started.
        """
        ...

    def status(self, service_id: ServiceId) -> ServiceStatus | None:
        """The service's state, also after a restart of the caller; None when it was never started."""
        ...

    def stop(self, service_id: ServiceId, *, grace_s: float = 5.0) -> None:
        """End the service with all its children: first politely, after `grace_s` for good."""
        ...

    def remove(self, service_id: ServiceId) -> None:
        """Stop the service and forget it, with its output."""
        ...

    def running(self) -> list[ServiceId]:
        """Every service that runs now, also ones that an earlier process started."""
        ...

    def usage(self, service_id: ServiceId) -> ServiceUsage:
        """What the service uses now; zeros when it is not running."""
        ...

    def output(self, service_id: ServiceId, *, tail_bytes: int = 65_536) -> str:
        """The end of the service's output, also after its end; "" when there is none."""
        ...

    def read_output(self, service_id: ServiceId, after: int | None, limit_bytes: int) -> Output:
        """What follows a place in the service's output, over restarts; its end when `after` is None."""
        ...

    def limits(self) -> tuple[tuple[str, ...], str]:
        """Which limits can be enforced here (memory, cpu, pids, files, network, signals); why not all."""
        ...


class Host(Protocol):
    """This machine."""

    def facts(self) -> NodeFacts:
        """What the machine is; `limits` are left to the runtime."""
        ...

    def load(self) -> NodeLoad:
        """What it is doing right now; quick."""
        ...


class DataCatalog(Protocol):
    """What the ML data server of this node holds; never the data itself."""

    def tags(self) -> list[DataTag]:
        """Every tag with its rows, bytes, columns and last write.

        Raises: FlopsError: ``unreachable`` when the data server does not answer.
        """
        ...
