"""Keeps a service's process to its own files, processes and ports: Landlock, namespaces, rlimits, seccomp.

`confine` is called between fork and exec; what it sets holds for the process and all its descendants, for
good. No part of it needs root. As root, the service also gets a ``/dev/shm`` and System V IPC of its own that
vanish with it, and loses the capabilities that reach beyond files. It uses the standard library only, because
the shim runs without site-packages.

Landlock allows by path and takes nothing back, so "everything but the node's own folders" is said by allowing
whatever lies beside the path to them. What is hidden cannot be opened or listed; that it exists can be seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flops.network_rules import can_restrict, check, landlock_version, restrict

LIMITS = ("files", "network", "signals")
VARIABLE = "FLOPS_CONFINEMENT"  # for services that first part with what may not be confined
OPEN_FILES = 16_384  # of one process

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_PATH_BENEATH = 1
_FILES_VERSION = 3  # before Linux 6.2 files outside could be cut to nothing
_SIGNALS_VERSION = 6  # Linux 6.12
_NEWER_RIGHTS = ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15))  # version, right: refer, truncate, device ioctl

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_FOLDER = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_DEVICES = 1 << 6 | 1 << 11
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15
_ALL = (1 << 16) - 1
_READ = _EXECUTE | _READ_FILE | _READ_FOLDER
_WRITE = _ALL & ~_MAKE_DEVICES
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
_SCOPES = 1 << 0 | 1 << 1  # abstract UNIX sockets, signals

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "dri", "kfd")
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 (that it is shared is why it is replaced)

_NEW_MOUNTS, _NEW_IPC = 0x0002_0000, 0x0800_0000
_MOUNT_NOSUID, _MOUNT_NODEV, _MOUNT_RECURSIVE, _MOUNT_SLAVE = 0x2, 0x4, 0x4000, 0x8_0000
_DROP_CAPABILITY, _NO_NEW_PRIVILEGES = 24, 38  # options of prctl(2)
_KEPT_CAPABILITIES = frozenset({0, 1, 3, 4, 10})  # what root may do with files, and ports below 1024
_LAST_CAPABILITY = 63

_GIVES_WAY = 500  # of all processes, services are the ones to be ended when the machine runs out of memory

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Confinement:
    """What a service may use.

    Args:
        hidden: files and folders that it may not use; everything else can be read, apart from devices.
        readable: what it may read although it is hidden.
        writable: folders that it may write to. Nothing else can be written.
        devices: files in /dev that it may open, beside those of terminals and the like.
        dials: TCP ports that it may connect to; None for any network.
        listens: TCP ports that it may listen at, if `dials` says something.
    """

    hidden: tuple[str, ...]
    readable: tuple[str, ...]
    writable: tuple[str, ...]
    devices: tuple[str, ...] = ()
    dials: tuple[int, ...] | None = None
    listens: tuple[int, ...] = ()


def told_confinement(environ: Mapping[str, str]) -> Confinement | None:
    """How this process is to confine itself; None when it is confined already, or not at all."""
    text = environ.get(VARIABLE, "")
    return Confinement(**json.loads(text)) if text else None


def give_way() -> None:
    """Have this process and its descendants ended before others when the machine runs out of memory."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_GIVES_WAY))


def limits() -> tuple[tuple[str, ...], str]:
    """Which of `LIMITS` this machine's kernel can enforce, and why not all of them."""
    version = landlock_version()
    can = (version >= _FILES_VERSION, can_restrict(), version >= _SIGNALS_VERSION)
    found = tuple(name for name, is_there in zip(LIMITS, can, strict=True) if is_there)
    if len(found) == len(LIMITS):
        return found, ""
    missing = ", ".join(name for name in LIMITS if name not in found)
    has = f"has version {version} of Landlock" if version else "has no Landlock"
    return found, f"{missing}: the kernel {has} (files need Linux 6.2, network 6.7, signals 6.12)"


def confine(confinement: Confinement) -> None:
    """Confine this process as far as the kernel can.

    Raises:
        OSError: the kernel can, but did not.
    """
    limit_handles()
    _take_private_memory()
    _drop_capabilities()
    check(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "give up privileges")
    version = landlock_version()
    if version:
        _restrict_files(confinement, version)
    if confinement.dials is not None and can_restrict():
        restrict(confinement.dials, confinement.listens)


def limit_handles() -> None:
    """No core dumps, and not more open files than any program needs."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def _take_private_memory() -> None:
    """As root: shared memory and IPC that end with the service; else it shares those of the machine."""
    if _libc.unshare(_NEW_MOUNTS | _NEW_IPC) != 0:
        return
    # Mounts of the machine still come and go here, but none of ours is seen there.
    flags = ctypes.c_ulong(_MOUNT_RECURSIVE | _MOUNT_SLAVE)
    check(_libc.mount(b"none", b"/", None, flags, None), "part its mounts")
    if Path(_SHARED_MEMORY).is_dir():
        flags = ctypes.c_ulong(_MOUNT_NOSUID | _MOUNT_NODEV)
        target = _SHARED_MEMORY.encode()
        check(_libc.mount(b"tmpfs", target, b"tmpfs", flags, b"mode=1777"), f"mount {_SHARED_MEMORY}")


def _drop_capabilities() -> None:
    """Take from root what reaches beyond files: the clock, devices, reboot, other users' processes, …"""
    for capability in set(range(_LAST_CAPABILITY + 1)) - _KEPT_CAPABILITIES:
        _libc.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)  # fails without root, and for numbers not in use


def _restrict_files(confinement: Confinement, version: int) -> None:
    handled = _ALL
    for needed, right in _NEWER_RIGHTS:
        if version < needed:
            handled &= ~right
    scopes = _SCOPES if version >= _SIGNALS_VERSION else 0
    attributes = struct.pack("=QQQ", handled, 0, scopes)
    rules = check(
        _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0), "make a ruleset"
    )
    for path in visible_beside(("/dev", *confinement.hidden)):
        _allow(rules, path, _READ & handled, follow=False)
    for readable in confinement.readable:
        _allow(rules, readable, _READ & handled)
    devices = (*(f"/dev/{name}" for name in _DEVICES), *confinement.devices)
    for writable in (*confinement.writable, *devices):
        _allow(rules, writable, _WRITE & handled)
    check(_libc.syscall(_RESTRICT_SELF, rules, 0), "restrict itself")
    os.close(rules)


def visible_beside(hidden: Sequence[str]) -> Iterator[str]:
    """The uppermost files and folders that neither are nor hold anything hidden; links are left out.

    A link would allow what it points to, and that has an own place here.
    """
    yield from _beside({os.path.realpath(path) for path in hidden}, "")


def _beside(hidden: set[str], folder: str) -> Iterator[str]:
    leading = {
        f"{folder}/{path[len(folder) + 1 :].partition('/')[0]}"
        for path in hidden
        if path.startswith(f"{folder}/")
    }
    with contextlib.suppress(OSError), os.scandir(folder or "/") as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}"
            if path not in leading and not entry.is_symlink():
                yield path
    for path in leading - hidden:
        yield from _beside(hidden, path)


def _allow(rules: int, path: str, rights: int, *, follow: bool = True) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError:
        return  # what is not there need not be allowed
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, descriptor)
        check(_libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, rule, 0), f"allow {path}")
    finally:
        os.close(descriptor)
