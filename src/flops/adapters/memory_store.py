"""Projects in memory: what tests use in place of the database."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from flops.core.deployment import Deployment
from flops.core.effects import Effect
from flops.core.ids import EnvironmentKey, ProjectId
from flops.core.project import Environment, MockData, Project, ProjectEvent
from flops.errors import ErrorCode, FlopsError


class MemoryProjectStore:
    """Implements `flops.deployment_ports.ManagerStore`; a second object knows nothing of the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cursor = 0
        self._projects: dict[ProjectId, Project] = {}
        self._events: dict[ProjectId, list[ProjectEvent]] = {}
        self._effects: dict[str, Effect] = {}
        self._done: set[str] = set()
        self._environments: dict[EnvironmentKey, Environment] = {}
        self._mock_data: dict[str, MockData] = {}
        self._deployments: dict[str, Deployment] = {}

    def add(self, project: Project, events: Sequence[ProjectEvent], effects: Sequence[Effect]) -> None:
        """Store a new project."""
        with self._lock:
            if project.id in self._projects:
                raise FlopsError(ErrorCode.CONFLICT, f"Project {project.id} is stored already.")
            self._projects[project.id] = project
            self._append(project.id, events, effects)

    def save(
        self,
        project: Project,
        events: Sequence[ProjectEvent],
        effects: Sequence[Effect],
        *,
        cursor: int | None = None,
    ) -> None:
        """Store a changed project with its history, effects and the cursor."""
        with self._lock:
            stored = self._projects.get(project.id)
            if stored is None or stored.version != project.version - 1:
                known = "none" if stored is None else f"version {stored.version}"
                raise FlopsError(
                    ErrorCode.CONFLICT,
                    f"Version {project.version} of project {project.id} cannot follow {known}.",
                )
            self._projects[project.id] = project
            self._append(project.id, events, effects)
            if cursor is not None:
                self._cursor = cursor

    def get(self, project_id: ProjectId) -> Project:
        """Load a project."""
        with self._lock:
            if project_id not in self._projects:
                raise FlopsError(ErrorCode.PROJECT_NOT_FOUND, f"Project {project_id} does not exist.")
            return self._projects[project_id]

    def all(self) -> list[Project]:
        """All projects, newest first."""
        with self._lock:
            return list(reversed(self._projects.values()))

    def delete(self, project_id: ProjectId) -> None:
        """Remove a project with its history and effects."""
        with self._lock:
            self._projects.pop(project_id, None)
            self._events.pop(project_id, None)
            self._effects = {k: e for k, e in self._effects.items() if e.project_id != project_id}
            self._done &= set(self._effects)

    def history(self, project_id: ProjectId, *, after: int = 0) -> list[ProjectEvent]:
        """The project's events above `after`."""
        with self._lock:
            return [event for event in self._events.get(project_id, []) if event.seq > after]

    def pending_effects(self) -> list[Effect]:
        """Effects that are not done, oldest first."""
        with self._lock:
            return [effect for key, effect in self._effects.items() if key not in self._done]

    def finish_effect(self, key: str) -> None:
        """Mark an effect as done."""
        with self._lock:
            if key in self._effects:
                self._done.add(key)

    def cursor(self) -> int:
        """The last cluster event that has been taken in."""
        with self._lock:
            return self._cursor

    def move_cursor(self, seq: int) -> None:
        """Set the cursor."""
        with self._lock:
            self._cursor = seq

    def put_environment(self, environment: Environment) -> None:
        """Remember a locked environment."""
        with self._lock:
            self._environments[environment.key] = environment

    def find_environment(self, key: EnvironmentKey) -> Environment | None:
        """The locked environment with this key."""
        with self._lock:
            return self._environments.get(key)

    def environments(self) -> list[Environment]:
        """All locked environments that are known."""
        with self._lock:
            return list(self._environments.values())

    def forget_environments(self) -> int:
        """Forget all locked environments."""
        with self._lock:
            count = len(self._environments)
            self._environments.clear()
            return count

    def forget_finished_effects(self, project_id: ProjectId) -> None:
        """Remove the project's effects that are done."""
        with self._lock:
            gone = {key for key in self._done if self._effects[key].project_id == project_id}
            self._done -= gone
            self._effects = {key: effect for key, effect in self._effects.items() if key not in gone}

    def put_mock_data(self, mock_data: MockData) -> None:
        """Store a mock data provider's record."""
        with self._lock:
            self._mock_data[mock_data.id] = mock_data

    def list_mock_data(self) -> list[MockData]:
        """All mock data records, newest first."""
        with self._lock:
            return list(reversed(self._mock_data.values()))

    def put_deployment(self, deployment: Deployment) -> None:
        """Store a deployed model's record."""
        with self._lock:
            self._deployments[deployment.name] = deployment

    def deployments(self) -> list[Deployment]:
        """All records of deployed models, by name."""
        with self._lock:
            return sorted(self._deployments.values(), key=lambda deployment: deployment.name)

    def reset(self) -> None:
        """Forget everything but the cursor."""
        with self._lock:
            for records in (self._projects, self._events, self._effects, self._done):
                records.clear()
            self._environments.clear()
            self._mock_data.clear()
            self._deployments.clear()

    def _append(
        self, project_id: ProjectId, events: Sequence[ProjectEvent], effects: Sequence[Effect]
    ) -> None:
        self._events.setdefault(project_id, []).extend(events)
        for effect in effects:
            self._effects.setdefault(effect.key, effect)
