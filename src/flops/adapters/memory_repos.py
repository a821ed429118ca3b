"""Git repositories in memory: what tests of the manager use in place of Git."""

from __future__ import annotations

import hashlib

from flops.core.ids import EnvironmentKey
from flops.core.project import Repository
from flops.errors import ErrorCode, FlopsError
from flops.ports import Blobs


class MemoryRepos:
    """Implements `flops.ports.MLRepos`; `add` and `fail` say what is found where.

    Args:
        blobs: gets the bundles.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._trees: dict[tuple[str, str | None], tuple[bytes, str]] = {}
        self._errors: dict[str, FlopsError] = {}

    def add(self, url: str, tree: bytes, *, ref: str | None = None, dependencies: str = "numpy") -> None:
        """Put a tree at a URL, under a reference or (None) as the default branch."""
        self._trees[url, ref] = (tree, dependencies)

    def fail(self, url: str, error: FlopsError | None) -> None:
        """Have every look at a URL fail, until it is called with None."""
        if error is None:
            self._errors.pop(url, None)
        else:
            self._errors[url] = error

    def resolve(self, url: str, ref: str | None, flavor: str, *, needs_gpu: bool = False) -> Repository:
        """Find the tree at a URL and reference.

        Raises:
            FlopsError: ``repo_unreachable``, ``repo_ref_not_found``, or what `fail` was given.
        """
        if url in self._errors:
            raise self._errors[url]
        if not any(known == url for known, _ref in self._trees):
            raise FlopsError(ErrorCode.REPO_UNREACHABLE, f"There is no repository at {url}.")
        if (url, ref) not in self._trees:
            raise FlopsError(ErrorCode.REPO_REF_NOT_FOUND, f"The repository {url} has no {ref}.")
        tree, dependencies = self._trees[url, ref]
        key = hashlib.sha256(f"{dependencies}\n{flavor}\n{needs_gpu}".encode()).hexdigest()
        return Repository(
            commit=hashlib.sha1(tree, usedforsecurity=False).hexdigest(),
            bundle=self._blobs.put(tree),
            dependency_file="requirements.txt",
            environment_key=EnvironmentKey(key),
        )
