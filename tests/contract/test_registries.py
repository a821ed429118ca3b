"""Our client of registries does the same with our registry and with Debian's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.registry_client.client import OciRegistry
from flops.testing.contracts.registry import RegistryContract
from flops.testing.images import debian_registry, has_debian_registry, own_registry


class TestClientOfOwnRegistry(RegistryContract):
    @pytest.fixture
    def registry(self) -> OciRegistry:
        return OciRegistry(first_pause_s=0.01)

    @pytest.fixture
    def host(self, tmp_path: Path) -> Iterator[str]:
        with own_registry(tmp_path / "registry") as host:
            yield host


@pytest.mark.skipif(not has_debian_registry(), reason="needs Debian's docker-registry")
class TestClientOfDebianRegistry(RegistryContract):
    @pytest.fixture
    def registry(self) -> OciRegistry:
        return OciRegistry(first_pause_s=0.01)

    @pytest.fixture
    def host(self, tmp_path: Path) -> Iterator[str]:
        with debian_registry(tmp_path / "registry") as host:
            yield host
