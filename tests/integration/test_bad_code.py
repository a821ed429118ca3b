"""Bad code in services of a real node: it hurts itself, the node stays healthy, and nothing of it is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flops.adapters import confinement
from flops.adapters.containers.engine import ContainerEngine
from flops.adapters.containers.runtime import ContainerRuntime
from flops.adapters.control_groups import find_control_groups
from flops.adapters.process_runtime import ProcessRuntime
from flops.core.cluster import Resources, ServiceKind, ServiceSpec, ServiceState, ServiceStatus
from flops.core.ids import NodeId, ServiceId
from flops.core.reach import Reach
from flops.errors import CATALOGUE, ErrorCode
from flops.node.supervisor import Supervisor
from flops.ports import Runtime
from flops.testing.disk import small_disk
from flops.testing.given_program import GivenProgram
from flops.testing.podman import missing_for_podman, running_podman
from flops.testing.waiting import until

BAD, GOOD, ADDON = ServiceId("bad"), ServiceId("good"), ServiceId("data-server")
IDLE = "import time; print('up', flush=True); time.sleep(600)"
LIMITS = {*find_control_groups().limits()[0], *confinement.limits()[0]}
MEMORY_MB = 150

pytestmark = pytest.mark.skipif(
    not {"memory", "pids", "files", "signals"} <= LIMITS, reason=f"only {sorted(LIMITS)} are limited here"
)


class Machine:
    """A node's runtimes with a healthy service, a data server, and room for a bad one."""

    def __init__(self, home: Path) -> None:
        self.home = home
        groups = find_control_groups()
        self.services = ProcessRuntime(home / "runtime", home / "logs", groups, hidden=[home])
        self.addons = ProcessRuntime(home / "addons", home / "logs", groups)
        (home / "token").write_text("secret")
        self._start(GOOD, IDLE)
        argv = [sys.executable, "-I", "-c", IDLE]
        self.addons.start(ADDON, argv, {}, self.work(ADDON), Resources())
        until(lambda: self.services.output(GOOD) == self.addons.output(ADDON) == "up\n")

    def work(self, service_id: ServiceId) -> Path:
        folder = self.home / "services" / service_id / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run(self, code: str) -> None:
        self._start(BAD, code)

    def _start(self, service_id: ServiceId, code: str) -> None:
        argv = [sys.executable, "-I", "-c", code]
        resources = Resources(memory_mb=MEMORY_MB, pids=40, vcpus=0.5)
        self.services.start(service_id, argv, {"PATH": os.defpath}, self.work(service_id), resources, Reach())

    def ended(self) -> ServiceStatus:
        until(lambda: self.status().state.is_final)
        return self.status()

    def status(self) -> ServiceStatus:
        status = self.services.status(BAD)
        assert status is not None
        return status

    def processes(self) -> list[int]:
        """Processes of the bad service, also those that hide."""
        mark = f"{self.home}/runtime/{BAD}"
        groups = json.loads((Path(mark) / "launch.json").read_text())["groups"]
        found = {int(pid) for g in groups if Path(g).is_dir() for pid in _pids_of(Path(g))}
        return sorted(pid for pid in found if psutil.pid_exists(pid))

    def check_health(self) -> None:
        """The others run as if nothing had been."""
        assert self.services.running() in ([GOOD], [BAD, GOOD])
        assert self.addons.running() == [ADDON]
        assert self.services.usage(GOOD).processes == self.addons.usage(ADDON).processes == 1

    def clear(self) -> None:
        """Remove the bad service: nothing of it is left."""
        self.services.stop(BAD, grace_s=0.3)
        assert self.processes() == []
        self.check_health()
        self.services.remove(BAD)
        assert not list((self.home / "runtime").glob(f"{BAD}*"))
        assert not list((self.home / "logs").glob(f"{BAD}*"))


def _pids_of(group: Path) -> list[str]:
    return (group / "cgroup.procs").read_text().split()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    for runtime, service_id in ((machine.services, BAD), (machine.services, GOOD), (machine.addons, ADDON)):
        runtime.remove(service_id)


@pytest.mark.parametrize(
    ("code", "exit_code", "reason"),
    [
        ("import sys; sys.exit(3)", 3, "exit code 3"),
        ("import os; os._exit(4)", 4, "exit code 4"),
        ("import ctypes; ctypes.string_at(0)", -11, "SIGSEGV"),
        ("import os; os.abort()", -6, "SIGABRT"),
        ("import os; os.closerange(0, 4096); os._exit(5)", 5, "exit code 5"),
        ("import os; os.kill(os.getpid(), 9)", -9, "SIGKILL"),
    ],
)
def test_an_end_is_told_with_its_reason(machine: Machine, code: str, exit_code: int, reason: str) -> None:
    machine.run(code)
    ended = machine.ended()
    assert (ended.state, ended.exit_code) == (ServiceState.FAILED, exit_code)
    assert ended.error is not None
    assert ended.error["code"] == ErrorCode.SERVICE_FAILED.value
    assert reason in ended.error["message"]
    assert not list(machine.work(BAD).glob("core*"))
    machine.clear()


def test_an_endless_loop_that_ignores_sigterm_is_ended(machine: Machine) -> None:
    machine.run(
        "import signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "print('up', flush=True)\nwhile True: pass"
    )
    until(lambda: machine.services.output(BAD) == "up\n")
    machine.clear()


def test_who_eats_memory_is_ended_for_it(machine: Machine) -> None:
    machine.run("hoard = []\nwhile True: hoard.append(b'x' * 1_000_000)")
    ended = machine.ended()
    assert ended.error is not None
    assert ended.error["code"] == ErrorCode.OUT_OF_MEMORY.value
    machine.clear()


def test_shared_memory_counts_as_memory(machine: Machine) -> None:
    machine.run("with open('/dev/shm/hoard', 'wb') as f:\n  while True: f.write(b'x' * 1_000_000)")
    ended = machine.ended()
    assert ended.error is not None
    assert ended.error["code"] == ErrorCode.OUT_OF_MEMORY.value
    machine.clear()


def test_a_fork_bomb_stays_within_its_processes(machine: Machine) -> None:
    machine.run(
        "import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True:\n"
        "    try:\n        if os.fork() == 0: os.setsid()\n    except OSError: pass"
    )
    until(lambda: len(machine.processes()) == 40)
    machine.check_health()
    machine.clear()


def test_daemons_that_wipe_their_environment_are_ended(machine: Machine) -> None:
    machine.run(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0: os.execve('/bin/sleep', ['sleep', '600'], {})\n"
        "    os._exit(0)\n"
        "time.sleep(0.3); print('done')"
    )
    assert machine.ended().state is ServiceState.COMPLETED
    assert machine.processes() == []
    machine.clear()


def test_killing_everything_reaches_only_itself(machine: Machine) -> None:
    # Asked first: were it not confined, the test would end whatever runs on this machine.
    machine.run(
        "import os, sys\n"
        "try: os.kill(os.getppid(), 0)\n"
        "except PermissionError: os.kill(-1, 9); os.kill(os.getpid(), 9)\n"
        "sys.exit(77)"
    )
    assert machine.ended().exit_code == -9
    machine.clear()


def test_thousands_of_open_files_are_its_own_problem(machine: Machine) -> None:
    machine.run("files = []\nwhile True: files.append(open('/dev/null'))")
    assert machine.ended().exit_code == 1
    assert "Too many open files" in machine.services.output(BAD)
    machine.clear()


def test_a_flood_of_output_costs_little_and_is_kept_within_its_files(machine: Machine) -> None:
    machine.run("import os\nblock = b'x' * 1_000_000\nwhile True: os.write(1, block)")
    folder = machine.home / "runtime" / BAD
    shim = psutil.Process(json.loads((folder / "shim.json").read_text())["pid"])
    files = lambda: list((machine.home / "logs").glob(f"{BAD}*"))  # noqa: E731
    until(lambda: len(files()) == 2)
    before, started = sum(shim.cpu_times()[:2]), time.monotonic()
    until(lambda: time.monotonic() - started > 2)
    assert sum(shim.cpu_times()[:2]) - before < 0.5
    assert shim.memory_info().rss < 40 * 1024**2
    assert sum(file.stat().st_size for file in files()) <= 2 * 8 * 1024**2
    machine.clear()


def test_neither_the_node_nor_others_can_be_read_or_changed(machine: Machine) -> None:
    (machine.work(GOOD) / "model").write_text("good")
    machine.run(
        "import os, pathlib\n"
        "home = pathlib.Path.cwd().parents[2]\n"
        "good = home.joinpath('services', 'good', 'work', 'model')\n"
        "for attempt in (lambda: (home / 'token').read_text(), good.read_text, good.unlink,\n"
        "                lambda: good.write_text('bad'), lambda: os.listdir(home),\n"
        "                lambda: (home / 'runtime/bad/exit.json').write_text('{}'),\n"
        "                lambda: open('/sys/fs/cgroup/memory/cgroup.procs', 'w')):\n"
        "    try: attempt(); print('done')\n"
        "    except OSError: print('refused')"
    )
    assert machine.ended().state is ServiceState.COMPLETED
    assert machine.services.output(BAD) == "refused\n" * 7
    assert (machine.work(GOOD) / "model").read_text() == "good"
    machine.clear()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "200m") as disk:
        yield disk


@pytest.mark.parametrize(
    "how",
    [
        "file = open('fill', 'wb', 0)\nwhile True: file.write(bytes(100_000)); time.sleep(0.005)",
        "n = 0\nwhile True: open(f'tmp/{n}', 'wb').write(bytes(100_000)); n += 1; time.sleep(0.005)",
        "file = open('fill', 'wb', 0)\nwhile True: file.write(bytes(1_000_000))",
    ],
    ids=["one file", "many files", "faster than it is watched"],
)
def test_who_fills_the_disk_is_ended_before_it_is_full(disk: Path, how: str) -> None:
    runtime = ProcessRuntime(disk / "runtime", disk / "logs", find_control_groups())
    supervisor = Supervisor(disk / "services", GivenProgram(), runtime)

    def spec(service_id: ServiceId, program: str) -> ServiceSpec:
        return ServiceSpec(
            id=service_id,
            project_id="p1",
            kind=ServiceKind.LEARNER,
            node_id=NodeId("n"),
            config={"program": program},
            max_restarts=5,
        )

    supervisor.start(spec(GOOD, f"open('own', 'wb').write(b'x' * 1_000_000); {IDLE}"))
    supervisor.start(spec(BAD, f"import time\n{how}"))
    try:
        until(lambda: supervisor.statuses()[BAD].state is ServiceState.FAILED)
        ended = supervisor.statuses()[BAD]
        assert ended.error is not None
        assert ended.error["code"] == ErrorCode.DISK_FULL.value
        assert "filled the disk of its node" in ended.detail
        assert ended.restarts == 0
        assert "sleep" not in how or "No space left" not in runtime.output(BAD)
        assert shutil.disk_usage(disk).free > 150 * 1024**2
        assert supervisor.statuses()[GOOD].state is ServiceState.RUNNING
    finally:
        supervisor.stop_all("The test is over.")


@pytest.fixture(params=["process", "container"])
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Runtime]:
    root, output = tmp_path / "runtime", tmp_path / "logs"
    if request.param == "process":
        yield ProcessRuntime(root, output, find_control_groups())
    elif missing_for_podman():
        pytest.skip(missing_for_podman())
    else:
        with running_podman() as podman:
            yield ContainerRuntime(root, output, ContainerEngine(podman.socket))


def test_who_writes_more_than_its_storage_is_ended(runtime: Runtime, tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "services", GivenProgram(), runtime)

    def start(service_id: ServiceId, size_mb: int) -> None:
        fill = f"open(f'{{folder}}/file', 'wb').write(bytes({size_mb} * 512 * 1024))"
        program = f"for folder in ('.', 'tmp'): {fill}\n{IDLE}"
        supervisor.start(
            ServiceSpec(
                id=service_id,
                project_id="p1",
                kind=ServiceKind.LEARNER,
                node_id=NodeId("n"),
                config={"program": program},
                resources=Resources(storage_mb=10),
                max_restarts=5,
            )
        )

    try:
        start(GOOD, 9)
        start(BAD, 11)
        until(lambda: supervisor.statuses()[BAD].state is ServiceState.FAILED)
        ended = supervisor.statuses()[BAD]
        assert ended.error is not None
        assert ended.error["code"] == ErrorCode.OUT_OF_STORAGE.value
        assert "wrote 11 MB into its work folder, of which it may use 10 MB" in ended.detail
        assert ended.restarts == 0
        assert not list((tmp_path / "services" / BAD).rglob("file"))
        until(lambda: runtime.output(GOOD) == "up\n")
        assert supervisor.statuses()[GOOD].state is ServiceState.RUNNING
    finally:
        supervisor.stop_all("The test is over.")


@pytest.mark.parametrize(
    ("loop", "exit_code"),
    [
        ("while True: pass", CATALOGUE[ErrorCode.MODEL_UNLOADABLE].exit_code),
        ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", 1),  # lets no other thread run
    ],
)
def test_a_model_that_loads_for_ever_is_given_up(tmp_path: Path, loop: str, exit_code: int) -> None:
    program = (
        "import pathlib, sys\nfrom flops.actor import EventLog\nfrom flops.serving import app\n"
        f"app._GRACE_S = 1\nwith app.load_deadline(EventLog(pathlib.Path(sys.argv[1])), 0.3):\n    {loop}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == exit_code
    assert "most recent call first" in done.stderr
    told = list(tmp_path.glob("events.jsonl"))
    assert (exit_code == 1) == (not told)
    assert all("not loaded within 0.3 s" in file.read_text() for file in told)
