"""What every `flops.ports.ProjectStore` does."""

from __future__ import annotations

import pytest

from flops.core.effects import Effect, EffectKind
from flops.core.ids import Digest, EnvironmentKey, ProjectId
from flops.core.project import Environment, MockData, Project, ProjectEvent, Stage
from flops.errors import ErrorCode, FlopsError
from flops.ports import ProjectStore
from flops.testing.projects import sla_with


def project(project_id: str = "p1", *, version: int = 1, stage: Stage = Stage.RESOLVING) -> Project:
    """A project for tests."""
    return Project(
        id=ProjectId(project_id), sla=sla_with(), version=version, stage=stage, doing=f"Größe {version}"
    )


def line(seq: int, project_id: str = "p1") -> ProjectEvent:
    """A line of history for tests."""
    return ProjectEvent(
        project_id=ProjectId(project_id), seq=seq, time_s=1.5, kind="k", message="m", data={"n": [1, None]}
    )


def effect(key: str, project_id: str = "p1") -> Effect:
    """An effect for tests."""
    return Effect(
        key=key, project_id=ProjectId(project_id), kind=EffectKind.STOP_SERVICES, payload={"services": ["s"]}
    )


def environment(key: str, lock: str = "l1") -> Environment:
    """An environment for tests."""
    return Environment(key=EnvironmentKey(key), lock=Digest(lock), model_lock=Digest("m"), notes=("note",))


class ProjectStoreContract:
    """Subclass it, and provide the fixture `store`."""

    @pytest.fixture
    def store(self) -> ProjectStore:
        raise NotImplementedError

    def test_a_new_store_is_empty(self, store: ProjectStore) -> None:
        assert (store.all(), store.pending_effects(), store.cursor(), store.list_mock_data()) == (
            [],
            [],
            0,
            [],
        )

    def test_a_project_is_stored_with_its_history_and_effects(self, store: ProjectStore) -> None:
        store.add(project(), [line(1), line(2)], [effect("a"), effect("b")])
        assert store.get(ProjectId("p1")) == project()
        assert store.history(ProjectId("p1")) == [line(1), line(2)]
        assert store.pending_effects() == [effect("a"), effect("b")]

    def test_the_same_id_is_not_stored_twice(self, store: ProjectStore) -> None:
        store.add(project(), [], [])
        with pytest.raises(FlopsError) as caught:
            store.add(project(stage=Stage.FAILED), [line(1)], [effect("a")])
        assert caught.value.code is ErrorCode.CONFLICT
        assert (store.get(ProjectId("p1")), store.history(ProjectId("p1"))) == (project(), [])
        assert store.pending_effects() == []

    def test_an_unknown_project_is_an_error(self, store: ProjectStore) -> None:
        with pytest.raises(FlopsError, match="nothing") as caught:
            store.get(ProjectId("nothing"))
        assert caught.value.code is ErrorCode.PROJECT_NOT_FOUND
        assert store.history(ProjectId("nothing")) == []

    def test_a_change_is_stored_whole(self, store: ProjectStore) -> None:
        store.add(project(), [line(1)], [effect("a")])
        changed = project(version=2, stage=Stage.BUILDING)
        store.save(changed, [line(2)], [effect("b")], cursor=7)
        assert store.get(ProjectId("p1")) == changed
        assert [e.seq for e in store.history(ProjectId("p1"))] == [1, 2]
        assert [e.key for e in store.pending_effects()] == ["a", "b"]
        assert store.cursor() == 7

    @pytest.mark.parametrize("version", [1, 3])
    def test_a_change_of_another_version_changes_nothing(self, store: ProjectStore, version: int) -> None:
        store.add(project(), [], [])
        with pytest.raises(FlopsError) as caught:
            store.save(project(version=version), [line(1)], [effect("a")], cursor=7)
        assert caught.value.code is ErrorCode.CONFLICT
        assert (store.get(ProjectId("p1")), store.history(ProjectId("p1"))) == (project(), [])
        assert (store.pending_effects(), store.cursor()) == ([], 0)

    def test_an_unknown_project_is_not_changed(self, store: ProjectStore) -> None:
        with pytest.raises(FlopsError) as caught:
            store.save(project(version=2), [], [])
        assert caught.value.code is ErrorCode.CONFLICT
        assert store.all() == []

    def test_a_change_without_cursor_leaves_it(self, store: ProjectStore) -> None:
        store.add(project(), [], [])
        store.move_cursor(5)
        store.save(project(version=2), [], [])
        assert store.cursor() == 5

    def test_projects_are_listed_newest_first(self, store: ProjectStore) -> None:
        for name in ("p2", "p1", "p3"):
            store.add(project(name), [], [])
        store.save(project("p2", version=2), [], [])
        assert [p.id for p in store.all()] == ["p3", "p1", "p2"]

    def test_history_is_read_from_a_position(self, store: ProjectStore) -> None:
        store.add(project(), [line(1), line(2), line(3)], [])
        store.add(project("p2"), [line(1, "p2")], [])
        assert [e.seq for e in store.history(ProjectId("p1"), after=1)] == [2, 3]
        assert store.history(ProjectId("p1"), after=3) == []

    def test_a_done_effect_is_not_pending_and_is_never_added_again(self, store: ProjectStore) -> None:
        store.add(project(), [], [effect("a"), effect("b")])
        store.finish_effect("a")
        store.finish_effect("a")
        store.finish_effect("unknown")
        store.save(project(version=2), [], [effect("a"), effect("b"), effect("c")])
        assert [e.key for e in store.pending_effects()] == ["b", "c"]

    def test_a_deleted_project_leaves_nothing(self, store: ProjectStore) -> None:
        store.add(project(), [line(1)], [effect("a")])
        store.add(project("p2"), [line(1, "p2")], [effect("b", "p2")])
        store.delete(ProjectId("p1"))
        store.delete(ProjectId("p1"))
        assert [p.id for p in store.all()] == ["p2"]
        assert store.history(ProjectId("p1")) == []
        assert store.pending_effects() == [effect("b", "p2")]

    def test_environments_are_found_by_their_key(self, store: ProjectStore) -> None:
        assert store.find_environment(EnvironmentKey("k")) is None
        store.put_environment(environment("k"))
        store.put_environment(environment("k", lock="l2"))
        assert store.find_environment(EnvironmentKey("k")) == environment("k", lock="l2")
        assert (store.forget_environments(), store.forget_environments()) == (1, 0)
        assert store.find_environment(EnvironmentKey("k")) is None

    def test_mock_data_records_are_replaced_and_listed_newest_first(self, store: ProjectStore) -> None:
        first, second = MockData(id="m1", sla={"a": 1}), MockData(id="m2", sla={})
        store.put_mock_data(first)
        store.put_mock_data(second)
        changed = first.model_copy(update={"rows": 7})
        store.put_mock_data(changed)
        assert store.list_mock_data() == [second, changed]

    def test_a_reset_forgets_everything_but_the_cursor(self, store: ProjectStore) -> None:
        store.add(project(), [line(1)], [effect("a")])
        store.put_environment(environment("k"))
        store.put_mock_data(MockData(id="m1", sla={}))
        store.move_cursor(9)
        store.reset()
        assert (store.all(), store.pending_effects(), store.list_mock_data()) == ([], [], [])
        assert store.history(ProjectId("p1")) == []
        assert store.find_environment(EnvironmentKey("k")) is None
        assert store.cursor() == 9
        store.add(project(), [line(1)], [effect("a")])
        assert store.pending_effects() == [effect("a")]
