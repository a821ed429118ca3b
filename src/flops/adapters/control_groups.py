"""Limits of processes by control groups: version 2 where controllers are delegated, else version 1."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from flops.core.cluster import Resources

LIMITS = ("memory", "cpu", "pids")
CPU_PERIOD_US = 100_000
_MOUNT = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_FOLDER = "flops-services"
_REMOVE_TIMEOUT_S = 5.0


class ControlGroups:
    """Implements the `Limiter` of `flops.adapters.process_runtime`.

    Args:
        parents: per limit of `LIMITS`, the group below which groups can be made.
        is_unified: whether all limits belong to one group (version 2).
        note: why some limits are not enforced.
        memory_bytes: memory of the machine: a service that asks for no limit gets it less a reserve, so that
            it is ended and not the node's daemon. None: such a service is not limited.
    """

    def __init__(
        self, parents: dict[str, Path], *, is_unified: bool, note: str = "", memory_bytes: int | None = None
    ) -> None:
        self._parents = parents
        self._machine_bytes = memory_bytes
        self._is_unified = is_unified
        self._note = note

    def limits(self) -> tuple[tuple[str, ...], str]:
        """Which limits are enforced, and why not all of them."""
        return tuple(limit for limit in LIMITS if limit in self._parents), self._note

    def create(self, name: str, resources: Resources) -> list[Path]:
        """Make groups with the limits of `resources`; those that cannot be enforced are left out."""
        resources = resources.bounded(self._machine_bytes)
        wanted = {
            "memory": None if resources.memory_mb is None else resources.memory_mb * 1024**2,
            "cpu": None if resources.vcpus is None else max(1_000, int(resources.vcpus * CPU_PERIOD_US)),
            "pids": resources.pids,
        }
        groups: dict[Path, None] = {}
        for limit, parent in self._parents.items():
            value = wanted[limit]
            # Groups are made also without a limit: that of memory tells that a process was killed for it, and
            # all processes of a group together get the CPU that one outside gets.
            group = parent / name
            group.mkdir(exist_ok=True)
            groups[group] = None
            if value is not None:
                self._limit(group, limit, value)
        return list(groups)

    def _limit(self, group: Path, limit: str, value: int) -> None:
        if self._is_unified:
            text = f"{value} {CPU_PERIOD_US}" if limit == "cpu" else str(value)
            (group / f"{limit}.max").write_text(text)
            if limit == "memory":
                _write_if_there(group / "memory.swap.max", "0")
                _write_if_there(group / "memory.oom.group", "1")
        elif limit == "cpu":
            (group / "cpu.cfs_period_us").write_text(str(CPU_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(value))
        elif limit == "memory":
            _write_if_there(group / "memory.memsw.limit_in_bytes", "-1")  # never below the one that follows
            (group / "memory.limit_in_bytes").write_text(str(value))
            _write_if_there(group / "memory.memsw.limit_in_bytes", str(value))
        else:
            (group / "pids.max").write_text(str(value))

    def oom_file(self, group: Path) -> Path | None:
        """The file of a group that counts kills for want of memory, if it is such a group."""
        file = group / ("memory.events" if self._is_unified else "memory.oom_control")
        return file if file.exists() else None

    def remove(self, groups: Sequence[Path]) -> None:
        """Kill what is left in the groups, and remove them."""
        deadline_s = time.monotonic() + _REMOVE_TIMEOUT_S
        left = [group for group in groups if group.is_dir()]
        while left:
            for group in left:
                for pid in _processes(group):
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(OSError):
                    group.rmdir()
            left = [group for group in left if group.is_dir()]
            if left and time.monotonic() > deadline_s:
                return
            if left:
                time.sleep(0.01)


def find_control_groups(
    mount: Path = _MOUNT, own_groups: Path = _OWN_GROUPS, *, memory_bytes: int | None = None
) -> ControlGroups:
    """Find out which limits can be enforced by this process, by trying.

    Args:
        mount: where control groups are mounted.
        own_groups: lists the groups of this process, in the format of ``/proc/self/cgroup``.
        memory_bytes: memory of the machine, see `ControlGroups`.
    """
    own = _own_groups(own_groups)
    parents: dict[str, Path] = {}
    if (mount / "cgroup.controllers").exists():
        parent = _unified_parent(mount, own.get("", "/"))
        if parent is not None:
            available = (parent / "cgroup.subtree_control").read_text().split()
            parents = {limit: parent for limit in LIMITS if limit in available}
        return ControlGroups(parents, is_unified=True, note=_note(parents), memory_bytes=memory_bytes)
    for limit in LIMITS:
        candidate = mount / limit / own.get(limit, "/").lstrip("/") / _FOLDER
        if (mount / limit / "cgroup.procs").exists() and _can_make_groups(candidate):
            parents[limit] = candidate
    return ControlGroups(parents, is_unified=False, note=_note(parents), memory_bytes=memory_bytes)


def _own_groups(file: Path) -> dict[str, str]:
    """Path by controller name; the one of version 2 stands under ""."""
    found = {}
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _unified_parent(mount: Path, own: str) -> Path | None:
    """A group below which limits work, made if need be.

    Controllers can be handed down only by a group without processes. A unit of systemd keeps its processes,
    and is emptied when it restarts, so its services live beside it.
    """
    here = mount / own.lstrip("/")
    candidates = [here.parent / _FOLDER] if here.suffix == ".service" else []
    for parent in [*candidates, here / _FOLDER]:
        if _can_make_groups(parent) and _hand_down(parent.parent) and _hand_down(parent):
            return parent
    return None


def _hand_down(group: Path) -> bool:
    """Give a group's children the controllers we need; whether at least one is there."""
    try:
        available = (group / "cgroup.controllers").read_text().split()
        for limit in LIMITS:
            if limit in available:
                with contextlib.suppress(OSError):
                    (group / "cgroup.subtree_control").write_text(f"+{limit}")
        return bool(set(LIMITS) & set((group / "cgroup.subtree_control").read_text().split()))
    except OSError:
        return False


def _can_make_groups(parent: Path) -> bool:
    probe = parent / f"probe-{uuid.uuid4().hex[:8]}"
    try:
        parent.mkdir(exist_ok=True)
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def _processes(group: Path) -> list[int]:
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def _write_if_there(file: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        if file.exists():
            file.write_text(text)


def _note(parents: dict[str, Path]) -> str:
    missing = ", ".join(limit for limit in LIMITS if limit not in parents)
    if not missing:
        return ""
    return f"{missing}: this process may not make control groups (run it as root, or delegate them)"
