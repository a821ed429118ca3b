"""SQLite files with the pragmas, the errors and the check of versions that every store of ours needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from flops.errors import ErrorCode, FlopsError

_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    "busy_timeout=30000",
    "journal_size_limit=8388608",  # a log that grew in a rush is cut back at the next checkpoint
)


class SqliteFile:
    """A database that survives a kill at any moment; safe to use from several threads.

    WAL lets readers go on while one writes; `synchronous=FULL` makes a commit durable before it returns.

    Args:
        path: the database's file; it is created when it does not exist.
        owner: whose it is, for errors: "manager", "cluster".
        prepare: makes the tables that are missing, and brings older ones up; returns the schema's version.
        version: the one that is needed.

    Raises:
        FlopsError: ``conflict`` when another version of FLOps wrote the file, ``disk_full``, ``internal``.
    """

    def __init__(self, path: Path, owner: str, prepare: Callable[[Connection], int], version: int) -> None:
        self._path = path
        self._owner = owner
        path.parent.mkdir(parents=True, exist_ok=True)
        connect_args = {"timeout": 30, "check_same_thread": False}
        self._engine = create_engine(f"sqlite:///{path}", connect_args=connect_args)

        @event.listens_for(self._engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            cursor = connection.cursor()
            for pragma in _PRAGMAS:
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        try:
            with self.transaction() as connection:
                self._check_version(prepare(connection), version)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._engine.dispose()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """All or nothing.

        Raises:
            FlopsError: ``conflict`` for what breaks a constraint, ``disk_full``, ``internal``.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError as exc:
            raise FlopsError(
                ErrorCode.CONFLICT, f"The {self._owner}'s database {self._path} has this already: {exc.orig}."
            ) from exc
        except SQLAlchemyError as exc:
            reason = str(getattr(exc, "orig", None) or exc)
            is_full = "disk is full" in reason
            raise FlopsError(
                ErrorCode.DISK_FULL if is_full else ErrorCode.INTERNAL,
                f"The {self._owner}'s database {self._path} cannot be used: {reason}.",
            ) from exc

    def _check_version(self, found: int, known: int) -> None:
        """Refuse a file that another FLOps wrote."""
        if found != known:
            raise FlopsError(
                ErrorCode.CONFLICT,
                f"{self._path} has schema version {found}; this FLOps knows version {known}.",
                hint="Use the FLOps version that wrote the file, or move the file away to begin anew.",
            )
