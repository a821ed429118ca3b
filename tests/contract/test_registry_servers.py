"""Our registry and Debian's do the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.testing.contracts.registry_server import RegistryServerContract
from flops.testing.images import debian_registry, has_debian_registry, own_registry


class TestOwnRegistry(RegistryServerContract):
    @pytest.fixture
    def host(self, tmp_path: Path) -> Iterator[str]:
        with own_registry(tmp_path) as host:
            yield host


@pytest.mark.skipif(not has_debian_registry(), reason="needs Debian's docker-registry")
class TestDebianRegistry(RegistryServerContract):
    @pytest.fixture
    def host(self, tmp_path: Path) -> Iterator[str]:
        with debian_registry(tmp_path) as host:
            yield host
