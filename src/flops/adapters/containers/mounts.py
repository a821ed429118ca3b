"""What a container sees of its node: the service's own files; without an image, the node's programs too.

A service without an image runs in an empty one, which holds only places to mount things at: the node's
system folders and the service's interpreter, read-only, at the paths that they have on the node. So the same
command, variables and context work in a process and in a container.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import flops
from flops.core.reach import Reach

TEMPORARY_FOLDER = "/tmp"  # noqa: S108 (a file system of the container's own)
_TEMPORARY_BYTES = 64 * 1024**2
_SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32")
_LINKS = {"sbin/ldconfig": "/usr/sbin/ldconfig"}  # Python looks for libraries by it
_SYSTEM_FILES = (  # of /etc; the rest may hold secrets
    "alternatives", "ca-certificates", "group", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime",
    "mime.types", "nsswitch.conf", "passwd", "pki", "protocols", "services", "ssl",
)  # fmt: skip
# Docker mounts its init into /sbin, which therefore is no part of the node's /usr.
_MOUNT_POINTS = ("dev", "etc", "proc", "run", "sbin", "sys", "tmp")
_FILE_VARIABLES = (
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)  # fmt: skip
_MOST_LINKS = 20
_OWN_PROGRAMS = (sys.prefix, sys.base_prefix, str(Path(flops.__file__).resolve().parents[1]))


def binds_of(argv: Sequence[str], env: Mapping[str, str], work_dir: Path, reach: Reach | None) -> list[str]:
    """A container's bind mounts, as ``path:path:options``; outer folders come before those in them.

    Args:
        argv: command line; its program is made visible unless an image brings it.
        env: its variables; certificates that they name are made visible.
        work_dir: the service's own folder.
        reach: what else it may use; None for this process's own programs.
    """
    readable = {*(reach.readable if reach is not None else _OWN_PROGRAMS)}
    if reach is None or not reach.image:
        readable |= {*_system(), *_program_folders(argv[0])}
    readable |= {env[name] for name in _FILE_VARIABLES if env.get(name)}
    writable = {str(work_dir), *(reach.writable if reach is not None else ())}
    options = {path: "ro" for path in readable if path} | dict.fromkeys(writable, "rw")
    return [
        f"{path}:{path}:{option},rprivate"
        for path, option in sorted(options.items(), key=lambda entry: entry[0].rstrip("/") + "/")
        if Path(path).is_absolute() and Path(path).exists() and not _is_within(path, options)
    ]


def _is_within(path: str, options: Mapping[str, str]) -> bool:
    """Whether a folder above shows the path already, with the same rights or for reading."""
    above = next((str(p) for p in Path(path).parents if str(p) in options), None)
    return above is not None and options[path] in {options[above], "ro"}


def _system() -> Iterator[str]:
    yield from (path for path in _SYSTEM_FOLDERS if Path(path).is_dir() and not Path(path).is_symlink())
    yield from (f"/etc/{name}" for name in _SYSTEM_FILES if Path(f"/etc/{name}").exists())


def _program_folders(program: str) -> Iterator[str]:
    """The folders of a program and of every link on the way to it: each holds ``bin``."""
    path = Path(program)
    for _ in range(_MOST_LINKS):
        if not path.is_absolute() or not path.exists():
            return
        for folder in (path.parent.parent, path.parent.resolve().parent):
            if folder != Path("/"):
                yield str(folder)
        if not path.is_symlink():
            return
        path = path.parent / path.readlink()


def temporary_files() -> dict[str, str]:
    """The container's own file systems in memory; what is large goes to the work folder, by ``TMPDIR``."""
    return {TEMPORARY_FOLDER: f"rw,nosuid,nodev,mode=1777,size={_TEMPORARY_BYTES}"}


@functools.cache
def empty_root() -> tuple[str, bytes]:
    """Name and tar archive of the image for services without one; the same on every start of this node."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in _MOUNT_POINTS:
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            archive.addfile(folder)
        links = {path[1:]: str(Path(path).readlink()) for path in _SYSTEM_FOLDERS if Path(path).is_symlink()}
        for name, target in (links | _LINKS).items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
    data = buffer.getvalue()
    return f"localhost/flops-node-{hashlib.sha256(data).hexdigest()[:12]}", data


def give_to(user: int, folders: Iterable[Path]) -> None:
    """Make a user the owner of folders with all that is in them; links are not followed.

    Raises:
        OSError: the node's user may not.
    """
    for folder in folders:
        if folder.is_symlink() or not folder.is_dir():
            continue
        for _, names, files, descriptor in os.fwalk(folder, follow_symlinks=False):
            if os.fstat(descriptor).st_uid != user:
                os.chown(descriptor, user, user)
            for name in (*names, *files):
                if os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_uid != user:
                    os.chown(name, user, user, dir_fd=descriptor, follow_symlinks=False)
