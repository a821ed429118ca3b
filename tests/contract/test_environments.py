"""Every adapter of environments keeps the contract; uv runs for real, against wheels made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import uv

from flops.adapters.uv_environments import UvEnvironments
from flops.settings import inherited_environment
from flops.testing.contracts.environments import EnvironmentsContract
from flops.testing.wheels import make_platform_wheels, use_only


class TestUvEnvironments(EnvironmentsContract):
    @pytest.fixture
    def environments(self, tmp_path: Path) -> UvEnvironments:
        wheels = tmp_path / "wheels"
        wheels.mkdir()
        make_platform_wheels(wheels, mlflow_version="3.17.2")
        return UvEnvironments(
            tmp_path / "environments",
            uv=Path(uv.find_uv_bin()),
            environ={**inherited_environment(), **use_only(wheels, tmp_path / "cache")},
            mlflow_version="3.17.2",
        )
