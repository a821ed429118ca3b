"""What every `flops.ports.MLRepos` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from flops.errors import ErrorCode, FlopsError
from flops.ports import Blobs, MLRepos

REPOSITORY: Mapping[str, str] = {
    "model_manager.py": "class ModelManager:\n    pass\n",
    "data_manager.py": "class DataManager:\n    pass\n",
    "requirements.txt": "numpy\n",
}
Publish = Callable[[Mapping[str, str], str | None], str]


class MLReposContract:
    """Subclass it, and provide the fixtures `repos`, `blobs` (where bundles are put) and `publish`.

    `publish(files, ref)` makes the files a new commit of the one repository, on its default branch (None) or
    under another reference, and returns the repository's URL.
    """

    @pytest.fixture
    def blobs(self) -> Blobs:
        raise NotImplementedError

    @pytest.fixture
    def repos(self, blobs: Blobs) -> MLRepos:
        raise NotImplementedError

    @pytest.fixture
    def publish(self, repos: MLRepos) -> Publish:
        raise NotImplementedError

    def test_a_reference_is_pinned_and_its_tree_is_stored(
        self, repos: MLRepos, blobs: Blobs, publish: Publish
    ) -> None:
        found = repos.resolve(publish(REPOSITORY, None), None, "sklearn")
        assert len(found.commit) in {40, 64}
        assert blobs.has(found.bundle)
        assert found.dependency_file == "requirements.txt"

    def test_the_same_again_is_the_same(self, repos: MLRepos, publish: Publish) -> None:
        url = publish(REPOSITORY, None)
        assert repos.resolve(url, None, "sklearn") == repos.resolve(url, None, "sklearn")

    def test_a_new_commit_is_seen(self, repos: MLRepos, publish: Publish) -> None:
        first = repos.resolve(publish(REPOSITORY, None), None, "sklearn")
        changed = {**REPOSITORY, "model_manager.py": "class ModelManager:\n    steps = 2\n"}
        second = repos.resolve(publish(changed, None), None, "sklearn")
        assert first.commit != second.commit
        assert first.bundle != second.bundle

    def test_code_keeps_the_environments_key(self, repos: MLRepos, publish: Publish) -> None:
        first = repos.resolve(publish(REPOSITORY, None), None, "sklearn")
        changed = {**REPOSITORY, "model_manager.py": "class ModelManager:\n    steps = 3\n"}
        assert repos.resolve(publish(changed, None), None, "sklearn").environment_key == first.environment_key

    def test_dependencies_and_flavor_change_the_environments_key(
        self, repos: MLRepos, publish: Publish
    ) -> None:
        url = publish(REPOSITORY, None)
        keys = {repos.resolve(url, None, flavor).environment_key for flavor in ("sklearn", "pytorch")}
        changed = {**REPOSITORY, "requirements.txt": "numpy<3\n"}
        keys.add(repos.resolve(url, None, "sklearn", needs_gpu=True).environment_key)
        keys.add(repos.resolve(publish(changed, None), None, "sklearn").environment_key)
        assert len(keys) == 4

    def test_another_reference_is_found(self, repos: MLRepos, publish: Publish) -> None:
        default = repos.resolve(publish(REPOSITORY, None), None, "sklearn")
        changed = {**REPOSITORY, "model_manager.py": "class ModelManager:\n    steps = 4\n"}
        url = publish(changed, "experiment")
        assert repos.resolve(url, "experiment", "sklearn").commit != default.commit

    def test_an_unknown_reference_is_named(self, repos: MLRepos, publish: Publish) -> None:
        url = publish(REPOSITORY, None)
        with pytest.raises(FlopsError) as caught:
            repos.resolve(url, "no-such-branch", "sklearn")
        assert caught.value.code is ErrorCode.REPO_REF_NOT_FOUND
        assert "no-such-branch" in caught.value.message

    def test_an_unknown_repository_is_unreachable(self, repos: MLRepos) -> None:
        with pytest.raises(FlopsError) as caught:
            repos.resolve("file:///nope", None, "sklearn")
        assert caught.value.code is ErrorCode.REPO_UNREACHABLE
        assert "/nope" in caught.value.message
