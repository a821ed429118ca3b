"""Whole histories of projects: whatever comes twice, late, again or never before a kill, each one ends well.

The real engine runs without its threads: a rule pumps the cluster's events or does one effect, on the test's
thread. A kill strikes at a call to a store, the cluster or the tracker, before or after it acts; then a new
engine goes on with what is stored. In the end the outside world answers, and everything must come to rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.memory_orchestrator import MemoryOrchestrator
from flops.adapters.memory_repos import MemoryRepos
from flops.adapters.memory_store import MemoryProjectStore
from flops.adapters.memory_tracker import MemoryTracker
from flops.adapters.sql_store import SqlProjectStore
from flops.core.cluster import (
    IMAGE_BUILDER_ADDON,
    LEARNER_ADDON,
    ClusterEvent,
    Service,
    ServiceKind,
    ServiceState,
)
from flops.core.effects import Effect, EffectKind
from flops.core.ids import NodeId, ProjectId, ServiceId
from flops.core.project import Environment, Project, Round, Stage, TrainedModel
from flops.errors import ErrorCode, FlopsError
from flops.manager.engine import Engine
from flops.manager.options import EngineOptions
from flops.ports import ProjectStore
from flops.testing.projects import REPO_URL, HandClock, node_with, sla_with

T = TypeVar("T")
NODES = (
    node_with("alpha", addons=(LEARNER_ADDON, IMAGE_BUILDER_ADDON), cores=64, memory_mb=256_000),
    node_with("beta", cores=64, memory_mb=256_000),
)
PLACES_OF_EVENTS = ["put_environment", "save", "move_cursor"]
UNLOCKED_PLACES = [  # where other threads may do something in between
    *("start_service", "stop_service", "remove_service", "services"),
    *("resolve", "end_runs", "finish_effect", "move_cursor", "delete"),
]
PLACES = [*UNLOCKED_PLACES, "put_environment", "save"]
ROUNDS = 3
AGGREGATOR_LINES = ("listening", "training_started", "learners", *("round",) * ROUNDS, "training_completed")
LANES = {
    EffectKind.RESOLVE_REPOSITORY: "repositories",
    EffectKind.END_TRACKING: "tracking",
    EffectKind.DELETE_TRACKING: "tracking",
}
ROUNDS_OF_REST = 200


class KilledError(BaseException):
    """The manager was killed: nothing of it may catch this."""


def kill() -> None:
    raise KilledError


class Fuse:
    """Says at which call the manager dies, or a user asks for something, and keeps what was stored."""

    def __init__(self) -> None:
        self.place: tuple[str, bool] | None = None
        self.action: Callable[[], None] = kill
        self.effect_keys: list[str] = []

    def set(self, place: tuple[str, bool] | None, action: Callable[[], None] | None = None) -> None:
        self.place, self.action = place, action or kill

    def burn(self, name: str, *, is_after: bool) -> None:
        if self.place == (name, is_after):
            self.place = None
            self.action()

    def record(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name in {"add", "save"}:
            self.effect_keys += [effect.key for effect in arguments[2]]


class _Mortal:
    def __init__(self, target: Any, fuse: Fuse) -> None:
        self._target = target
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self._fuse.burn(name, is_after=False)
            result = method(*arguments, **named)
            self._fuse.record(name, arguments)
            self._fuse.burn(name, is_after=True)
            return result

        return call


def mortal(target: T, fuse: Fuse) -> T:
    """The same thing, in a process that the fuse ends."""
    return cast(T, _Mortal(target, fuse))


class CountingOrchestrator(MemoryOrchestrator):
    """Keeps which services came into being, and every event, also those that the log forgets."""

    def __init__(self, clock: HandClock) -> None:
        super().__init__(clock, nodes_obey=False)
        self.starts: list[ServiceId] = []
        self.past: list[ClusterEvent] = []

    def _append(self, kind: str, **fields: Any) -> None:
        super()._append(kind, **fields)
        self.past.append(self._events[-1])

    def start_service(self, spec: Any) -> None:
        if spec.id not in self._services:
            self.starts.append(spec.id)
        super().start_service(spec)


class HistoryMachine(RuleBasedStateMachine):
    """A manager that is killed at will, and the world around it."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = HandClock()
        self.blobs = MemoryBlobs()
        self.repos = MemoryRepos(self.blobs)
        self.repos.add(REPO_URL, b"tree")
        self.tracker = MemoryTracker()
        self.cluster = CountingOrchestrator(self.clock)
        for node in NODES:
            self.cluster.join(node)
        self.fuse = Fuse()
        self.lines: dict[ServiceId, int] = {}  # by service, how many of its lines it has told
        self.addresses: dict[ServiceId, int] = {}  # by service, how often it was started again
        self.queue: list[Effect] = []  # as the executor has it
        self.ids: list[ProjectId] = []
        self.seen: dict[ProjectId, Project] = {}
        self.deletions: set[ProjectId] = set()
        self.cursor = 0
        self.store: ProjectStore = self.open_store()
        self.engine = self.new_engine()

    def open_store(self) -> ProjectStore:
        raise NotImplementedError

    def new_engine(self) -> Engine:
        options = EngineOptions(tracking_uri="http://mlflow.example", secret=b"secret", workers=1)
        parts = (self.store, self.cluster, self.repos)
        store, cluster, repos = (mortal(part, self.fuse) for part in parts)
        tracker = mortal(self.tracker, self.fuse)
        return Engine(store, cluster, repos, self.blobs, self.clock, options, tracker)  # type: ignore[arg-type]

    # The manager

    @initialize()
    def begin(self) -> None:
        self.submit()

    @precondition(lambda self: len(self.ids) < 3)
    @rule()
    def submit(self) -> None:
        def act() -> None:
            self.ids.append(self.engine.submit(sla_with(training_rounds=ROUNDS)).id)

        self.live(act)

    @rule(data=st.data(), is_deletion=st.booleans())
    def a_user_asks(self, data: st.DataObject, is_deletion: bool) -> None:
        project_id = data.draw(st.sampled_from(self.ids))
        if not self.live(lambda: self.ask(project_id, is_deletion)):
            self.live(lambda: self.ask(project_id, is_deletion))  # the user got no answer, and asks again

    @rule(
        data=st.data(),
        place=st.sampled_from(UNLOCKED_PLACES),
        is_after=st.booleans(),
        is_deletion=st.booleans(),
    )
    def a_user_will_ask(self, data: st.DataObject, place: str, is_after: bool, is_deletion: bool) -> None:
        """While an effect is being done, for example."""
        project_id = data.draw(st.sampled_from(self.ids))
        self.fuse.set((place, is_after), lambda: self.ask(project_id, is_deletion))

    def ask(self, project_id: ProjectId, is_deletion: bool) -> None:
        is_known = project_id in {project.id for project in self.store.all()}
        if is_known and is_deletion:
            self.deletions.add(project_id)
        try:
            (self.engine.delete if is_deletion else self.engine.stop)(project_id)
        except FlopsError as exc:
            assert exc.code is ErrorCode.PROJECT_NOT_FOUND  # noqa: PT017 (not always raised)
            assert not is_known

    @rule(place=st.none() | st.tuples(st.sampled_from(PLACES_OF_EVENTS), st.booleans()))
    def events_are_taken_in(self, place: tuple[str, bool] | None = None) -> None:
        if place is not None:
            self.fuse.set(place)
        self.live(self.engine._pump._pump)

    @rule(data=st.data())
    def an_event_is_delivered_again(self, data: st.DataObject) -> None:
        """Any event that was read before, after whatever newer ones."""
        past = [e for e in self.cluster.past if e.seq <= self.cursor and e.project_id]
        if past:
            event = data.draw(st.sampled_from(past))
            before = {p.id: p for p in self.store.all()}
            self.live(lambda: self.engine._take_in(event, "alpha"))
            assert {p.id: p for p in self.store.all()} == before, event

    @precondition(lambda self: self.queue)
    @rule(data=st.data(), waited_s=st.sampled_from([0.0, 0.0, 0.0, 1_000.0]))
    def an_effect_runs(self, data: st.DataObject, waited_s: float) -> None:
        self.perform(data.draw(st.sampled_from(self.heads())), waited_s)

    @rule(place=st.sampled_from(PLACES), is_after=st.booleans())
    def the_manager_will_be_killed(self, place: str, is_after: bool) -> None:
        self.fuse.set((place, is_after))

    @rule()
    def the_manager_is_killed(self) -> None:
        self.restart()

    def heads(self) -> list[Effect]:
        """The effects that the executor may do next: the first of each lane."""
        lanes: dict[tuple[str, str], Effect] = {}
        for effect in self.queue:
            lane = (LANES.get(effect.kind, "services"), effect.project_id or effect.key)
            lanes.setdefault(lane, effect)
        return list(lanes.values())

    def perform(self, effect: Effect, waited_s: float) -> None:
        def act() -> None:
            if self.engine._perform(effect, 0, waited_s) is None:
                self.queue.remove(effect)

        self.live(act)

    def live(self, act: Callable[[], None]) -> bool:
        """Do it, or die at it and come back; returns whether it was done."""
        try:
            act()
        except KilledError:
            self.restart()
            return False
        self.look_for_effects()
        return True

    def restart(self) -> None:
        self.fuse.set(None)
        self.engine.close()
        self.store = self.open_store()
        self.engine = self.new_engine()
        self.engine._remove_orphans()
        self.queue = []
        self.look_for_effects()
        self.engine._recovered = {effect.key for effect in self.queue}
        self.ids += [project.id for project in self.store.all() if project.id not in self.ids]

    def look_for_effects(self) -> None:
        known = {effect.key for effect in self.queue}
        self.queue += [effect for effect in self.store.pending_effects() if effect.key not in known]

    # The world

    @rule(data=st.data())
    def a_service_goes_on(self, data: st.DataObject) -> None:
        services = [s for s in self.cluster.services() if self.can_act(s)]
        if services:
            self.go_on(data.draw(st.sampled_from(services)))

    @rule()
    def all_services_go_on(self) -> None:
        for service in self.cluster.services():
            if self.can_act(service):
                self.go_on(service)

    @rule(times=st.integers(min_value=1, max_value=16))
    def everything_goes_on(self, times: int) -> None:
        """A while without mishaps but the kill that is set, so that histories reach every stage."""
        for _ in range(times):
            self.events_are_taken_in()
            for effect in self.heads():
                self.perform(effect, 0.0)
            self.all_services_go_on()

    @rule(data=st.data(), how=st.sampled_from(["fails", "tells", "restarts", "restarts"]))
    def a_service_stumbles(self, data: st.DataObject, how: str) -> None:
        services = [s for s in self.cluster.services() if self.can_act(s)]
        if not services:
            return
        service_id = data.draw(st.sampled_from(services)).spec.id
        if how == "restarts":
            self.cluster.report(service_id, ServiceState.RESTARTING, exit_code=-9)
            self.lines[service_id] = 0
            self.addresses[service_id] = self.addresses.get(service_id, 0) + 1
            return
        if how == "tells":
            error = FlopsError(ErrorCode.USER_CODE_FAILED, "ValueError: no")
            self.cluster.tell(service_id, "failed", error=error.to_dict())
        self.cluster.report(service_id, ServiceState.FAILED, exit_code=1)

    @rule(node=st.sampled_from(NODES))
    def a_node_comes_or_goes(self, node: Any) -> None:
        if self.is_connected(node.id):
            self.cluster.leave(node.id)
        else:
            self.cluster.join(node)

    @rule(is_away=st.booleans())
    def the_git_server_comes_or_goes(self, is_away: bool) -> None:
        error = FlopsError(ErrorCode.TIMEOUT, "Git is slow.")
        self.repos.fail(REPO_URL, error if is_away else None)

    @rule(is_away=st.booleans())
    def the_tracker_comes_or_goes(self, is_away: bool) -> None:
        self.tracker.problem = FlopsError(ErrorCode.UNREACHABLE, "MLflow is away.") if is_away else None

    def is_connected(self, node_id: NodeId) -> bool:
        return any(node.is_connected for node in self.cluster.nodes() if node.id == node_id)

    def can_act(self, service: Service) -> bool:
        return not service.status.state.is_final and self.is_connected(service.spec.node_id)

    def go_on(self, service: Service) -> None:
        """Let a service do the next thing that it does in a life without mishaps."""
        service_id, state = service.spec.id, service.status.state
        if not service.should_run:
            self.cluster.report(service_id, ServiceState.STOPPED)
        elif state is ServiceState.PENDING:
            self.cluster.report(service_id, ServiceState.PREPARING, detail="Unpacks.")
        elif state is not ServiceState.RUNNING:
            self.cluster.report(service_id, ServiceState.RUNNING)
        else:
            self.tell_next_line(service)

    def tell_next_line(self, service: Service) -> None:
        service_id, line = service.spec.id, self.lines.get(service.spec.id, 0)
        lines = {
            ServiceKind.BUILDER: ("progress", "environment_locked"),
            ServiceKind.AGGREGATOR: AGGREGATOR_LINES,
            ServiceKind.INFERENCE: ("listening",),
        }.get(service.spec.kind, ())
        if line >= len(lines):
            if service.spec.kind in {ServiceKind.BUILDER, ServiceKind.AGGREGATOR}:
                self.cluster.report(service_id, ServiceState.COMPLETED, exit_code=0)
            return
        if self.tell(service, lines[line], line):
            self.lines[service_id] = line + 1

    def tell(self, service: Service, kind: str, line: int) -> bool:
        """Tell a line; returns False when it has to wait."""
        service_id, project_id = service.spec.id, ProjectId(service.spec.project_id)
        match kind:
            case "progress":
                self.cluster.tell(service_id, kind, message="Resolves.")
            case "environment_locked":
                environment = self.environment(project_id)
                self.cluster.tell(service_id, kind, environment=environment.model_dump(mode="json"))
            case "listening":
                port = 5000 + self.addresses.get(service_id, 0)
                self.cluster.tell(service_id, kind, address=f"127.0.0.1:{port}")
            case "training_started":
                if self.tracker.problem is not None:
                    return False
                self.tracker.open_run(project_id, {}, {})
                self.cluster.tell(service_id, kind, experiment_id="1", run_id="r")
            case "learners":
                learners = self.learners(project_id)
                for learner in learners:
                    self.cluster.tell(service_id, "learner_joined", learner=learner, node="alpha", rows=50)
                return len(learners) >= 2
            case "round":
                number = line - AGGREGATOR_LINES.index("round") + 1
                record = Round(number=number, accuracy=0.5, loss=1.0).model_dump(mode="json")
                self.cluster.tell(service_id, "round_started", round=number, rounds=ROUNDS)
                self.cluster.tell(service_id, "round_completed", rounds=ROUNDS, record=record)
            case _:
                self.cluster.tell(service_id, kind, model=self.model().model_dump(mode="json"))
        return True

    def environment(self, project_id: ProjectId) -> Environment:
        repository = self.repos.resolve(REPO_URL, None, "sklearn") if self.is_git_there() else None
        known = self.seen[project_id].repository if project_id in self.seen else None
        key = (repository or known).environment_key  # type: ignore[union-attr]
        return Environment(key=key, lock=self.blobs.put(b"numpy"), model_lock=self.blobs.put(b"mlflow"))

    def is_git_there(self) -> bool:
        return REPO_URL not in self.repos._errors

    def learners(self, project_id: ProjectId) -> list[ServiceId]:
        return [
            s.spec.id
            for s in self.cluster.services(project_id)
            if s.spec.kind is ServiceKind.LEARNER and s.should_run and s.status.state is ServiceState.RUNNING
        ]

    def model(self) -> TrainedModel:
        bundle = self.blobs.put(b"model")
        return TrainedModel(
            experiment_id="1",
            run_id="r",
            model_uri="u",
            name="m",
            version="1",
            round=ROUNDS,
            bundle=bundle,
        )

    # What holds at every moment

    @invariant()
    def no_history_has_a_gap_and_no_end_is_left(self) -> None:
        present = {project.id: project for project in self.store.all()}
        for project_id, project in present.items():
            seqs = [line.seq for line in self.store.history(project_id)]
            assert seqs == list(range(1, project.history_length + 1))
            assert project.failure is None or project.failure.code != "internal", project.failure
            before = self.seen.get(project_id, project)
            assert project.version >= before.version
            assert project.stage is before.stage or not before.stage.is_final
            assert list(Stage).index(project.stage) >= list(Stage).index(before.stage)
        for project_id in set(self.seen) - set(present):
            assert project_id in self.deletions
            assert self.store.history(project_id) == []
            assert project_id not in {effect.project_id for effect in self.store.pending_effects()}
        self.seen = {**self.seen, **present}

    @invariant()
    def nothing_is_done_twice(self) -> None:
        assert len(self.fuse.effect_keys) == len(set(self.fuse.effect_keys))
        assert len(self.cluster.starts) == len(set(self.cluster.starts))
        cursor = self.store.cursor()
        assert cursor >= self.cursor
        self.cursor = cursor

    # What comes of it when the world answers

    def teardown(self) -> None:
        try:
            self.come_to_rest()
            self.everything_has_ended()
        finally:
            self.engine.close()

    def come_to_rest(self) -> None:
        self.fuse.set(None)
        self.the_git_server_comes_or_goes(is_away=False)
        self.the_tracker_comes_or_goes(is_away=False)
        for node in NODES:
            self.cluster.join(node)
        for _ in range(ROUNDS_OF_REST):
            before = (self.queue[:], self.cluster.past[-1].seq, self.store.cursor())
            self.everything_goes_on(times=1)
            self.no_history_has_a_gap_and_no_end_is_left()
            if before == (self.queue, self.cluster.past[-1].seq, self.store.cursor()):
                return
        raise AssertionError(f"no rest: {self.queue}, {self.store.all()}")

    def everything_has_ended(self) -> None:
        self.nothing_is_done_twice()
        assert self.store.pending_effects() == []
        present = {project.id: project for project in self.store.all()}
        assert not set(present) & self.deletions
        assert {s.spec.project_id for s in self.cluster.services()} <= set(present)
        assert set(self.tracker.runs) <= set(present)
        for project in present.values():
            assert project.stage.is_final, project
            running = [s.spec.id for s in self.cluster.services(project.id) if not s.status.state.is_final]
            assert list(project.services) == running
            assert project.stage is Stage.COMPLETED or not running
            if project.stage is not Stage.COMPLETED and project.id in self.tracker.runs:
                assert self.tracker.runs[project.id].status != "RUNNING"


class MemoryHistories(HistoryMachine):
    def open_store(self) -> ProjectStore:
        return self.__dict__.get("store") or MemoryProjectStore()


class SqlHistories(HistoryMachine):
    def open_store(self) -> ProjectStore:
        if "folder" not in self.__dict__:
            self.folder = tempfile.TemporaryDirectory()
        else:
            cast(SqlProjectStore, self.store).close()
        return SqlProjectStore(Path(self.folder.name) / "projects.sqlite")

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            cast(SqlProjectStore, self.store).close()
            self.folder.cleanup()


@pytest.mark.parametrize(("machine", "examples"), [(MemoryHistories, 60), (SqlHistories, 6)])
def test_every_history_ends_well(machine: type[HistoryMachine], examples: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
