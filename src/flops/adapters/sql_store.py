"""Projects, their history and their pending effects, in SQLite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from flops.adapters.sql_engine import SqliteFile
from flops.core.deployment import Deployment
from flops.core.effects import Effect
from flops.core.ids import EnvironmentKey, ProjectId
from flops.core.project import Environment, MockData, Project, ProjectEvent
from flops.errors import ErrorCode, FlopsError

SCHEMA_VERSION = 1


class _Table(DeclarativeBase):
    pass


class _StateRow(_Table):
    """One row: the version of these tables, and the position in the cluster's log of events."""

    __tablename__ = "manager_state"
    id: Mapped[int] = mapped_column(primary_key=True)
    schema_version: Mapped[int]
    cursor: Mapped[int]


class _ProjectRow(_Table):
    __tablename__ = "projects"
    __table_args__ = ({"sqlite_autoincrement": True},)
    position: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    version: Mapped[int]
    stage: Mapped[str]
    document: Mapped[str]  # the project as JSON


class _EventRow(_Table):
    __tablename__ = "project_events"
    project_id: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    document: Mapped[str]  # the event as JSON


class _EffectRow(_Table):
    __tablename__ = "effects"
    __table_args__ = ({"sqlite_autoincrement": True},)
    position: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[str] = mapped_column(index=True)
    is_done: Mapped[bool]
    document: Mapped[str]  # the effect as JSON


class _EnvironmentRow(_Table):
    __tablename__ = "environments"
    key: Mapped[str] = mapped_column(primary_key=True)
    document: Mapped[str]  # the environment as JSON


class _MockDataRow(_Table):
    __tablename__ = "mock_data"
    __table_args__ = ({"sqlite_autoincrement": True},)
    position: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    document: Mapped[str]  # the record as JSON


class _DeploymentRow(_Table):
    __tablename__ = "deployments"
    name: Mapped[str] = mapped_column(primary_key=True)
    document: Mapped[str]  # the record as JSON


class SqlProjectStore:
    """Implements `flops.deployment_ports.ManagerStore` on one SQLite file; safe to use from several threads.

    Every method raises `FlopsError`: ``disk_full``, or ``internal`` naming the file.

    Args:
        path: the database's file; it is created when it does not exist.

    Raises:
        FlopsError: ``conflict`` when a newer FLOps wrote the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(path, "manager", _prepare, SCHEMA_VERSION)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def add(self, project: Project, events: Sequence[ProjectEvent], effects: Sequence[Effect]) -> None:
        """Store a new project."""
        row = {"id": project.id, **_columns(project)}
        with self._file.transaction() as connection:
            statement = insert(_ProjectRow).values(row).on_conflict_do_nothing(index_elements=["id"])
            if connection.execute(statement).rowcount == 0:
                raise FlopsError(ErrorCode.CONFLICT, f"Project {project.id} is stored already.")
            _append(connection, events, effects)

    def save(
        self,
        project: Project,
        events: Sequence[ProjectEvent],
        effects: Sequence[Effect],
        *,
        cursor: int | None = None,
    ) -> None:
        """Store a changed project with its history, effects and the cursor."""
        is_next = (_ProjectRow.id == project.id) & (_ProjectRow.version == project.version - 1)
        with self._file.transaction() as connection:
            changed = connection.execute(update(_ProjectRow).where(is_next).values(_columns(project)))
            if changed.rowcount == 0:
                raise FlopsError(
                    ErrorCode.CONFLICT,
                    f"Version {project.version} of project {project.id} does not follow the stored one.",
                )
            _append(connection, events, effects)
            if cursor is not None:
                connection.execute(update(_StateRow).values(cursor=cursor))

    def get(self, project_id: ProjectId) -> Project:
        """Load a project."""
        query = select(_ProjectRow.document).where(_ProjectRow.id == project_id)
        with self._file.transaction() as connection:
            document = connection.execute(query).scalar_one_or_none()
        if document is None:
            raise FlopsError(ErrorCode.PROJECT_NOT_FOUND, f"Project {project_id} does not exist.")
        return Project.model_validate_json(document)

    def all(self) -> list[Project]:
        """All projects, newest first."""
        query = select(_ProjectRow.document).order_by(_ProjectRow.position.desc())
        return [Project.model_validate_json(document) for document in self._documents(query)]

    def delete(self, project_id: ProjectId) -> None:
        """Remove a project with its history and effects."""
        with self._file.transaction() as connection:
            connection.execute(delete(_ProjectRow).where(_ProjectRow.id == project_id))
            connection.execute(delete(_EventRow).where(_EventRow.project_id == project_id))
            connection.execute(delete(_EffectRow).where(_EffectRow.project_id == project_id))

    def history(self, project_id: ProjectId, *, after: int = 0) -> list[ProjectEvent]:
        """The project's events above `after`."""
        query = select(_EventRow.document).where(_EventRow.project_id == project_id, _EventRow.seq > after)
        return [
            ProjectEvent.model_validate_json(document)
            for document in self._documents(query.order_by(_EventRow.seq))
        ]

    def pending_effects(self) -> list[Effect]:
        """Effects that are not done, oldest first."""
        query = select(_EffectRow.document).where(_EffectRow.is_done.is_(False)).order_by(_EffectRow.position)
        return [Effect.model_validate_json(document) for document in self._documents(query)]

    def finish_effect(self, key: str) -> None:
        """Mark an effect as done."""
        with self._file.transaction() as connection:
            connection.execute(update(_EffectRow).where(_EffectRow.key == key).values(is_done=True))

    def cursor(self) -> int:
        """The last cluster event that has been taken in."""
        with self._file.transaction() as connection:
            return connection.execute(select(_StateRow.cursor)).scalar_one()

    def move_cursor(self, seq: int) -> None:
        """Set the cursor."""
        with self._file.transaction() as connection:
            connection.execute(update(_StateRow).values(cursor=seq))

    def put_environment(self, environment: Environment) -> None:
        """Remember a locked environment."""
        self._put(_EnvironmentRow, "key", environment.key, environment.model_dump_json())

    def find_environment(self, key: EnvironmentKey) -> Environment | None:
        """The locked environment with this key."""
        documents = self._documents(select(_EnvironmentRow.document).where(_EnvironmentRow.key == key))
        return Environment.model_validate_json(documents[0]) if documents else None

    def environments(self) -> list[Environment]:
        """All locked environments that are known."""
        documents = self._documents(select(_EnvironmentRow.document))
        return [Environment.model_validate_json(document) for document in documents]

    def forget_environments(self) -> int:
        """Forget all locked environments."""
        with self._file.transaction() as connection:
            count = connection.execute(select(func.count()).select_from(_EnvironmentRow)).scalar_one()
            connection.execute(delete(_EnvironmentRow))
            return count

    def forget_finished_effects(self, project_id: ProjectId) -> None:
        """Remove the project's effects that are done."""
        is_gone = (_EffectRow.project_id == project_id) & _EffectRow.is_done.is_(True)
        with self._file.transaction() as connection:
            connection.execute(delete(_EffectRow).where(is_gone))

    def put_mock_data(self, mock_data: MockData) -> None:
        """Store a mock data provider's record."""
        self._put(_MockDataRow, "id", mock_data.id, mock_data.model_dump_json())

    def list_mock_data(self) -> list[MockData]:
        """All mock data records, newest first."""
        query = select(_MockDataRow.document).order_by(_MockDataRow.position.desc())
        return [MockData.model_validate_json(document) for document in self._documents(query)]

    def put_deployment(self, deployment: Deployment) -> None:
        """Store a deployed model's record."""
        self._put(_DeploymentRow, "name", deployment.name, deployment.model_dump_json())

    def deployments(self) -> list[Deployment]:
        """All records of deployed models, by name."""
        query = select(_DeploymentRow.document).order_by(_DeploymentRow.name)
        return [Deployment.model_validate_json(document) for document in self._documents(query)]

    def reset(self) -> None:
        """Forget everything but the cursor."""
        with self._file.transaction() as connection:
            tables = (_ProjectRow, _EventRow, _EffectRow, _EnvironmentRow, _MockDataRow, _DeploymentRow)
            for table in tables:
                connection.execute(delete(table))

    def _documents(self, query: Any) -> list[str]:
        with self._file.transaction() as connection:
            return list(connection.execute(query).scalars())

    def _put(
        self,
        table: type[_EnvironmentRow | _MockDataRow | _DeploymentRow],
        key_column: str,
        key: str,
        document: str,
    ) -> None:
        statement = insert(table).values({key_column: key, "document": document})
        with self._file.transaction() as connection:
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=[key_column], set_={"document": statement.excluded.document}
                )
            )


def _prepare(connection: Connection) -> int:
    _Table.metadata.create_all(connection)
    first = insert(_StateRow).values(id=1, schema_version=SCHEMA_VERSION, cursor=0)
    connection.execute(first.on_conflict_do_nothing())
    return connection.execute(select(_StateRow.schema_version)).scalar_one()


def _columns(project: Project) -> dict[str, Any]:
    return {
        "version": project.version,
        "stage": project.stage.value,
        "document": project.model_dump_json(by_alias=True),
    }


def _append(connection: Connection, events: Sequence[ProjectEvent], effects: Sequence[Effect]) -> None:
    for event in events:
        connection.execute(
            insert(_EventRow).values(
                project_id=event.project_id, seq=event.seq, document=event.model_dump_json()
            )
        )
    for effect in effects:
        connection.execute(
            insert(_EffectRow)
            .values(
                key=effect.key,
                project_id=effect.project_id,
                is_done=False,
                document=effect.model_dump_json(),
            )
            .on_conflict_do_nothing(index_elements=["key"])
        )
