"""Which GPU which service of a node gets, also over a restart of its daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.control_groups import find_control_groups
from flops.adapters.process_runtime import ProcessRuntime
from flops.core.cluster import Resources, ServiceKind, ServiceSpec, ServiceState
from flops.core.ids import NodeId, ServiceId
from flops.errors import ErrorCode
from flops.node.supervisor import Supervisor
from flops.testing.given_program import GivenProgram
from flops.testing.waiting import until

PROGRAM = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'] or 'none', flush=True); time.sleep(600)"


@pytest.fixture
def runtime(tmp_path: Path) -> ProcessRuntime:
    return ProcessRuntime(tmp_path / "runtime", tmp_path / "logs", find_control_groups())


@pytest.fixture
def supervisor(tmp_path: Path, runtime: ProcessRuntime) -> Iterator[Supervisor]:
    supervisor = make_supervisor(tmp_path, runtime)
    yield supervisor
    supervisor.stop_all("The test is over.")
    for service_id in runtime.running():
        runtime.stop(service_id)


def make_supervisor(folder: Path, runtime: ProcessRuntime) -> Supervisor:
    return Supervisor(folder / "services", GivenProgram(), runtime, gpus=(0, 2))


def start(supervisor: Supervisor, name: str, vgpus: int) -> ServiceId:
    spec = ServiceSpec(
        id=ServiceId(name),
        project_id="p1",
        kind=ServiceKind.LEARNER,
        node_id=NodeId("n"),
        config={"program": PROGRAM},
        resources=Resources(vgpus=vgpus),
    )
    supervisor.start(spec)
    return spec.id


def test_services_do_not_share_a_gpu_while_there_are_others(
    supervisor: Supervisor, runtime: ProcessRuntime, tmp_path: Path
) -> None:
    def seen_by(service_id: ServiceId) -> str:
        until(lambda: runtime.output(service_id) != "")
        return runtime.output(service_id).strip()

    first = start(supervisor, "first", 1)
    assert seen_by(first) == "0"
    assert seen_by(start(supervisor, "without", 0)) == "none"
    later = make_supervisor(tmp_path, runtime)  # as after a restart of the daemon
    later.adopt()
    try:
        second = start(later, "second", 1)
        assert seen_by(second) == "2"
        assert seen_by(start(later, "both", 2)) == "0,2"
        later.stop(first)
        until(lambda: later.statuses()[first].state is ServiceState.STOPPED)
        assert seen_by(start(later, "next", 1)) == "0"
        too_many = start(later, "more", 3)
        until(lambda: later.statuses()[too_many].state is ServiceState.FAILED)
        error = later.statuses()[too_many].error
        assert error is not None
        assert error["code"] == ErrorCode.SERVICE_FAILED.value
        assert error["message"] == "more needs 3 GPUs, and its node has 2."
    finally:
        later.stop_all("The test is over.")
