"""Git repositories: references, broken contracts, hostile and unreachable ones, and kills."""

from __future__ import annotations

import io
import os
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.git_repos import GitRepos
from flops.adapters.memory_blobs import MemoryBlobs
from flops.command import StoppedError, stopped_when
from flops.errors import ErrorCode, FlopsError
from flops.settings import inherited_environment
from flops.testing.contracts.ml_repos import REPOSITORY
from flops.testing.git import GitRepository


@pytest.fixture
def blobs() -> MemoryBlobs:
    return MemoryBlobs()


@pytest.fixture
def repository(tmp_path: Path) -> GitRepository:
    return GitRepository(tmp_path / "repository")


def open_repos(blobs: MemoryBlobs, folder: Path, **options: float) -> GitRepos:
    return GitRepos(
        blobs,
        folder,
        environ=inherited_environment(),
        mlflow_version="3.17.2",
        platform="test",
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture
def repos(blobs: MemoryBlobs, tmp_path: Path) -> GitRepos:
    return open_repos(blobs, tmp_path / "cache")


def error_of(repos: GitRepos, url: str, ref: str | None = None) -> FlopsError:
    with pytest.raises(FlopsError) as caught:
        repos.resolve(url, ref, "sklearn")
    return caught.value


def test_branch_tag_annotated_tag_and_hash(repos: GitRepos, repository: GitRepository) -> None:
    old = repository.commit(REPOSITORY)
    repository.run("tag", "v1")
    repository.run("tag", "--annotate", "--message", "x", "v1-annotated")
    new = repository.commit({**REPOSITORY, "README.md": "new"})
    assert repos.resolve(repository.url, None, "sklearn").commit == new
    for ref in ("v1", "v1-annotated", "refs/tags/v1", old):
        assert repos.resolve(repository.url, ref, "sklearn").commit == old, ref
    for ref in ("main", "refs/heads/main", "HEAD", new):
        assert repos.resolve(repository.url, ref, "sklearn").commit == new, ref


def test_a_path_is_a_url(repos: GitRepos, repository: GitRepository) -> None:
    commit = repository.commit(REPOSITORY)
    assert repos.resolve(str(repository.folder), None, "sklearn").commit == commit


def test_the_bundle_is_the_tree_and_nothing_else(
    repos: GitRepos, repository: GitRepository, blobs: MemoryBlobs, tmp_path: Path
) -> None:
    files: dict[str, str | bytes] = {**REPOSITORY, "src/module.py": "x = 1\n", "größe.bin": b"\0\xff"}
    repository.commit(files)
    (repository.folder / "link").symlink_to("src/module.py")
    (repository.folder / "src/module.py").chmod(0o755)
    repository.run("add", "--all")
    repository.run("commit", "--quiet", "--message", "link")
    found = repos.resolve(repository.url, None, "sklearn")
    with tarfile.open(fileobj=io.BytesIO(blobs.get(found.bundle))) as archive:
        members = {member.name: member for member in archive}
        assert list(members) == sorted([*files, "link"])
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in archive} == {(0, 0, 0, "")}
        assert members["link"].linkname == "src/module.py"
        assert members["src/module.py"].mode & 0o111
    again = open_repos(MemoryBlobs(), tmp_path / "other").resolve(repository.url, None, "sklearn")
    assert again.bundle == found.bundle


def test_a_second_resolve_fetches_nothing(repos: GitRepos, repository: GitRepository, tmp_path: Path) -> None:
    commit = repository.commit(REPOSITORY)
    first = repos.resolve(repository.url, None, "sklearn")
    repository.folder.rename(tmp_path / "gone")
    assert repos.resolve(repository.url, commit, "sklearn") == first
    assert error_of(repos, repository.url).code is ErrorCode.REPO_UNREACHABLE


def test_a_bundle_that_was_cleared_is_made_again(repository: GitRepository, tmp_path: Path) -> None:
    repository.commit(REPOSITORY)
    first = open_repos(MemoryBlobs(), tmp_path / "cache").resolve(repository.url, None, "sklearn")
    blobs = MemoryBlobs()
    assert open_repos(blobs, tmp_path / "cache").resolve(repository.url, None, "sklearn") == first
    assert blobs.has(first.bundle)


def test_what_a_killed_fetch_left_is_removed(
    repos: GitRepos, repository: GitRepository, tmp_path: Path
) -> None:
    left = tmp_path / "cache" / "fetching" / "tmpkilled"
    left.mkdir(parents=True)
    (left / "pack").write_bytes(b"x")
    repository.commit(REPOSITORY)
    repos.resolve(repository.url, None, "sklearn")
    assert list((tmp_path / "cache" / "fetching").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_manager.py": None}, "model_manager.py is not in the root"),
        ({"data_manager.py": None}, "data_manager.py is not in the root"),
        (
            {"model_manager.py": "class Other: pass\n"},
            "model_manager.py does not define the class ModelManager",
        ),
        ({"data_manager.py": "x = 1\nclass DataManager(\n"}, "data_manager.py, line 2"),
        ({"data_manager.py": "\0"}, "data_manager.py"),
    ],
)
def test_a_broken_contract_is_named(
    repos: GitRepos, repository: GitRepository, change: dict[str, str | None], expected: str
) -> None:
    files = {**REPOSITORY, **change}
    repository.commit({name: content for name, content in files.items() if content is not None})
    error = error_of(repos, repository.url)
    assert error.code is ErrorCode.REPO_CONTRACT_BROKEN
    assert expected in error.message


def test_no_or_malformed_dependencies(repos: GitRepos, repository: GitRepository) -> None:
    code = {name: text for name, text in REPOSITORY.items() if name.endswith(".py")}
    repository.commit(code)
    assert error_of(repos, repository.url).code is ErrorCode.DEPENDENCIES_INVALID
    repository.commit({**code, "requirements.txt": "numpy\n--index-url http://evil\n"})
    error = error_of(repos, repository.url)
    assert error.code is ErrorCode.DEPENDENCIES_INVALID
    assert "line 2" in error.message


def test_a_huge_file_is_refused(blobs: MemoryBlobs, repository: GitRepository, tmp_path: Path) -> None:
    repository.commit({**REPOSITORY, "weights.bin": b"\0" * 3_000_000})
    error = error_of(open_repos(blobs, tmp_path / "cache", max_bytes=1_000_000), repository.url)
    assert error.code is ErrorCode.REPO_CONTRACT_BROKEN
    assert "weights.bin" in error.message


def test_a_huge_fetch_is_refused(blobs: MemoryBlobs, repository: GitRepository, tmp_path: Path) -> None:
    repository.commit({**REPOSITORY, "weights.bin": os.urandom(3_000_000)})
    error = error_of(open_repos(blobs, tmp_path / "cache", max_bytes=1_000_000), repository.url)
    assert error.code is ErrorCode.REPO_CONTRACT_BROKEN
    assert "too large" in error.message
    assert list((tmp_path / "cache" / "fetching").iterdir()) == []


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "a/../../outside"])
def test_a_link_out_of_the_tree_is_refused(repos: GitRepos, repository: GitRepository, target: str) -> None:
    repository.commit(REPOSITORY)
    (repository.folder / "link").symlink_to(target)
    repository.run("add", "--all")
    repository.run("commit", "--quiet", "--message", "link")
    error = error_of(repos, repository.url)
    assert error.code is ErrorCode.REPO_CONTRACT_BROKEN
    assert target in error.message


def test_a_submodule_is_left_out(repos: GitRepos, repository: GitRepository, blobs: MemoryBlobs) -> None:
    commit = repository.commit(REPOSITORY)
    repository.run("update-index", "--add", "--cacheinfo", f"160000,{commit},module")
    repository.run("commit", "--quiet", "--message", "module")
    found = repos.resolve(repository.url, None, "sklearn")
    with tarfile.open(fileobj=io.BytesIO(blobs.get(found.bundle))) as archive:
        assert "module" not in archive.getnames()


@pytest.mark.parametrize(
    "url",
    [
        "file:///nope",
        "/nope",
        "http://127.0.0.1:1/x",
        "--upload-pack=touch /tmp/x",
        "ext::sh -c true",
        "",
        "a\nb",
        "ftp://127.0.0.1/x",
    ],
)
def test_what_cannot_be_reached_is_refused(repos: GitRepos, url: str) -> None:
    error = error_of(repos, url)
    assert error.code is ErrorCode.REPO_UNREACHABLE
    assert len(error.message) < 500


def test_a_password_is_not_told(repos: GitRepos) -> None:
    error = error_of(repos, "http://user:s3cret@127.0.0.1:1/x")
    assert "s3cret" not in str(error.to_dict())


@pytest.mark.parametrize(
    "ref", ["missing", "-x", "--upload-pack=x", "a b", "ma*", "a..b", "0" * 40, "x^{tree}"]
)
def test_a_reference_that_is_not_there(repos: GitRepos, repository: GitRepository, ref: str) -> None:
    repository.commit(REPOSITORY)
    error = error_of(repos, repository.url, ref)
    assert error.code is ErrorCode.REPO_REF_NOT_FOUND
    assert ref in error.message


def test_a_repository_without_commits(repos: GitRepos, repository: GitRepository) -> None:
    assert error_of(repos, repository.url).code is ErrorCode.REPO_REF_NOT_FOUND


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join()
    for connection in connections:
        connection.close()


def test_a_silent_server_is_given_up(blobs: MemoryBlobs, tmp_path: Path, silent_server: int) -> None:
    repos = open_repos(blobs, tmp_path / "cache", timeout_s=0.5)
    started = time.monotonic()
    error = error_of(repos, f"http://127.0.0.1:{silent_server}/x")
    assert error.code is ErrorCode.REPO_UNREACHABLE
    assert "0.5 s" in error.message
    assert time.monotonic() - started < 5


def test_a_sweep_keeps_what_was_used_last_and_what_is_being_fetched(
    blobs: MemoryBlobs, repository: GitRepository, tmp_path: Path
) -> None:
    repository.commit(REPOSITORY)
    cache = tmp_path / "cache"
    repos = open_repos(blobs, cache)
    used = repos.resolve(repository.url, None, "sklearn")
    other = cache / ("0" * 64)
    other.mkdir()
    for number in range(1_010):
        (other / f"{number:040x}").write_text(used.bundle)
        os.utime(other / f"{number:040x}", (number, number))
    records = [path for folder in cache.iterdir() if folder.name != "fetching" for path in folder.iterdir()]
    os.utime(next(path for path in records if path.parent != other), (1, 1))
    assert repos.resolve(repository.url, None, "sklearn") == used  # used once more
    left = cache / "fetching" / "tmpkilled"
    with repos._scratch() as fetching:
        left.mkdir()
        repos.sweep()
        assert fetching.exists()
    assert not left.exists()
    assert len(list(other.iterdir())) == 999
    assert not (other / f"{10:040x}").exists()
    repository.folder.rename(tmp_path / "gone")
    assert repos.resolve(repository.url, used.commit, "sklearn") == used


def test_many_at_once(repos: GitRepos, repository: GitRepository) -> None:
    repository.commit(REPOSITORY)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(repos.resolve(repository.url, None, "sklearn").bundle))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert len(set(found)) == 1


def test_a_fetch_that_nobody_needs_any_more_ends_and_leaves_nothing(
    blobs: MemoryBlobs, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"git://127.0.0.1:{silent.getsockname()[1]}/x"
        with stopped_when(lambda: time.monotonic() - started > 0.5), pytest.raises(StoppedError):
            open_repos(blobs, cache).resolve(url, None, "sklearn")
    assert time.monotonic() - started < 5
    assert list((cache / "fetching").iterdir()) == []
