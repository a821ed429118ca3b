"""Every store of projects behaves as a dict would, whatever is done to it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from flops.adapters.memory_store import MemoryProjectStore
from flops.adapters.sql_store import SqlProjectStore
from flops.core.ids import EnvironmentKey, ProjectId
from flops.core.project import MockData, Stage
from flops.errors import ErrorCode, FlopsError
from flops.ports import ProjectStore
from flops.testing.contracts.project_store import effect, environment, line, project

PROJECTS = st.sampled_from(["p1", "p2", "p3"])
KEYS = st.lists(st.sampled_from([f"k{n}" for n in range(8)]), max_size=3, unique=True)
SEQS = st.integers(min_value=0, max_value=50)


class ProjectStoreMachine(RuleBasedStateMachine):
    """Does the same to a store and to plain dicts; `restart` is a kill."""

    def __init__(self) -> None:
        super().__init__()
        self.store: ProjectStore = self.new_store()
        self.projects: dict[str, Any] = {}
        self.lines: dict[str, int] = {}
        self.effects: dict[str, tuple[str, bool]] = {}
        self.environments: dict[str, Any] = {}
        self.mocks: dict[str, MockData] = {}
        self.cursor = 0

    def new_store(self) -> ProjectStore:
        raise NotImplementedError

    @rule(name=PROJECTS, keys=KEYS)
    def add(self, name: str, keys: list[str]) -> None:
        try:
            self.store.add(project(name), [line(1, name)], [effect(key, name) for key in keys])
        except FlopsError as exc:
            assert exc.code is ErrorCode.CONFLICT  # noqa: PT017 (not always raised)
            assert name in self.projects
        else:
            assert name not in self.projects
            self.projects[name] = project(name)
            self.lines[name] = 1
            self.remember(name, keys)

    @rule(
        name=PROJECTS,
        keys=KEYS,
        skip=st.integers(min_value=0, max_value=2),
        stage=st.sampled_from(list(Stage)),
        cursor=st.none() | SEQS,
    )
    def save(self, name: str, keys: list[str], skip: int, stage: Stage, cursor: int | None) -> None:
        known = self.projects.get(name)
        version = (known.version if known else 1) + skip
        changed = project(name, version=version, stage=stage)
        new_line = line(self.lines.get(name, 0) + 1, name)
        try:
            self.store.save(changed, [new_line], [effect(key, name) for key in keys], cursor=cursor)
        except FlopsError as exc:
            assert exc.code is ErrorCode.CONFLICT  # noqa: PT017 (not always raised)
            assert known is None or skip != 1
        else:
            assert known is not None
            assert skip == 1
            self.projects[name] = changed
            self.lines[name] += 1
            self.remember(name, keys)
            self.cursor = self.cursor if cursor is None else cursor

    def remember(self, name: str, keys: list[str]) -> None:
        for key in keys:
            self.effects.setdefault(key, (name, False))

    @rule(key=st.sampled_from([f"k{n}" for n in range(8)]))
    def finish_effect(self, key: str) -> None:
        self.store.finish_effect(key)
        if key in self.effects:
            self.effects[key] = (self.effects[key][0], True)

    @rule(name=PROJECTS)
    def delete(self, name: str) -> None:
        self.store.delete(ProjectId(name))
        self.projects.pop(name, None)
        self.lines.pop(name, None)
        self.effects = {key: value for key, value in self.effects.items() if value[0] != name}

    @rule(seq=SEQS)
    def move_cursor(self, seq: int) -> None:
        self.store.move_cursor(seq)
        self.cursor = seq

    @rule(key=st.sampled_from(["e1", "e2"]), lock=st.sampled_from(["l1", "l2"]))
    def put_environment(self, key: str, lock: str) -> None:
        self.environments[key] = environment(key, lock)
        self.store.put_environment(self.environments[key])

    @rule()
    def forget_environments(self) -> None:
        assert self.store.forget_environments() == len(self.environments)
        self.environments.clear()

    @rule(name=st.sampled_from(["m1", "m2"]), rows=SEQS)
    def put_mock_data(self, name: str, rows: int) -> None:
        self.mocks[name] = MockData(id=name, sla={}, rows=rows)
        self.store.put_mock_data(self.mocks[name])

    @rule(name=PROJECTS)
    def forget_finished_effects(self, name: str) -> None:
        self.store.forget_finished_effects(ProjectId(name))
        self.effects = {
            k: (n, is_done) for k, (n, is_done) in self.effects.items() if n != name or not is_done
        }

    @rule()
    def reset(self) -> None:
        self.store.reset()
        for records in (self.projects, self.lines, self.effects, self.environments, self.mocks):
            records.clear()

    @invariant()
    def is_as_a_dict(self) -> None:
        assert self.store.all() == list(reversed(self.projects.values()))
        for name, known in self.projects.items():
            assert self.store.get(ProjectId(name)) == known
            seqs = [event.seq for event in self.store.history(ProjectId(name))]
            assert seqs == list(range(1, self.lines[name] + 1))
        pending = [e.key for e in self.store.pending_effects()]
        assert pending == [key for key, (_name, is_done) in self.effects.items() if not is_done]
        assert self.store.cursor() == self.cursor
        assert self.store.list_mock_data() == list(reversed(self.mocks.values()))
        by_key = {known.key: known for known in self.store.environments()}
        assert by_key == self.environments
        for key in ("e1", "e2"):
            assert self.store.find_environment(EnvironmentKey(key)) == self.environments.get(key)


class MemoryMachine(ProjectStoreMachine):
    def new_store(self) -> ProjectStore:
        return MemoryProjectStore()


class SqlMachine(ProjectStoreMachine):
    def new_store(self) -> ProjectStore:
        self.folder = tempfile.TemporaryDirectory()
        return SqlProjectStore(Path(self.folder.name) / "projects.sqlite")

    @rule()
    def restart(self) -> None:
        assert isinstance(self.store, SqlProjectStore)
        self.store.close()
        self.store = SqlProjectStore(Path(self.folder.name) / "projects.sqlite")

    def teardown(self) -> None:
        assert isinstance(self.store, SqlProjectStore)
        self.store.close()
        self.folder.cleanup()


@pytest.mark.parametrize(("machine", "examples"), [(MemoryMachine, 60), (SqlMachine, 15)])
def test_a_store_behaves_as_a_dict(machine: type[ProjectStoreMachine], examples: int) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=25, deadline=None)
    )
