from __future__ import annotations

from pathlib import Path

import pytest

from flops.adapters.host_facts import LocalHost
from flops.ports import Host
from flops.testing.contracts.host import HostContract


class TestLocalHost(HostContract):
    @pytest.fixture(params=[False, True], ids=["private", "public"])
    def host(self, request: pytest.FixtureRequest, tmp_path: Path) -> Host:
        return LocalHost(tmp_path, "127.0.0.1", "1.0", is_public=request.param)


def test_a_cluster_on_this_machine_reaches_us_locally(tmp_path: Path) -> None:
    assert LocalHost(tmp_path, "127.0.0.1", "1.0", is_public=False).address() == "127.0.0.1"


def test_a_cluster_that_cannot_be_found_does_not_matter(tmp_path: Path) -> None:
    assert LocalHost(tmp_path, "no.such.host.invalid", "1.0", is_public=False).address() == "127.0.0.1"


def test_a_disk_that_is_gone_has_no_space(tmp_path: Path) -> None:
    assert LocalHost(tmp_path / "gone", "127.0.0.1", "1", is_public=False).load().disk_free_mb == 0
