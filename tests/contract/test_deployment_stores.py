"""Every store of deployed models keeps the contract; the database also survives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.memory_store import MemoryProjectStore
from flops.adapters.sql_store import SqlProjectStore
from flops.deployment_ports import ManagerStore
from flops.testing.contracts.deployment_store import DeploymentStoreContract, deployment


class TestMemoryDeploymentStore(DeploymentStoreContract):
    @pytest.fixture
    def store(self) -> ManagerStore:
        return MemoryProjectStore()


class TestSqlDeploymentStore(DeploymentStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[ManagerStore]:
        store = SqlProjectStore(tmp_path / "projects.sqlite")
        yield store
        store.close()

    def test_a_kill_loses_no_record_that_was_stored(self, tmp_path: Path) -> None:
        path = tmp_path / "projects.sqlite"
        script = (
            "import os, signal, sys\n"
            "from pathlib import Path\n"
            "from flops.adapters.sql_store import SqlProjectStore\n"
            "from flops.testing.contracts.deployment_store import deployment\n"
            "store = SqlProjectStore(Path(sys.argv[1]))\n"
            "store.put_deployment(deployment())\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        result = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
        assert result.returncode == -9
        store = SqlProjectStore(path)
        assert store.deployments() == [deployment()]
        store.close()
