"""What a cluster must not forget, in SQLite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from flops.adapters.sql_engine import SqliteFile
from flops.core.cluster import ClusterEvent, Node, Service
from flops.core.ids import ServiceId

SCHEMA_VERSION = 2


class _Table(DeclarativeBase):
    pass


class _SchemaRow(_Table):
    """One row: the version of the tables below. Migrations begin where it differs from `SCHEMA_VERSION`."""

    __tablename__ = "cluster_schema"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int]


class _NodeRow(_Table):
    __tablename__ = "cluster_nodes"
    __table_args__ = ({"sqlite_autoincrement": True},)
    position: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    document: Mapped[str]  # the node as JSON


class _ServiceRow(_Table):
    __tablename__ = "cluster_services"
    __table_args__ = ({"sqlite_autoincrement": True},)
    position: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    document: Mapped[str]  # the service as JSON


class _EventRow(_Table):
    __tablename__ = "cluster_events"
    __table_args__ = ({"sqlite_autoincrement": True},)  # a seq is never used twice
    seq: Mapped[int] = mapped_column(primary_key=True)
    dedup_key: Mapped[str | None] = mapped_column(unique=True)
    kind: Mapped[str]
    service_id: Mapped[str]
    line: Mapped[int]
    document: Mapped[str]  # the event as JSON, its seq left at 0


class _LineRow(_Table):
    """The last line of a service's event log that was appended: kept when the events are forgotten."""

    __tablename__ = "cluster_lines"
    service_id: Mapped[str] = mapped_column(primary_key=True)
    line: Mapped[int]


class SqlClusterStore:
    """Implements `flops.ports.ClusterStore` on one SQLite file; safe to use from several threads.

    Every method raises `FlopsError`: ``disk_full``, or ``internal`` naming the file.

    Args:
        path: the database's file; it is created when it does not exist.

    Raises:
        FlopsError: ``conflict`` when a newer FLOps wrote the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(path, "cluster", _prepare, SCHEMA_VERSION)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def put_node(self, node: Node) -> None:
        """Store a node, replacing an earlier record of the same id."""
        with self._file.transaction() as connection:
            _put(connection, _NodeRow, node.id, node.model_dump_json())

    def nodes(self) -> list[Node]:
        """All nodes, in the order they joined."""
        with self._file.transaction() as connection:
            rows = connection.execute(select(_NodeRow.document).order_by(_NodeRow.position)).scalars()
            return [Node.model_validate_json(document) for document in rows]

    def remove_node(self, node_id: str) -> None:
        """Forget a node."""
        with self._file.transaction() as connection:
            connection.execute(delete(_NodeRow).where(_NodeRow.id == node_id))

    def put_service(self, service: Service) -> None:
        """Store a service, replacing an earlier record of the same id."""
        with self._file.transaction() as connection:
            _put(connection, _ServiceRow, service.spec.id, service.model_dump_json())

    def services(self) -> list[Service]:
        """All services, oldest first."""
        with self._file.transaction() as connection:
            rows = connection.execute(select(_ServiceRow.document).order_by(_ServiceRow.position)).scalars()
            return [Service.model_validate_json(document) for document in rows]

    def remove_service(self, service_id: ServiceId) -> None:
        """Forget a service."""
        with self._file.transaction() as connection:
            connection.execute(delete(_ServiceRow).where(_ServiceRow.id == service_id))
            connection.execute(delete(_LineRow).where(_LineRow.service_id == service_id))

    def append_event(
        self,
        event: ClusterEvent,
        *,
        dedup_key: str | None = None,
        service: Service | None = None,
        node: Node | None = None,
    ) -> ClusterEvent | None:
        """Append an event with what it changed; None when `dedup_key` was appended before."""
        row = {
            "dedup_key": dedup_key,
            "kind": event.kind,
            "service_id": event.service_id,
            "line": event.line,
            "document": event.model_copy(update={"seq": 0}).model_dump_json(),
        }
        statement = insert(_EventRow).values(row).on_conflict_do_nothing(index_elements=["dedup_key"])
        with self._file.transaction() as connection:
            seq = connection.execute(statement.returning(_EventRow.seq)).scalar_one_or_none()
            if seq is None:
                return None
            if event.kind == "actor":
                _put_line(connection, event.service_id, event.line)
            if service is not None:
                _put(connection, _ServiceRow, service.spec.id, service.model_dump_json())
            if node is not None:
                _put(connection, _NodeRow, node.id, node.model_dump_json())
        return event.model_copy(update={"seq": seq})

    def events(self, *, after: int = 0, limit: int = 1000) -> list[ClusterEvent]:
        """Events with a `seq` above `after`, in order."""
        query = select(_EventRow.seq, _EventRow.document).where(_EventRow.seq > after)
        with self._file.transaction() as connection:
            rows = connection.execute(query.order_by(_EventRow.seq).limit(limit))
            return [
                ClusterEvent.model_validate_json(document).model_copy(update={"seq": seq})
                for seq, document in rows
            ]

    def last_lines(self) -> dict[str, int]:
        """Per service that was not removed, the highest `line` among its ``actor`` events."""
        with self._file.transaction() as connection:
            return {row.service_id: row.line for row in connection.execute(select(_LineRow.__table__))}

    def forget_events(self, up_to: int, *, limit: int = 1000) -> int:
        """Remove the oldest events with a `seq` of `up_to` or less, `limit` at most; returns how many.

        The file does not shrink: what comes next takes the freed pages.
        """
        oldest = select(_EventRow.seq).where(_EventRow.seq <= up_to).order_by(_EventRow.seq).limit(limit)
        with self._file.transaction() as connection:
            gone = delete(_EventRow).where(_EventRow.seq.in_(oldest.scalar_subquery()))
            return connection.execute(gone).rowcount


def _prepare(connection: Connection) -> int:
    _Table.metadata.create_all(connection)
    first = insert(_SchemaRow).values(id=1, version=SCHEMA_VERSION).on_conflict_do_nothing()
    connection.execute(first)
    version = connection.execute(select(_SchemaRow.version)).scalar_one()
    if version == 1:
        _read_lines_from_events(connection)
        connection.execute(update(_SchemaRow).values(version=SCHEMA_VERSION))
        version = SCHEMA_VERSION
    return version


def _read_lines_from_events(connection: Connection) -> None:
    """Version 1 had no table of lines: all events were there."""
    query = select(_EventRow.service_id, func.max(_EventRow.line)).where(_EventRow.kind == "actor")
    for service_id, line in connection.execute(query.group_by(_EventRow.service_id)).all():
        _put_line(connection, service_id, line)


def _put_line(connection: Connection, service_id: str, line: int) -> None:
    statement = insert(_LineRow).values(service_id=service_id, line=line)
    highest = func.max(_LineRow.line, statement.excluded.line)
    connection.execute(statement.on_conflict_do_update(index_elements=["service_id"], set_={"line": highest}))


def _put(connection: Connection, table: type[_NodeRow | _ServiceRow], key: str, document: str) -> None:
    statement: Any = insert(table).values(id=key, document=document)
    connection.execute(
        statement.on_conflict_do_update(index_elements=["id"], set_={"document": statement.excluded.document})
    )
