"""What the engine is told of a service, where no engine of this machine could show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flops.adapters.containers.description import describe
from flops.adapters.containers.engine import EngineFacts
from flops.core.cluster import DEFAULT_PIDS, RESERVED_BYTES, Resources
from flops.core.reach import Reach

ALL_LIMITS = ("memory", "cpu", "pids")


def told(
    resources: Resources, work_dir: Path, *, image: str = "", limits: tuple[str, ...] = ALL_LIMITS
) -> dict[str, Any]:
    facts = EngineFacts(name="docker", version="27", cgroup_version=2, is_rootless=False, limits=limits)
    body = describe(facts, ["/usr/bin/env"], {}, work_dir, resources, Reach(image=image))
    return dict(body["HostConfig"])


def test_an_image_is_given_gpus_by_the_engine(tmp_path: Path) -> None:
    asked = told(Resources(vgpus=2), tmp_path, image="localhost:5000/learner")
    assert asked["DeviceRequests"] == [{"Driver": "", "Count": 2, "Capabilities": [["gpu"]]}]
    assert "DeviceRequests" not in told(Resources(), tmp_path, image="localhost:5000/learner")


def test_without_an_image_the_devices_are_enough(tmp_path: Path) -> None:
    devices = [str(path) for path in sorted(Path("/dev").glob("nvidia*")) if path.is_char_device()]
    assert [device["PathOnHost"] for device in told(Resources(vgpus=1), tmp_path)["Devices"]] == devices
    assert "Devices" not in told(Resources(), tmp_path)


def test_limits_that_the_engine_does_not_hold_are_not_asked_for(tmp_path: Path) -> None:
    resources = Resources(memory_mb=100, vcpus=0.5, pids=10)
    assert {"Memory": 100 * 1024**2, "NanoCpus": 500_000_000, "PidsLimit": 11}.items() <= told(
        resources, tmp_path
    ).items()
    assert not {"Memory", "NanoCpus", "PidsLimit"} & told(resources, tmp_path, limits=()).keys()


@pytest.mark.parametrize(
    ("machine", "reserve"), [(16 * 1024**3, RESERVED_BYTES), (2 * 1024**3, 256 * 1024**2)]
)
def test_who_asks_for_no_limits_has_some(machine: int, reserve: int) -> None:
    bounded = Resources().bounded(machine)
    assert bounded == Resources(memory_mb=(machine - reserve) // 1024**2, pids=DEFAULT_PIDS)
    assert Resources(memory_mb=10**6, pids=5).bounded(machine).memory_mb == bounded.memory_mb
    assert Resources(memory_mb=10, pids=5).bounded(machine) == Resources(memory_mb=10, pids=5)
