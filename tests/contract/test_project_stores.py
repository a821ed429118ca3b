"""Every store of projects keeps the contract; the database also survives."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flops.adapters.memory_store import MemoryProjectStore
from flops.adapters.sql_store import SqlProjectStore
from flops.core.ids import ProjectId
from flops.errors import ErrorCode, FlopsError
from flops.ports import ProjectStore
from flops.testing.contracts.project_store import ProjectStoreContract, effect, line, project


class TestMemoryProjectStore(ProjectStoreContract):
    @pytest.fixture
    def store(self) -> ProjectStore:
        return MemoryProjectStore()


class TestSqlProjectStore(ProjectStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[ProjectStore]:
        store = SqlProjectStore(tmp_path / "control" / "projects.sqlite")
        yield store
        store.close()

    def test_everything_is_there_after_a_restart(self, tmp_path: Path) -> None:
        path = tmp_path / "projects.sqlite"
        first = SqlProjectStore(path)
        first.add(project(), [line(1)], [effect("a"), effect("b")])
        first.save(project(version=2), [line(2)], [], cursor=3)
        first.finish_effect("a")
        first.close()
        second = SqlProjectStore(path)
        assert second.get(ProjectId("p1")) == project(version=2)
        assert [e.seq for e in second.history(ProjectId("p1"))] == [1, 2]
        assert (second.pending_effects(), second.cursor()) == ([effect("b")], 3)
        second.close()

    def test_a_kill_loses_no_step_that_was_answered(self, tmp_path: Path) -> None:
        path = tmp_path / "projects.sqlite"
        script = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from flops.adapters.sql_store import SqlProjectStore\n"
            "from flops.testing.contracts.project_store import effect, line, project\n"
            "store = SqlProjectStore(Path(sys.argv[1]))\n"
            "store.add(project(), [line(1)], [effect('a')])\n"
            "store.save(project(version=2), [line(2)], [effect('b')], cursor=1)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        result = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
        assert result.returncode == -9
        store = SqlProjectStore(path)
        assert store.get(ProjectId("p1")) == project(version=2)
        assert [e.key for e in store.pending_effects()] == ["a", "b"]
        store.close()

    def test_a_database_of_a_newer_version_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "projects.sqlite"
        SqlProjectStore(path).close()
        with sqlite3.connect(path) as connection:
            connection.execute("update manager_state set schema_version = 99")
        connection.close()
        with pytest.raises(FlopsError, match="version 99") as caught:
            SqlProjectStore(path)
        assert caught.value.code is ErrorCode.CONFLICT

    def test_a_damaged_database_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "projects.sqlite"
        path.write_bytes(b"not a database" * 100)
        with pytest.raises(FlopsError, match=r"projects\.sqlite") as caught:
            SqlProjectStore(path)
        assert caught.value.code is ErrorCode.INTERNAL

    def test_only_one_of_two_writers_of_a_version_wins(self, tmp_path: Path) -> None:
        store = SqlProjectStore(tmp_path / "projects.sqlite")
        store.add(project(), [], [])

        def save(number: int) -> bool:
            try:
                store.save(project(version=2), [line(1)], [effect(f"{number}")])
            except FlopsError as exc:
                return exc.code is not ErrorCode.CONFLICT
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(save, range(4))) == 1
        assert len(store.pending_effects()) == 1
        store.close()

    def test_a_full_disk_is_said_and_changes_nothing(self, tmp_path: Path) -> None:
        script = (
            "import resource, signal, sys\n"
            "from pathlib import Path\n"
            "from flops.adapters.sql_store import SqlProjectStore\n"
            "from flops.errors import FlopsError\n"
            "from flops.testing.contracts.project_store import effect, line, project\n"
            "store = SqlProjectStore(Path(sys.argv[1]))\n"
            "store.add(project(), [line(1)], [])\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "size = Path(sys.argv[1] + '-wal').stat().st_size\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
            "try:\n"
            "    store.save(project(version=2), [line(2)], [effect('b')])\n"
            "except FlopsError as exc:\n"
            "    print(exc.code.value)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
            "print(store.get(project().id).version, len(store.history(project().id)))\n"
            "store.save(project(version=2), [line(2)], [effect('b')])\n"
            "print(store.get(project().id).version)\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "projects.sqlite")],
            capture_output=True,
            text=True,
            check=True,
        )
        told, kept, after = result.stdout.splitlines()
        assert told in {ErrorCode.DISK_FULL.value, ErrorCode.INTERNAL.value}
        assert (kept, after) == ("1 1", "2")
