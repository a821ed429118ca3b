"""Every adapter of ML repositories keeps the contract."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from flops.adapters.git_repos import GitRepos
from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.memory_repos import MemoryRepos
from flops.ports import Blobs
from flops.settings import inherited_environment
from flops.testing.contracts.ml_repos import MLReposContract, Publish
from flops.testing.git import GitRepository


class TestMemoryRepos(MLReposContract):
    @pytest.fixture
    def blobs(self) -> Blobs:
        return MemoryBlobs()

    @pytest.fixture
    def repos(self, blobs: Blobs) -> MemoryRepos:
        return MemoryRepos(blobs)

    @pytest.fixture
    def publish(self, repos: MemoryRepos) -> Publish:  # type: ignore[override]
        def publish(files: Mapping[str, str], ref: str | None) -> str:
            tree = json.dumps(dict(files)).encode()
            repos.add("memory://repository", tree, ref=ref, dependencies=files["requirements.txt"])
            return "memory://repository"

        return publish


class TestGitRepos(MLReposContract):
    @pytest.fixture
    def blobs(self) -> Blobs:
        return MemoryBlobs()

    @pytest.fixture
    def repos(self, blobs: Blobs, tmp_path: Path) -> GitRepos:
        return GitRepos(
            blobs,
            tmp_path / "cache",
            environ=inherited_environment(),
            mlflow_version="3.17.2",
            platform="test",
        )

    @pytest.fixture
    def publish(self, tmp_path: Path) -> Publish:
        repository = GitRepository(tmp_path / "repository")

        def publish(files: Mapping[str, str], ref: str | None) -> str:
            repository.commit(files, branch=ref)
            return repository.url

        return publish
