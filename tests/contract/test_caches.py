from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from flops.adapters.environment_folders import EnvironmentFolders
from flops.core.ids import Digest
from flops.node.bundles import BundleStore
from flops.retention_ports import Cache
from flops.testing.contracts.caches import CacheContract, Make


def fetch(_digest: Digest, path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("file.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"text"))


class TestBundles(CacheContract):
    @pytest.fixture
    def cache(self, tmp_path: Path) -> Cache:
        return BundleStore(tmp_path / "bundles", fetch)

    @pytest.fixture
    def make(self, cache: BundleStore) -> Make:
        return lambda key: None if cache.folder_of(Digest(key)).exists() else pytest.fail(key)


class TestEnvironments(CacheContract):
    @pytest.fixture
    def cache(self, tmp_path: Path) -> Cache:
        return EnvironmentFolders(tmp_path / "environments")

    @pytest.fixture
    def make(self, cache: EnvironmentFolders) -> Make:
        def make(key: str) -> None:
            if not cache.begin_use(key):
                with cache.exclusive(key, lambda _: None):
                    python = cache.folder_of(key) / "bin" / "python"
                    python.parent.mkdir(parents=True)
                    python.touch()
                    cache.complete(key)

        return make

    def test_what_is_being_built_is_neither_listed_nor_dropped_nor_swept(
        self, cache: EnvironmentFolders, tmp_path: Path
    ) -> None:
        key = "a" * 64
        with cache.exclusive(key, lambda _: None):
            cache.folder_of(key).mkdir()
            other = EnvironmentFolders(tmp_path / "environments")  # as another process has it
            other.sweep()
            assert other.cached() == []
            assert not other.drop(key, lambda: False)
            assert cache.folder_of(key).is_dir()
        other.sweep()
        assert not cache.folder_of(key).exists()
