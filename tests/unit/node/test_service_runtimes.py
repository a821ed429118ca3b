"""Which of a node's two runtimes has a service. Both run processes here: the choice is what is tested."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.control_groups import ControlGroups
from flops.adapters.process_runtime import ProcessRuntime
from flops.core.cluster import Resources, ServiceState
from flops.core.reach import Reach
from flops.errors import ErrorCode, FlopsError
from flops.node.service_runtimes import ServiceRuntimes
from flops.testing.contracts.runtime import S1, SLEEP, until

ARGV = [sys.executable, "-I", "-c", SLEEP]
ENV = {"PATH": os.defpath}


def make_runtime(folder: Path) -> ProcessRuntime:
    return ProcessRuntime(folder / "runtime", folder / "output", ControlGroups({}, is_unified=False, note=""))


@pytest.fixture
def processes(tmp_path: Path) -> ProcessRuntime:
    return make_runtime(tmp_path / "processes")


@pytest.fixture
def containers(tmp_path: Path) -> ProcessRuntime:
    return make_runtime(tmp_path / "containers")


@pytest.fixture
def runtimes(processes: ProcessRuntime, containers: ProcessRuntime) -> Iterator[ServiceRuntimes]:
    runtimes = ServiceRuntimes(processes, containers, prefers_containers=True)
    yield runtimes
    runtimes.remove(S1)


def test_a_service_runs_in_a_container_where_that_is_preferred(
    runtimes: ServiceRuntimes, containers: ProcessRuntime, tmp_path: Path
) -> None:
    runtimes.start(S1, ARGV, ENV, tmp_path, Resources(), Reach())
    assert containers.running() == runtimes.running() == [S1]
    until(lambda: runtimes.output(S1) == "up\n")
    assert runtimes.usage(S1).processes == 1


def test_what_writes_to_folders_of_the_node_stays_a_process(
    runtimes: ServiceRuntimes, processes: ProcessRuntime, tmp_path: Path
) -> None:
    runtimes.start(S1, ARGV, ENV, tmp_path, Resources(), Reach(writable=(str(tmp_path / "shared"),)))
    assert processes.running() == [S1]


def test_a_service_is_found_and_ended_where_it_was_started(
    runtimes: ServiceRuntimes, processes: ProcessRuntime, containers: ProcessRuntime, tmp_path: Path
) -> None:
    runtimes.start(S1, ARGV, ENV, tmp_path, Resources(), Reach())
    later = ServiceRuntimes(processes, containers, prefers_containers=False)
    assert later.running() == [S1]
    later.stop(S1, grace_s=0)
    status = later.status(S1)
    assert status is not None
    assert status.state is ServiceState.STOPPED
    later.start(S1, ARGV, ENV, tmp_path, Resources(), Reach())
    assert (processes.running(), containers.status(S1)) == ([S1], None)


def test_an_image_needs_containers(
    processes: ProcessRuntime, containers: ProcessRuntime, tmp_path: Path
) -> None:
    runtimes = ServiceRuntimes(processes, containers, prefers_containers=False)
    with pytest.raises(FlopsError) as caught:
        runtimes.start(S1, ARGV, ENV, tmp_path, Resources(), Reach(image="localhost:5000/learner"))
    assert caught.value.code is ErrorCode.CONFIG_INVALID
    assert runtimes.running() == []
