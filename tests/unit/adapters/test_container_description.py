"""What the engine is told of a service, where no engine of this machine could show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flops.adapters.containers.description import describe
from flops.adapters.containers.engine import EngineFacts
from flops.core.cluster import DEFAULT_PIDS, RESERVED_BYTES, Resources
from flops.core.reach import Reach
from flops.errors import ErrorCode, FlopsError

ALL_LIMITS = ("memory", "cpu", "pids")


def told(resources: Resources, work_dir: Path, *, limits: tuple[str, ...] = ALL_LIMITS) -> dict[str, Any]:
    return dict(described(work_dir, Reach(), resources=resources, limits=limits)["HostConfig"])


def described(
    work_dir: Path,
    reach: Reach,
    engine: tuple[str, str] = ("docker", "27"),
    resources: Resources = Resources(),
    limits: tuple[str, ...] = ALL_LIMITS,
) -> dict[str, Any]:
    name, version = engine
    facts = EngineFacts(name=name, version=version, cgroup_version=2, is_rootless=False, limits=limits)
    return describe(facts, ["/usr/bin/env"], {}, work_dir, resources, reach)


IMAGE = "localhost:5000/learner"


@pytest.mark.parametrize(
    ("engine", "request_"),
    [
        (("docker", "20.10.24"), {"Driver": "", "DeviceIDs": ["0", "2"], "Capabilities": [["gpu"]]}),
        (("podman", "5.4.0"), {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=0", "nvidia.com/gpu=2"]}),
    ],
)
def test_an_image_is_given_its_gpus_by_the_engine(
    tmp_path: Path, engine: tuple[str, str], request_: dict[str, Any]
) -> None:
    body = described(tmp_path, Reach(image=IMAGE, gpus=(0, 2)), engine)
    assert body["HostConfig"]["DeviceRequests"] == [request_]
    assert "NVIDIA_VISIBLE_DEVICES=void" not in body["Env"]  # the engine sets it


def test_a_podman_that_ignores_requests_for_gpus_is_not_asked(tmp_path: Path) -> None:
    with pytest.raises(FlopsError) as caught:
        described(tmp_path, Reach(image=IMAGE, gpus=(0,)), ("podman", "5.3.2"))
    assert caught.value.code is ErrorCode.SERVICE_FAILED
    assert "gives to images since version 5.4, and this is 5.3.2" in caught.value.message


@pytest.mark.parametrize("reach", [Reach(), Reach(image=IMAGE)])
def test_who_asks_for_no_gpu_sees_none(tmp_path: Path, reach: Reach) -> None:
    body = described(tmp_path, reach)
    assert not {"DeviceRequests", "Devices"} & body["HostConfig"].keys()
    assert "NVIDIA_VISIBLE_DEVICES=void" in body["Env"]  # whatever the image says


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
