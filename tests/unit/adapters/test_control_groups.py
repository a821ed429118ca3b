"""Which groups are found and what is written into them, on trees of plain files."""

from __future__ import annotations

from pathlib import Path

from flops.adapters.control_groups import (
    ControlGroups,
    find_control_groups,
)
from flops.core.cluster import DEFAULT_PIDS, RESERVED_BYTES, Resources


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_version_2_writes_its_limits(tmp_path: Path) -> None:
    parents = dict.fromkeys(("memory", "cpu", "pids"), tmp_path)
    groups = ControlGroups(parents, is_unified=True)
    write(tmp_path / "s/memory.swap.max")
    (group,) = groups.create("s", Resources(memory_mb=2, vcpus=0.5, pids=7))
    assert (group / "memory.max").read_text() == "2097152"
    assert (group / "memory.swap.max").read_text() == "0"
    assert (group / "cpu.max").read_text() == "50000 100000"
    assert (group / "pids.max").read_text() == "7"
    assert groups.limits() == (("memory", "cpu", "pids"), "")


def test_version_1_uses_a_group_per_controller(tmp_path: Path) -> None:
    mount, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("9:pids:/a\n4:memory:/b\n1:cpu,cpuacct:/\n0::/\n")
    for name in ("pids/a", "memory/b", "cpu", "pids", "memory"):
        write(mount / name / "cgroup.procs")
    groups = find_control_groups(mount, own)
    assert groups.limits() == (("memory", "cpu", "pids"), "")
    made = groups.create("s", Resources(memory_mb=1, vcpus=2, pids=7))
    assert made == [
        mount / "memory/b/flops-services/s",
        mount / "cpu/flops-services/s",
        mount / "pids/a/flops-services/s",
    ]
    assert (made[0] / "memory.limit_in_bytes").read_text() == "1048576"
    assert (made[1] / "cpu.cfs_quota_us").read_text() == "200000"
    assert (made[2] / "pids.max").read_text() == "7"


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    groups = find_control_groups(tmp_path / "nowhere", tmp_path / "nothing")
    limits, note = groups.limits()
    assert limits == ()
    assert "memory, cpu, pids" in note
    assert groups.create("s", Resources(memory_mb=1)) == []


def test_who_asks_for_nothing_leaves_a_reserve_to_the_machine(tmp_path: Path) -> None:
    parents = dict.fromkeys(("memory", "cpu", "pids"), tmp_path)
    groups = ControlGroups(parents, is_unified=True, memory_bytes=16 * 1024**3)
    (group,) = groups.create("s", Resources())
    assert int((group / "memory.max").read_text()) == 16 * 1024**3 - RESERVED_BYTES
    assert (group / "pids.max").read_text() == str(DEFAULT_PIDS)
    assert not (group / "cpu.max").exists()
    (group,) = groups.create("greedy", Resources(memory_mb=64 * 1024))
    assert int((group / "memory.max").read_text()) == 16 * 1024**3 - RESERVED_BYTES


def test_a_small_machine_keeps_an_eighth(tmp_path: Path) -> None:
    groups = ControlGroups({"memory": tmp_path}, is_unified=True, memory_bytes=1024**3)
    (group,) = groups.create("s", Resources())
    assert int((group / "memory.max").read_text()) == 7 * 1024**3 // 8
