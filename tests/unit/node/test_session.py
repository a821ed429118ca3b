"""What a node says and obeys on one connection, with the cluster played by the test."""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from flops.core.cluster import (
    Addon,
    AddonState,
    DataTag,
    NodeFacts,
    NodeLoad,
    Resources,
    ServiceKind,
    ServiceSpec,
    ServiceState,
    ServiceStatus,
    ServiceUsage,
)
from flops.core.ids import Digest, NodeId, ServiceId
from flops.core.output import Output, piece_of
from flops.core.project import Environment
from flops.core.reach import Reach
from flops.errors import ErrorCode, FlopsError
from flops.node.bundles import BundleStore
from flops.node.preparation import NodeSite, Preparer
from flops.node.session import NodeView, Session
from flops.node.supervisor import Supervisor
from flops.testing import waiting
from flops.testing.growth import elements
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

S1 = ServiceId("builder-p1")


class PlayedConnection:
    """Keeps what the node says; gives what the test has put."""

    def __init__(self) -> None:
        self.said: list[FromNode] = []
        self.waiting: deque[FromCluster] = deque()

    def send(self, message: FromNode) -> None:
        self.said.append(message)

    def receive(self, timeout_s: float) -> FromCluster | None:
        return self.waiting.popleft() if self.waiting else None

    def close(self) -> None:
        self.waiting.clear()

    def of(self, kind: type[FromNode]) -> list[FromNode]:
        return [message for message in self.said if isinstance(message, kind)]


class MemoryRuntime:
    """A runtime in memory: services run until the test or `stop` ends them."""

    def __init__(self) -> None:
        self.statuses: dict[str, ServiceStatus] = {}
        self.work_dirs: dict[str, Path] = {}

    def start(
        self,
        service_id: ServiceId,
        argv: Sequence[str],
        env: Mapping[str, str],
        work_dir: Path,
        resources: Resources,
        reach: Reach | None = None,
    ) -> None:
        self.work_dirs[service_id] = work_dir
        self.statuses[service_id] = ServiceStatus(service_id=service_id, state=ServiceState.RUNNING)

    def finish(self, service_id: ServiceId, state: ServiceState, exit_code: int) -> None:
        self.statuses[service_id] = ServiceStatus(service_id=service_id, state=state, exit_code=exit_code)

    def status(self, service_id: ServiceId) -> ServiceStatus | None:
        return self.statuses.get(service_id)

    def stop(self, service_id: ServiceId, *, grace_s: float = 5.0) -> None:
        if service_id in self.running():
            self.finish(service_id, ServiceState.STOPPED, -15)

    def remove(self, service_id: ServiceId) -> None:
        self.statuses.pop(service_id, None)

    def running(self) -> list[ServiceId]:
        return [ServiceId(i) for i, s in self.statuses.items() if s.state is ServiceState.RUNNING]

    def usage(self, service_id: ServiceId) -> ServiceUsage:
        return ServiceUsage(processes=1)

    def output(self, service_id: ServiceId, *, tail_bytes: int = 65_536) -> str:
        return self.read_output(service_id, None, tail_bytes).text

    def read_output(self, service_id: ServiceId, after: int | None, limit_bytes: int) -> Output:
        text = b"0123456789"
        return piece_of(
            lambda start, end: text[start:end], 0, len(text), after=after, limit_bytes=limit_bytes
        )

    def limits(self) -> tuple[tuple[str, ...], str]:
        return (), "none"


class NoEnvironments:
    def lock(
        self, repo: Path, flavor: str, report: Callable[[str], None], *, needs_gpu: bool = False
    ) -> tuple[str, str, Environment]:
        raise NotImplementedError

    def materialise(self, lock: str, report: Callable[[str], None]) -> Path:
        raise NotImplementedError


until = functools.partial(waiting.until, timeout_s=10)


class World:
    """A session and what surrounds it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.runtime = MemoryRuntime()
        self.is_reachable = True
        self.addons: tuple[Addon, ...] = ()
        self.tags: tuple[DataTag, ...] = ()
        self.supervisor = self._make_supervisor()
        self.connect()

    def _make_supervisor(self) -> Supervisor:
        site = NodeSite(
            name="n",
            host="127.0.0.1",
            blobs_url="http://x",
            kit_dir=self.home,
            environments_dir=self.home,
            images_dir=self.home,
            inherited={"PATH": "/bin", "SECRET": "x"},
        )
        bundles = BundleStore(self.home / "bundles", self._fetch)
        preparer = Preparer(site, NoEnvironments(), bundles, self._fetch, self._access)
        return Supervisor(self.home / "services", preparer, self.runtime)

    def _fetch(self, digest: Digest, path: Path) -> None:
        raise NotImplementedError

    def _access(self, _spec: ServiceSpec) -> tuple[str, str]:
        if not self.is_reachable:
            raise FlopsError(ErrorCode.UNREACHABLE, "not yet")
        return "", ""

    def connect(self) -> None:
        self.connection = PlayedConnection()
        view = NodeView(
            node_id="id",
            name="n",
            facts=NodeFacts,
            load=NodeLoad,
            addons=lambda: self.addons,
            data_tags=lambda: self.tags,
            clock_s=lambda: 1_000.0,
        )
        self.session = Session(self.connection, view, self.supervisor)

    def restart(self) -> None:
        """A new daemon on the same home."""
        self.supervisor = self._make_supervisor()
        self.supervisor.adopt()
        self.connect()

    def open(self, *specs: ServiceSpec, stopping: tuple[str, ...] = (), **acknowledged: int) -> Hello:
        lines = {name.replace("_", "-"): line for name, line in acknowledged.items()}
        self.connection.waiting.append(
            Welcome(cluster="c", services=specs, stopping=stopping, acknowledged=lines)
        )
        self.session.open()
        hello = self.connection.said[0]
        assert isinstance(hello, Hello)
        return hello

    def order(self, *messages: FromCluster) -> None:
        """Serve until the messages are obeyed."""
        self.connection.waiting.extend(messages)
        self.session.serve(lambda: not self.connection.waiting and len(self.connection.said) > 0)
        self.session.report()

    def state(self) -> ServiceState | None:
        status = self.supervisor.statuses().get(S1)
        return None if status is None else status.state

    def tell(self, *messages: str) -> None:
        with self.supervisor.events_file(S1).open("a") as file:
            for message in messages:
                file.write(json.dumps({"kind": "progress", "time_s": 0.0, "message": message}) + "\n")

    def told_states(self) -> list[ServiceState]:
        return [m.status.state for m in self.connection.said if isinstance(m, ServiceChanged)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.supervisor.stop_all("The test is over.")


def spec(service_id: str = S1) -> ServiceSpec:
    return ServiceSpec(
        id=ServiceId(service_id), project_id="p1", kind=ServiceKind.BUILDER, node_id=NodeId("id")
    )


def started(world: World) -> None:
    world.open(spec())
    until(lambda: world.state() is ServiceState.RUNNING)
    world.session.report()


def test_hello_comes_first(world: World) -> None:
    world.addons = (Addon(name="FLOps-learner", state=AddonState.HEALTHY),)
    hello = world.open()
    assert (hello.node_id, hello.name, hello.addons) == ("id", "n", world.addons)


def test_a_refusal_is_raised(world: World) -> None:
    world.connection.waiting.append(Refused(error=FlopsError(ErrorCode.CONFLICT, "too old").to_dict()))
    with pytest.raises(FlopsError, match="too old"):
        world.session.open()


def test_silence_is_a_time_out(world: World) -> None:
    with pytest.raises(FlopsError) as caught:
        world.session.open()
    assert caught.value.code is ErrorCode.TIMEOUT


def test_a_service_is_started_once(world: World) -> None:
    world.open()
    world.order(StartService(spec=spec()), StartService(spec=spec()))
    until(lambda: world.state() is ServiceState.RUNNING)
    world.session.report()
    assert world.told_states()[-1] is ServiceState.RUNNING
    assert world.runtime.running() == [S1]


def test_changes_are_told_once(world: World) -> None:
    started(world)
    count = len(world.told_states())
    world.session.report()
    assert len(world.told_states()) == count


def test_events_are_told_before_the_end(world: World) -> None:
    started(world)
    world.tell("a", "b")
    world.runtime.finish(S1, ServiceState.COMPLETED, 0)
    until(lambda: world.state() is ServiceState.COMPLETED)
    world.session.report()
    reports = world.connection.of(ActorEventReport)
    assert [(m.line, m.event["message"]) for m in reports if isinstance(m, ActorEventReport)] == [
        (1, "a"),
        (2, "b"),
    ]
    assert ServiceState.COMPLETED not in world.told_states()
    world.order(Acknowledged(service_id=S1, line=2))
    assert world.told_states()[-1] is ServiceState.COMPLETED


def test_a_new_daemon_goes_on_with_the_line_that_is_missing(world: World) -> None:
    started(world)
    world.tell("a", "b")
    world.runtime.finish(S1, ServiceState.COMPLETED, 0)
    until(lambda: world.state() is ServiceState.COMPLETED)
    world.restart()
    hello = world.open(spec(), builder_p1=1)
    assert [s.state for s in hello.services] == [ServiceState.RUNNING]
    world.session.report()
    (report,) = world.connection.of(ActorEventReport)
    assert isinstance(report, ActorEventReport)
    assert report.line == 2
    until(lambda: world.state() is ServiceState.COMPLETED)
    world.order(Acknowledged(service_id=S1, line=2))
    assert world.told_states() == [ServiceState.COMPLETED]
    assert world.runtime.running() == []


def test_a_new_daemon_takes_over_what_runs(world: World) -> None:
    started(world)
    world.restart()
    until(lambda: world.state() is ServiceState.RUNNING)
    assert world.open(spec()).services[0].state is ServiceState.RUNNING
    world.runtime.finish(S1, ServiceState.FAILED, 3)
    until(lambda: world.state() is ServiceState.FAILED)


def test_what_ended_while_no_daemon_was_there_is_told(world: World) -> None:
    started(world)
    world.supervisor = world._make_supervisor()  # the old one is dead and sees nothing
    world.runtime.finish(S1, ServiceState.FAILED, 3)
    world.supervisor.adopt()
    until(lambda: world.state() is ServiceState.FAILED)


def test_what_was_stopped_with_the_node_runs_again(world: World) -> None:
    started(world)
    world.supervisor.stop_all("Its node was stopped.")
    assert world.state() is ServiceState.STOPPED
    world.restart()
    assert world.open(spec()).services[0].state is ServiceState.STOPPED
    until(lambda: world.state() is ServiceState.RUNNING)


def test_what_must_not_run_is_ended_and_kept(world: World) -> None:
    started(world)
    world.order(StopService(service_id=S1))
    until(lambda: world.state() is ServiceState.STOPPED)
    world.connect()
    world.open(spec(), stopping=(S1,))
    assert world.runtime.running() == []
    assert world.supervisor.ids() == [S1]


def test_a_stop_that_was_missed_is_caught_up(world: World) -> None:
    started(world)
    world.connect()
    world.open(spec(), stopping=(S1,))
    until(lambda: world.state() is ServiceState.STOPPED)
    assert world.runtime.running() == []


def test_what_is_not_listed_is_removed(world: World) -> None:
    started(world)
    world.connect()
    world.open()
    world.supervisor.join()
    assert world.supervisor.ids() == []
    assert list((world.home / "services").iterdir()) == []


def test_remove_removes(world: World) -> None:
    started(world)
    world.order(RemoveService(service_id=S1), RemoveService(service_id="unknown"))
    world.supervisor.join()
    assert world.runtime.statuses == {}
    assert list((world.home / "services").iterdir()) == []


def test_nothing_is_remembered_of_services_that_were_removed(world: World) -> None:
    world.open()
    for number in range(20):
        name = ServiceId(f"builder-{number}")
        world.order(StartService(spec=spec(name)))
        until(lambda: bool(world.runtime.running()))
        world.session.report()
        world.supervisor.statuses(with_usage=True)
        world.order(RemoveService(service_id=name))
        world.supervisor.join()
    world.order()
    world.supervisor.digests_in_use()
    assert world.runtime.statuses == {}
    held = elements(world.session, world.supervisor)
    known = {"Session._told", "Session._readers", "Session._acknowledged", "Supervisor._runners"}
    assert known | {"Supervisor._removals", "Supervisor._usages", "DiskGuard._sizes"} <= held.keys()
    grown = {name for name, count in held.items() if count >= 20}
    assert {name.partition("[")[0] for name in grown} <= {"PlayedConnection.said"}


def test_a_service_that_waits_is_stopped_at_once(world: World) -> None:
    world.is_reachable = False
    world.open(spec())
    until(lambda: "not yet" in world.supervisor.statuses()[S1].detail)
    world.supervisor.stop(S1)
    assert world.state() is ServiceState.STOPPED


def test_a_service_that_waits_runs_when_it_can(world: World) -> None:
    world.is_reachable = False
    world.open(spec())
    until(lambda: "not yet" in world.supervisor.statuses()[S1].detail)
    world.is_reachable = True
    until(lambda: world.state() is ServiceState.RUNNING)


def test_what_was_being_prepared_waits_for_the_cluster(world: World) -> None:
    world.is_reachable = False
    world.open(spec())
    until(lambda: world.supervisor.ids() == [S1] and world.state() is ServiceState.PREPARING)
    until((world.home / "services" / S1 / "spec.json").exists)
    world.supervisor.stop(S1)  # the daemon is dead
    world.is_reachable = True
    (world.home / "services" / S1 / "status.json").unlink(missing_ok=True)
    world.restart()
    assert world.state() is ServiceState.PREPARING
    assert world.runtime.running() == []
    world.open(spec())
    until(lambda: world.state() is ServiceState.RUNNING)


def test_the_output_is_sent(world: World) -> None:
    started(world)
    world.order(
        FetchLogs(request_id="r1", service_id=S1, tail_bytes=3),
        FetchLogs(request_id="r2", service_id="unknown"),
        FetchLogs(request_id="r3", service_id=S1, after=4, tail_bytes=3),
    )
    first, second, third = world.connection.of(CommandResult)
    assert isinstance(first, CommandResult)
    assert isinstance(second, CommandResult)
    assert isinstance(third, CommandResult)
    assert (first.request_id, first.output.text) == ("r1", "789")
    assert third.output == Output(text="456", start=4, end=7, total=10)
    assert second.error is not None
    assert second.error["code"] == ErrorCode.SERVICE_NOT_FOUND.value


def test_a_change_of_data_is_told_at_once(world: World) -> None:
    world.open()
    world.session.report()
    count = len(world.connection.of(Heartbeat))
    world.tags = (DataTag(name="t", rows=3, size_bytes=1),)
    world.session.report()
    beats = world.connection.of(Heartbeat)
    assert len(beats) == count + 1
    assert isinstance(beats[-1], Heartbeat)
    assert beats[-1].data_tags == world.tags


def test_goodbye_comes_after_the_last_states(world: World) -> None:
    started(world)
    world.supervisor.stop_all("Its node was stopped.")
    world.session.say_goodbye(timeout_s=1)
    assert world.told_states()[-1] is ServiceState.STOPPED
    assert isinstance(world.connection.said[-1], Goodbye)


def test_an_id_that_is_a_path_is_not_started(world: World) -> None:
    world.open(spec("../x"))
    world.order(StartService(spec=spec("a/b")))
    assert world.supervisor.ids() == []


def test_a_folder_without_a_service_is_removed(world: World) -> None:
    (world.home / "services" / "half").mkdir(parents=True)
    world.restart()
    assert list((world.home / "services").iterdir()) == []
