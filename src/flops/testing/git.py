"""Git repositories made for tests."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from flops.settings import inherited_environment

_IDENTITY = {
    "GIT_AUTHOR_NAME": "Test",
    "GIT_AUTHOR_EMAIL": "test@example.org",
    "GIT_COMMITTER_NAME": "Test",
    "GIT_COMMITTER_EMAIL": "test@example.org",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
}


class GitRepository:
    """A repository in a folder, with `main` as its default branch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.run("init", "--quiet", "--initial-branch=main")

    @property
    def url(self) -> str:
        """Its URL."""
        return f"file://{self.folder}"

    def commit(self, files: Mapping[str, str | bytes], *, branch: str | None = None) -> str:
        """Replace the tree by these files, on a branch made when it is new; returns the commit's hash."""
        if branch is not None:
            self.run("checkout", "--quiet", "-B", branch)
        for path in self.folder.iterdir():
            if path.name != ".git":
                self.run("rm", "-r", "--quiet", "--force", "--ignore-unmatch", path.name)
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.run("add", "--all")
        self.run("commit", "--quiet", "--allow-empty", "--message", "change")
        commit = self.run("rev-parse", "HEAD")
        if branch is not None:
            self.run("checkout", "--quiet", "main")
        return commit

    def run(self, *arguments: str) -> str:
        """Run git in the repository; returns its output."""
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.folder,
            env={**inherited_environment(), **_IDENTITY},
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()
