"""ML repositories in Git: a reference becomes a commit, its tree a bundle in the blobs.

`git` fetches one commit without history, into a temporary folder. What is remembered is the bundle of a
commit of a URL, so that a second resolve needs one look at the remote's references, or not even that for a
full commit hash.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flops.command import Completed, run_command
from flops.core.ids import Digest
from flops.core.ml_repository import environment_key, read_ml_repository
from flops.core.project import Repository
from flops.core.retention import Entry, Limits, choose_victims
from flops.durable_file import file_error, write_durably
from flops.errors import ErrorCode, FlopsError
from flops.log import redact
from flops.ports import Blobs

_FULL_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_BAD_REF = re.compile(r"^[-/.]|\.\.|@\{|[\x00-\x20\x7f~^:?*\[\\]|[/.]$|\.lock$")
_SCHEMES = ("https", "http", "ssh", "git", "file")
_SAFE_OPTIONS = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "gc.auto=0",
    "maintenance.auto=false",
    "protocol.version=2",
    "submodule.recurse=false",
    "advice.detachedHead=false",
    "http.lowSpeedLimit=1000",
    "http.lowSpeedTime=30",
)
_MISSING_REF = ("not our ref", "couldn't find remote ref", "unadvertised object", "remote error: upload-pack")
_FULL_DISK = "no space left on device"
_KEEP_SMALL = "Keep data and weights out of the repository: data comes from the nodes, by tag."
_REMEMBERED = 1_000  # commits whose bundle is known
_SYMLINK, _EXECUTABLE, _SUBMODULE = "120000", "100755", "160000"


@dataclass(frozen=True)
class _Entry:
    """A file of a commit's tree."""

    mode: str
    object_id: str
    size_bytes: int
    path: str


class GitRepos:
    """Implements `flops.ports.MLRepos` with the `git` of this machine.

    Args:
        blobs: where bundles are put.
        cache_dir: remembers which commits have which bundle.
        environ: environment of `git`; its own credential helpers and SSH keys work, prompts do not.
        mlflow_version: the MLflow that will save models; part of the environment's key.
        platform: machine and Python that environments are locked for; likewise.
        timeout_s: for everything that talks to the remote.
        max_bytes: the largest tree, unpacked, that is accepted.
    """

    def __init__(
        self,
        blobs: Blobs,
        cache_dir: Path,
        *,
        environ: Mapping[str, str],
        mlflow_version: str,
        platform: str,
        timeout_s: float = 120.0,
        max_bytes: int = 128 * 1_048_576,
    ) -> None:
        self._blobs = blobs
        self._cache_dir = cache_dir
        self._fetching = cache_dir / "fetching"
        self._environ = _git_environment(environ)
        self._mlflow_version = mlflow_version
        self._platform = platform
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes

    def resolve(self, url: str, ref: str | None, flavor: str, *, needs_gpu: bool = False) -> Repository:
        """Pin a reference to a commit, check the repository contract, and store the tree as a bundle.

        Args:
            url: any URL that `git` takes, or a path on this machine.
            ref: branch, tag or full commit hash; the remote's HEAD when None.
            flavor: the MLflow flavor of the model.
            needs_gpu: whether its environment may have CUDA.

        Raises:
            FlopsError: ``repo_unreachable``, ``repo_ref_not_found``, ``repo_contract_broken``,
                ``dependencies_invalid``, ``disk_full``.
        """
        _check_url(url)
        name, commit = self._find_commit(url, ref)
        bundle = self._remembered(url, commit) if commit else None
        if bundle is None:
            commit, bundle = self._fetch(url, name)
        contents = _read_bundle(self._blobs.get(bundle))
        repository = read_ml_repository(contents)
        key = environment_key(
            repository,
            flavor,
            mlflow_version=self._mlflow_version,
            platform=self._platform,
            needs_gpu=needs_gpu,
        )
        return Repository(
            commit=commit,
            bundle=bundle,
            dependency_file=repository.dependencies.file,
            environment_key=key,
        )

    def sweep(self) -> None:
        """Remove what killed managers left, and all but the last used of what is remembered.

        Raises:
            FlopsError: ``file_unreadable``.
        """
        try:
            self._sweep_fetches()
            records = [
                Entry(key=str(path), used_at_s=path.stat().st_mtime)
                for folder in self._cache_dir.glob("*")
                if _FULL_HASH.fullmatch(folder.name)
                for path in folder.iterdir()
            ]
            for record in choose_victims(records, Limits(max_count=_REMEMBERED), 0.0):
                Path(record.key).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # others are in it
                    Path(record.key).parent.rmdir()
        except OSError as exc:
            raise file_error(exc, self._cache_dir) from exc

    def _find_commit(self, url: str, ref: str | None) -> tuple[str, str]:
        """What to fetch, and the commit it stands for now."""
        if ref is not None and _FULL_HASH.fullmatch(ref):
            return ref, ref
        if ref is not None and _BAD_REF.search(ref):
            raise _no_ref(url, ref, "that is not a name Git allows")
        wanted = [ref, f"{ref}^{{}}"] if ref is not None else ["HEAD"]
        with self._scratch() as folder:
            done = self._git(folder, ["ls-remote", "--", url, *wanted])
        if done.exit_code != 0 or done.is_timed_out:
            raise self._unreachable(url, done)
        found: dict[str, str] = {}
        for line in done.output.decode(errors="replace").splitlines():
            commit, _, name = line.partition("\t")
            found[name] = commit
        for name in [ref, f"refs/tags/{ref}", f"refs/heads/{ref}"] if ref is not None else ["HEAD"]:
            if name in found:
                return name, found.get(f"{name}^{{}}", found[name])
        if ref is None:
            raise _no_ref(url, "HEAD", "the repository has no commit on its default branch")
        raise _no_ref(url, ref, "the remote has no such branch or tag (commits are named by their full hash)")

    def _fetch(self, url: str, name: str) -> tuple[str, Digest]:
        """Fetch one commit and store its tree; returns the commit's hash and the bundle."""
        options = ["--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules"]
        with self._scratch() as folder:
            self._run(folder, ["init", "--quiet", "--bare", "."])
            fetched = self._git(folder, ["fetch", *options, "--", url, name], is_size_watched=True)
            if fetched.stopped_because:
                raise FlopsError(ErrorCode.REPO_CONTRACT_BROKEN, fetched.stopped_because, hint=_KEEP_SMALL)
            if fetched.exit_code != 0 or fetched.is_timed_out:
                raise self._fetch_error(url, name, fetched)
            commit = self._run(folder, ["rev-parse", "--verify", "FETCH_HEAD^{commit}"]).decode().strip()
            digest = self._blobs.put(_bundle(self._tree(folder, commit)))
        write_durably(self._record(url, commit), digest)
        return commit, digest

    def _tree(self, folder: Path, commit: str) -> Iterator[tuple[_Entry, bytes]]:
        listing = self._run(folder, ["ls-tree", "-r", "-z", "-l", "--full-tree", commit])
        entries = [_parse_entry(line) for line in listing.split(b"\0") if line]
        entries = [entry for entry in entries if entry.mode != _SUBMODULE]
        total = sum(entry.size_bytes for entry in entries)
        if total > self._max_bytes:
            largest = max(entries, key=lambda entry: entry.size_bytes)
            raise FlopsError(
                ErrorCode.REPO_CONTRACT_BROKEN,
                f"The repository is too large: its files have {total:,} bytes at {commit[:12]}, "
                f"{self._max_bytes:,} are allowed; the largest is {largest.path} "
                f"({largest.size_bytes:,} bytes).",
                hint=_KEEP_SMALL,
            )
        wanted = "".join(f"{entry.object_id}\n" for entry in entries).encode()
        stream = io.BytesIO(self._run(folder, ["cat-file", "--batch"], send=wanted))
        for entry in sorted(entries, key=lambda entry: entry.path):
            _check_link(entry)
        contents: dict[str, bytes] = {}
        for entry in entries:
            stream.readline()
            contents[entry.path] = stream.read(entry.size_bytes)
            stream.read(1)
        for entry in sorted(entries, key=lambda entry: entry.path):
            yield entry, contents[entry.path]

    def _remembered(self, url: str, commit: str) -> Digest | None:
        record = self._record(url, commit)
        try:
            os.utime(record)
            digest = Digest(record.read_text().strip())
        except FileNotFoundError:
            return None
        return digest if self._blobs.has(digest) else None

    def _record(self, url: str, commit: str) -> Path:
        return self._cache_dir / hashlib.sha256(url.encode()).hexdigest() / commit

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder for one fetch; what killed managers left behind goes first."""
        try:
            self._sweep_fetches()
            folder = self._fetching
            with contextlib.ExitStack() as held:
                with _held(folder):  # nobody may sweep away a folder before it is marked as in use
                    scratch = tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)
                    name = Path(held.enter_context(scratch))
                    held.enter_context(_held(name))
                yield name
        except OSError as exc:
            raise file_error(exc, self._cache_dir) from exc

    def _sweep_fetches(self) -> None:
        self._fetching.mkdir(parents=True, exist_ok=True)
        with _held(self._fetching):
            for old in self._fetching.iterdir():
                _remove_if_abandoned(old)

    def _git(
        self,
        folder: Path,
        arguments: Iterable[str],
        *,
        send: bytes = b"",
        is_size_watched: bool = False,
    ) -> Completed:
        options = [part for option in _SAFE_OPTIONS for part in ("-c", option)]

        def watch(_news: str) -> str | None:
            # Packed, a tree is smaller than unpacked; this only keeps a hopeless fetch from filling the disk.
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            return f"The repository is too large: more than {size:,} bytes came." if size > limit else None

        limit = self._max_bytes if is_size_watched else 2**63
        return run_command(
            ["git", *options, *arguments],
            environ=self._environ,
            cwd=folder,
            timeout_s=self._timeout_s,
            send=send,
            watch=watch if is_size_watched else lambda _: None,
        )

    def _run(self, folder: Path, arguments: list[str], *, send: bytes = b"") -> bytes:
        done = self._git(folder, arguments, send=send)
        if _FULL_DISK in done.errors.lower():
            raise FlopsError(ErrorCode.DISK_FULL, f"The disk of {self._cache_dir} is full.")
        if done.exit_code != 0:
            raise FlopsError(
                ErrorCode.INTERNAL, f"git {arguments[0]} ended with {done.exit_code}: {_say(done)}."
            )
        return done.output

    def _fetch_error(self, url: str, name: str, done: Completed) -> FlopsError:
        text = done.errors.lower()
        if _FULL_DISK in text:
            return FlopsError(ErrorCode.DISK_FULL, f"The disk of {self._cache_dir} is full.")
        if any(sign in text for sign in _MISSING_REF):
            return _no_ref(url, name, "the remote does not have it")
        return self._unreachable(url, done)

    def _unreachable(self, url: str, done: Completed) -> FlopsError:
        reason = f"no answer within {self._timeout_s:g} s" if done.is_timed_out else _say(done)
        return FlopsError(
            ErrorCode.REPO_UNREACHABLE,
            f"The repository {redact(url)} cannot be reached: {reason}.",
            details={"output": redact(done.errors[-2_000:])},
        )


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Mark a folder as in use until this process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_if_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else was faster, or it is in use
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _git_environment(environ: Mapping[str, str]) -> dict[str, str]:
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith("GIT_") or name.startswith(("GIT_SSL_", "GIT_SSH", "GIT_CONFIG_"))
    }
    kept.setdefault("GIT_SSH_COMMAND", "ssh -oBatchMode=yes -oConnectTimeout=15")
    return kept | {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": ":".join(_SCHEMES),
        "GCM_INTERACTIVE": "never",
        "LC_ALL": "C",
    }


def _check_url(url: str) -> None:
    scheme, separator, _ = url.partition("://")
    is_helper = re.match(r"[A-Za-z0-9+.-]+::", url) is not None
    if url.startswith("-") or not url.isprintable() or not url.strip() or is_helper:
        raise FlopsError(ErrorCode.REPO_UNREACHABLE, f"{url!r} is not the URL of a Git repository.")
    if separator and scheme.lower() not in _SCHEMES:
        raise FlopsError(
            ErrorCode.REPO_UNREACHABLE,
            f"The repository {redact(url)} cannot be reached: {scheme!r} is none of {', '.join(_SCHEMES)}.",
        )


def _no_ref(url: str, ref: str, reason: str) -> FlopsError:
    return FlopsError(ErrorCode.REPO_REF_NOT_FOUND, f"{ref!r} was not found in {redact(url)}: {reason}.")


def _say(done: Completed) -> str:
    """The line of git's output that names the problem."""
    lines = [line.strip() for line in done.errors.splitlines() if line.strip()]
    told = (
        [line for line in lines if line.startswith(("fatal:", "remote:", "error:", "ssh:"))]
        or lines
        or ["no output"]
    )
    text = told[0].split(":", 1)[-1].strip() if told[0].startswith(("fatal:", "error:")) else told[0]
    return redact(text.rstrip(".")[:300])


def _parse_entry(line: bytes) -> _Entry:
    facts, _, path = line.partition(b"\t")
    mode, _kind, object_id, size = facts.decode().split()
    return _Entry(mode, object_id, int(size) if size != "-" else 0, path.decode(errors="surrogateescape"))


def _check_link(entry: _Entry) -> None:
    parts = PurePosixPath(entry.path).parts
    if not parts or ".." in parts or entry.path.startswith("/") or ".git" in parts:
        raise FlopsError(ErrorCode.REPO_CONTRACT_BROKEN, f"The repository has a file named {entry.path!r}.")


def _bundle(files: Iterable[tuple[_Entry, bytes]]) -> bytes:
    """A tar.gz that depends on names, modes and contents only."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", filename="", mtime=0, compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for entry, content in files:
            member = tarfile.TarInfo(entry.path)
            member.mode = 0o755 if entry.mode == _EXECUTABLE else 0o644
            if entry.mode == _SYMLINK:
                member.type = tarfile.SYMTYPE
                member.linkname = _inner_link(entry.path, content.decode(errors="surrogateescape"))
                archive.addfile(member)
                continue
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _inner_link(path: str, target: str) -> str:
    depth = len(PurePosixPath(path).parts) - 1
    for part in PurePosixPath(target).parts:
        depth += -1 if part == ".." else 1
        if depth < 0 or part == "/":
            raise FlopsError(
                ErrorCode.REPO_CONTRACT_BROKEN,
                f"The link {path} leads out of the repository, to {target!r}.",
            )
    return target


def _read_bundle(data: bytes) -> dict[str, bytes]:
    """The files of a bundle that decide its contract and environment: Python and the root's files."""
    contents: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for member in archive:
            is_wanted = member.name.endswith(".py") or "/" not in member.name
            if is_wanted and (file := _extract(archive, member)) is not None:
                contents[member.name] = file
    return contents


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    try:
        file = archive.extractfile(member)
    except KeyError:  # a link to a file that is not in the repository
        return None
    return file.read() if file is not None else None
