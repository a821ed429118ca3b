"""Services as processes: the contract, and what is particular to shims and control groups."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flops.adapters.control_groups import ControlGroups, find_control_groups
from flops.adapters.process_runtime import ProcessRuntime
from flops.core.cluster import Resources, ServiceState
from flops.core.ids import ServiceId
from flops.core.reach import Reach
from flops.errors import FlopsError
from flops.ports import Runtime
from flops.testing.contracts.runtime import S1, SLEEP, RuntimeContract, until

NO_GROUPS = ControlGroups({}, is_unified=False, note="not here")


def make_runtime(folder: Path, groups: ControlGroups, **options: Any) -> ProcessRuntime:
    return ProcessRuntime(folder / "runtime", folder / "output", groups, **options)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


class TestProcessRuntime(RuntimeContract):
    @pytest.fixture(params=[False, True], ids=["unlimited", "limited"])
    def groups(self, request: pytest.FixtureRequest) -> ControlGroups:
        return find_control_groups() if request.param else NO_GROUPS

    @pytest.fixture
    def runtime(self, folder: Path, groups: ControlGroups) -> Iterator[Runtime]:
        runtime = make_runtime(folder, groups)
        yield runtime
        runtime.remove(S1)

    @pytest.fixture
    def reopen(self, folder: Path, groups: ControlGroups) -> Callable[[], Runtime]:
        return lambda: make_runtime(folder, groups)


def test_a_service_that_is_looked_at_while_it_starts_starts(folder: Path, tmp_path: Path) -> None:
    """Between the old shim's end and the new one's beginning it looks like one that was killed."""
    runtime = make_runtime(folder, find_control_groups())
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            runtime.status(S1)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(20):
            runtime.start(S1, [sys.executable, "-c", "print('here')"], {}, tmp_path, Resources())
            until(lambda: (s := runtime.status(S1)) is not None and s.state.is_final)
            status = runtime.status(S1)
            assert status is not None
            assert status.state is ServiceState.COMPLETED, runtime.output(S1)
    finally:
        is_over.set()
        looking.join()
        runtime.remove(S1)


class TestShim:
    @pytest.fixture
    def runtime(self, folder: Path) -> Iterator[ProcessRuntime]:
        runtime = make_runtime(folder, NO_GROUPS, output_bytes=100_000)
        yield runtime
        runtime.remove(S1)

    run = RuntimeContract.run
    end = RuntimeContract.end
    status = RuntimeContract.status

    def shim(self, folder: Path) -> psutil.Process:
        return psutil.Process(json.loads((folder / "runtime" / S1 / "shim.json").read_text())["pid"])

    def test_a_killed_shim_takes_everything_with_it(
        self, runtime: ProcessRuntime, folder: Path, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, f"import os; os.fork() or os.setsid(); {SLEEP}")
        until(lambda: runtime.usage(S1).processes == 2)
        shim = self.shim(folder)
        processes = shim.children(recursive=True)
        shim.send_signal(signal.SIGKILL)
        status = self.end(runtime)
        assert (status.state, status.exit_code) == (ServiceState.FAILED, -9)
        until(lambda: all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes))

    def test_a_flood_of_output_does_not_fill_the_disk(
        self, runtime: ProcessRuntime, folder: Path, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, "for i in range(20_000): print(f'{i:99}')")
        assert self.end(runtime).state is ServiceState.COMPLETED
        sizes = [file.stat().st_size for file in (folder / "output").iterdir()]
        assert len(sizes) == 2
        assert sum(sizes) <= 200_000
        assert runtime.output(S1, tail_bytes=150_000).endswith("19999\n")
        assert len(runtime.output(S1, tail_bytes=90_000)) == 90_000

    def test_a_confined_service_does_not_see_the_node(
        self, runtime: ProcessRuntime, folder: Path, tmp_path: Path
    ) -> None:
        if "files" not in runtime.limits()[0]:
            pytest.skip("files are not limited here")
        (folder / "runtime").mkdir()
        home = folder / "home"
        for name in ("secret", "bundles/own/code", "bundles/other/code"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text("x")
        (home / "link").symlink_to(home / "secret")
        (folder / "way-in").symlink_to(home)
        work = home / "services" / "s" / "work"
        work.mkdir(parents=True)
        hiding = make_runtime(folder, NO_GROUPS, hidden=[home])
        code = (
            "import os, sys\n"
            "for name in sys.argv[2:]:\n"
            "    try: open(os.path.join(sys.argv[1], name)).close(); print('read')\n"
            "    except PermissionError: print('refused')\n"
            "open('/etc/passwd').close(); open(f'{sys.argv[1]}/beside').close(); open('own', 'w').close()\n"
        )
        (folder / "beside").write_text("")
        names = ["home/bundles/own/code", "home/bundles/other/code", "home/secret", "home/link"]
        names += ["way-in/secret", "runtime/learner-p1-0/launch.json", "output/learner-p1-0.log"]
        argv = [sys.executable, "-I", "-c", code, str(folder), *names, "/dev/vda", "/dev/sda"]
        reach = Reach(readable=(str(home / "bundles" / "own"),))
        present = [name for name in argv[-2:] if Path(name).exists()]
        hiding.start(S1, [*argv[:-2], *present], {}, work, Resources(), reach)
        assert self.end(hiding).state is ServiceState.COMPLETED, hiding.output(S1)
        assert hiding.output(S1).split() == ["read", *["refused"] * (len(names) - 1 + len(present))]

    def test_a_confined_service_reaches_neither_its_shim_nor_proc(
        self, runtime: ProcessRuntime, tmp_path: Path
    ) -> None:
        if not {"files", "signals"} <= set(runtime.limits()[0]):
            pytest.skip("files and signals are not limited here")
        code = (
            "import os\n"
            "for attempt in (lambda: os.kill(os.getppid(), 0), lambda: open('/proc/self/comm', 'w')):\n"
            "    try: attempt(); print('reached')\n"
            "    except PermissionError: print('refused')"
        )
        runtime.start(S1, [sys.executable, "-I", "-c", code], {}, tmp_path, Resources(), Reach())
        self.end(runtime)
        assert runtime.output(S1) == "refused\nrefused\n"

    def test_a_service_that_confines_itself_is_as_confined_from_then_on(
        self, runtime: ProcessRuntime, tmp_path: Path
    ) -> None:
        if "files" not in runtime.limits()[0]:
            pytest.skip("files are not limited here")
        work, outside = tmp_path / "work", tmp_path / "outside"
        work.mkdir()
        code = (
            "import os, sys\n"
            "from flops.adapters.confinement import confine, told_confinement\n"
            "open(sys.argv[1], 'w').close()\n"
            "confine(told_confinement(os.environ))\n"
            "open('own', 'w').close()\n"
            "try: open(sys.argv[1], 'w').close(); print('reached')\n"
            "except PermissionError: print('refused')"
        )
        argv = [sys.executable, "-I", "-c", code, str(outside)]
        runtime.start(S1, argv, {}, work, Resources(), Reach(confines_itself=True))
        self.end(runtime)
        assert runtime.output(S1) == "refused\n"

    def test_a_process_id_that_is_another_process_now_is_not_it(
        self, runtime: ProcessRuntime, folder: Path, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, SLEEP)
        file = folder / "runtime" / S1 / "shim.json"
        identity = json.loads(file.read_text())
        shim = self.shim(folder)
        file.write_text(json.dumps({**identity, "pid": os.getpid()}))
        assert runtime.running() == []
        assert self.status(runtime).state is ServiceState.FAILED
        shim.send_signal(signal.SIGKILL)
        until(lambda: not shim.is_running() or shim.status() == psutil.STATUS_ZOMBIE)

    def test_a_restart_of_the_machine_is_no_failure(
        self, runtime: ProcessRuntime, folder: Path, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, "print('done')")
        self.end(runtime)
        (folder / "runtime" / S1 / "exit.json").unlink()
        file = folder / "runtime" / S1 / "shim.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "boot_id": "another"}))
        assert self.status(runtime).state is ServiceState.STOPPED

    def test_a_second_start_at_the_same_time_runs_it_once(
        self, runtime: ProcessRuntime, folder: Path, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, SLEEP)
        first = self.shim(folder)
        runtime._start_shim(S1, folder / "runtime" / S1)
        assert self.shim(folder).pid == first.pid

    @pytest.mark.parametrize("service_id", ["", "..", "a/b", "/etc"])
    def test_an_id_that_is_a_path_is_refused(
        self, runtime: ProcessRuntime, service_id: str, tmp_path: Path
    ) -> None:
        with pytest.raises(FlopsError):
            runtime.start(ServiceId(service_id), ["true"], {}, tmp_path, Resources())

    def test_the_environment_is_no_ones_business(
        self, runtime: ProcessRuntime, folder: Path, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, "pass")
        self.end(runtime)
        assert (folder / "runtime" / S1 / "launch.json").stat().st_mode & 0o077 == 0
