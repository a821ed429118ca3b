"""What every `flops.ports.Runtime` does."""

from __future__ import annotations

import errno
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flops.core.cluster import Resources, ServiceState, ServiceStatus, ServiceUsage
from flops.core.ids import ServiceId
from flops.core.reach import Reach
from flops.errors import ErrorCode
from flops.ports import Runtime
from flops.testing import waiting

S1 = ServiceId("learner-p1-0")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (looked at only)
DIALLING = """
import json, os, socket, subprocess, sys
given, other = (("127.0.0.1", int(port)) for port in sys.argv[1:3])
inet, stream = socket.AF_INET, socket.SOCK_STREAM
attempts = {
    "given": lambda: socket.create_connection(given, 5),
    "other": lambda: socket.create_connection(other, 5),
    "sent": lambda: socket.socket().sendto(b"x", socket.MSG_FASTOPEN, other),
    "listen": lambda: socket.create_server(("127.0.0.1", other[1] - 1)),
    "free": lambda: socket.create_server(("127.0.0.1", 0)),
    "udp": lambda: socket.socket(inet, socket.SOCK_DGRAM).sendto(b"x", other),
    "mptcp": lambda: socket.socket(inet, stream, socket.IPPROTO_MPTCP).connect(other),
    "local": lambda: socket.socketpair(),
    "names": lambda: socket.getaddrinfo("localhost", 80),
}
def refusal(attempt):
    try: attempt()
    except OSError as error: return error.errno
    return 0
said = {name: refusal(attempt) for name, attempt in attempts.items()}
dial = [sys.executable, "-I", "-c", f"import socket; socket.create_connection({other!r}, 5)"]
assert (subprocess.run(dial, stderr=subprocess.DEVNULL).returncode == 0) == (said["other"] == 0)
print(json.dumps(said))
"""  # what it tells of each attempt is the number of the error; its children may do as much as it
SLEEP = "import time; print('up', flush=True); time.sleep(600)"


until = functools.partial(waiting.until, timeout_s=15.0)


class RuntimeContract:
    """Subclass it, and provide the fixtures `runtime` and `reopen`."""

    @pytest.fixture
    def runtime(self) -> Runtime:
        """A runtime without services; everything it runs is ended after the test."""
        raise NotImplementedError

    @pytest.fixture
    def reopen(self) -> Callable[[], Runtime]:
        """Makes a new runtime on the state of `runtime`, as a new daemon does."""
        raise NotImplementedError

    def run(self, runtime: Runtime, work_dir: Path, code: str, resources: Resources | None = None) -> None:
        """Start S1 as a Python program."""
        argv = [sys.executable, "-I", "-c", code]
        env = {"PATH": os.defpath, "MARK": "mine"}
        runtime.start(S1, argv, env, work_dir, resources or Resources())

    def end(self, runtime: Runtime) -> ServiceStatus:
        """S1's status when it has ended."""
        until(lambda: self.status(runtime).state is not ServiceState.RUNNING)
        return self.status(runtime)

    def status(self, runtime: Runtime) -> ServiceStatus:
        """S1's status."""
        status = runtime.status(S1)
        assert status is not None
        return status

    def test_what_never_started_has_no_status(self, runtime: Runtime) -> None:
        assert runtime.status(S1) is None
        assert runtime.running() == []
        assert runtime.usage(S1) == ServiceUsage()
        assert runtime.output(S1) == ""
        runtime.stop(S1)
        runtime.remove(S1)

    def test_exit_code_0_is_completed(self, runtime: Runtime, tmp_path: Path) -> None:
        self.run(runtime, tmp_path, "import os; print(os.environ['MARK'], os.getcwd())")
        status = self.end(runtime)
        assert (status.state, status.exit_code, status.error) == (ServiceState.COMPLETED, 0, None)
        assert runtime.output(S1) == f"mine {tmp_path}\n"

    def test_another_exit_code_is_failed(self, runtime: Runtime, tmp_path: Path) -> None:
        self.run(runtime, tmp_path, "import sys; print('why', file=sys.stderr); sys.exit(3)")
        status = self.end(runtime)
        assert (status.state, status.exit_code) == (ServiceState.FAILED, 3)
        assert status.error is not None
        assert status.error["code"] == ErrorCode.SERVICE_FAILED.value
        assert runtime.output(S1) == "why\n"

    def test_a_signal_is_told(self, runtime: Runtime, tmp_path: Path) -> None:
        self.run(runtime, tmp_path, "import os; os.kill(os.getpid(), 11)")
        status = self.end(runtime)
        assert (status.state, status.exit_code) == (ServiceState.FAILED, -11)
        assert "SIGSEGV" in status.detail

    def test_a_program_that_is_not_there_fails(self, runtime: Runtime, tmp_path: Path) -> None:
        runtime.start(S1, ["/nonexistent/program"], {}, tmp_path, Resources())
        assert "/nonexistent/program cannot be started" in self.end(runtime).detail

    def test_a_running_service_is_left_alone(self, runtime: Runtime, tmp_path: Path) -> None:
        self.run(runtime, tmp_path, SLEEP)
        self.run(runtime, tmp_path, "raise SystemExit(9)")
        assert runtime.running() == [S1]
        assert self.status(runtime).state is ServiceState.RUNNING

    def test_it_runs_again_after_its_end(self, runtime: Runtime, tmp_path: Path) -> None:
        self.run(runtime, tmp_path, "raise SystemExit(9)")
        assert self.end(runtime).exit_code == 9
        self.run(runtime, tmp_path, "print('again')")
        assert self.end(runtime).state is ServiceState.COMPLETED
        assert runtime.output(S1).endswith("again\n")

    def test_stop_ends_it(self, runtime: Runtime, tmp_path: Path) -> None:
        self.run(runtime, tmp_path, SLEEP)
        until(lambda: runtime.output(S1) != "")
        runtime.stop(S1)
        assert self.status(runtime).state is ServiceState.STOPPED
        assert runtime.running() == []

    def test_stop_waits_for_a_polite_end(self, runtime: Runtime, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys, time\n"
            # Not by print(): the signal may come while it is in it, and it cannot be entered twice.
            "def leave(*_): time.sleep(0.3); os.write(1, b'saved\\n'); sys.exit(0)\n"
            "signal.signal(signal.SIGTERM, leave); os.write(1, b'up\\n'); time.sleep(600)"
        )
        self.run(runtime, tmp_path, code)
        until(lambda: runtime.output(S1) != "")
        runtime.stop(S1, grace_s=10)
        assert runtime.output(S1) == "up\nsaved\n"
        assert self.status(runtime).state is ServiceState.STOPPED

    def test_stop_ends_what_does_not_listen(self, runtime: Runtime, tmp_path: Path) -> None:
        self.run(runtime, tmp_path, f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}")
        until(lambda: runtime.output(S1) != "")
        started_s = time.monotonic()
        runtime.stop(S1, grace_s=0.2)
        assert time.monotonic() - started_s < 5
        assert self.status(runtime).state is ServiceState.STOPPED

    def test_stop_ends_processes_that_left_their_session(self, runtime: Runtime, tmp_path: Path) -> None:
        code = (
            "import os, time\n"
            "if os.fork() == 0:\n"
            "    os.setsid()\n"
            "    if os.fork() == 0:\n"
            "        open('left', 'w').close()\n"
            "        time.sleep(600)\n"
            "    os._exit(0)\n"
            f"time.sleep(600) # {tmp_path}"
        )
        self.run(runtime, tmp_path, code)
        until((tmp_path / "left").exists)
        until(lambda: runtime.usage(S1).processes == 2)
        processes = [p for p in psutil.process_iter(["cmdline"]) if code in (p.info["cmdline"] or ())]
        assert len(processes) >= 2
        runtime.stop(S1)
        until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))

    def test_the_end_of_its_main_process_is_the_end_of_all(self, runtime: Runtime, tmp_path: Path) -> None:
        self.run(runtime, tmp_path, "import os, time\nif os.fork() == 0: time.sleep(600)\nprint('done')")
        assert self.end(runtime).state is ServiceState.COMPLETED
        assert runtime.running() == []

    def test_use_is_measured(self, runtime: Runtime, tmp_path: Path) -> None:
        self.run(runtime, tmp_path, "data = b'x' * 50_000_000; print('up', flush=True)\nwhile True: pass")
        until(lambda: runtime.output(S1) != "")
        runtime.usage(S1)
        until(lambda: runtime.usage(S1).cpu_percent > 10)
        usage = runtime.usage(S1)
        assert usage.memory_mb > 45
        assert usage.processes == 1

    def test_the_end_of_the_output_is_given(self, runtime: Runtime, tmp_path: Path) -> None:
        self.run(runtime, tmp_path, "for i in range(1000): print(i)")
        self.end(runtime)
        assert runtime.output(S1, tail_bytes=8) == "998\n999\n"

    def test_output_is_read_from_a_place_on_over_restarts(
        self, runtime: Runtime, reopen: Callable[[], Runtime], tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, "print('first'); print('half', end='', flush=True); raise SystemExit(9)")
        self.end(runtime)
        first = runtime.read_output(S1, 0, 6)
        assert (first.text, first.start, first.end, first.total) == ("first\n", 0, 6, 10)
        self.run(runtime, tmp_path, "print('second')")
        self.end(runtime)
        rest = reopen().read_output(S1, first.end, 1_000)
        begun, told, said = rest.text.splitlines()
        assert (begun, said) == ("half", "second")
        assert told.startswith("── started again (attempt 2): ")
        assert "exit code 9" in told
        assert (rest.start, rest.end) == (6, rest.total)
        assert runtime.read_output(S1, rest.end, 1_000).text == ""

    def test_a_new_runtime_knows_what_runs(
        self, runtime: Runtime, reopen: Callable[[], Runtime], tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, SLEEP)
        later = reopen()
        assert later.running() == [S1]
        assert self.status(later).state is ServiceState.RUNNING
        later.stop(S1)
        assert self.status(runtime).state is ServiceState.STOPPED

    def test_a_new_runtime_knows_how_it_ended(
        self, runtime: Runtime, reopen: Callable[[], Runtime], tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, "raise SystemExit(7)")
        self.end(runtime)
        assert self.status(reopen()).exit_code == 7

    def test_what_is_removed_is_forgotten(self, runtime: Runtime, tmp_path: Path) -> None:
        self.run(runtime, tmp_path, SLEEP)
        runtime.remove(S1)
        assert runtime.status(S1) is None
        assert runtime.output(S1) == ""

    def test_limits_are_told(self, runtime: Runtime) -> None:
        limits, why_not_all = runtime.limits()
        assert set(limits) <= {"memory", "cpu", "pids", "files", "network", "signals"}
        assert (len(limits) == 6) != bool(why_not_all)

    def test_memory_is_limited(self, runtime: Runtime, tmp_path: Path) -> None:
        if "memory" not in runtime.limits()[0]:
            pytest.skip("memory is not limited here")
        self.run(runtime, tmp_path, "x = b'x' * 300_000_000", Resources(memory_mb=100))
        status = self.end(runtime)
        assert status.state is ServiceState.FAILED
        assert status.error is not None
        assert status.error["code"] == ErrorCode.OUT_OF_MEMORY.value

    def test_cpu_is_limited(self, runtime: Runtime, tmp_path: Path) -> None:
        if "cpu" not in runtime.limits()[0]:
            pytest.skip("CPU is not limited here")
        code = (
            "import time\nstart, used = time.monotonic(), time.process_time()\n"
            "while time.monotonic() - start < 1.5: pass\nprint(time.process_time() - used)"
        )
        self.run(runtime, tmp_path, code, Resources(vcpus=0.2))
        self.end(runtime)
        assert float(runtime.output(S1)) < 0.6

    def test_a_fork_bomb_is_limited_and_ends(self, runtime: Runtime, tmp_path: Path) -> None:
        if "pids" not in runtime.limits()[0]:
            pytest.skip("processes are not limited here")
        code = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        self.run(runtime, tmp_path, code, Resources(pids=30, vcpus=0.5))
        until(lambda: runtime.usage(S1).processes == 30)
        runtime.stop(S1, grace_s=0.2)
        assert runtime.running() == []
        assert self.status(runtime).state is ServiceState.STOPPED

    def run_confined(
        self, runtime: Runtime, work_dir: Path, code: str, reach: Reach | None = None, *arguments: Path
    ) -> str:
        """Run a program as S1, confined, to its end; returns its output."""
        if not {"files", "signals"} <= set(runtime.limits()[0]):
            pytest.skip("files and signals are not limited here")
        argv = [sys.executable, "-I", "-c", code, *map(str, arguments)]
        runtime.start(S1, argv, {"PATH": os.defpath}, work_dir, Resources(), reach or Reach())
        self.end(runtime)
        return runtime.output(S1)

    def test_a_confined_service_writes_to_its_own_folders_only(
        self, runtime: Runtime, tmp_path: Path
    ) -> None:
        work, shared, outside = (tmp_path / name for name in ("work", "shared", "outside"))
        for folder in (work, outside):
            folder.mkdir()
        victim = outside / "victim"
        victim.write_text("whole")
        code = (
            "import os, pathlib, shutil, sys, tempfile\n"
            "shared, outside = map(pathlib.Path, sys.argv[1:])\n"
            "pathlib.Path('own').write_text('x'); (shared / 'given').write_text('x')\n"
            "tempfile.NamedTemporaryFile().close(); open('/dev/null', 'w').close()\n"
            "shutil.move('own', shared / 'moved')\n"
            "attempts = [lambda: (outside / 'new').write_text('x'), lambda: (outside / 'victim').unlink(),\n"
            "  lambda: os.truncate(outside / 'victim', 0), lambda: (outside / 'folder').mkdir(),\n"
            "  lambda: os.rename(outside / 'victim', 'stolen'), lambda: os.symlink('x', outside / 'link')]\n"
            "for attempt in attempts:\n"
            "    try: attempt(); print('written')\n"
            "    except OSError: print('refused')"
        )
        said = self.run_confined(runtime, work, code, Reach(writable=(str(shared),)), shared, outside)
        assert said == "refused\n" * 6
        assert [path.name for path in outside.iterdir()] == ["victim"]
        assert victim.read_text() == "whole"
        assert sorted(path.name for path in shared.iterdir()) == ["given", "moved"]

    def test_a_confined_service_signals_and_sees_into_its_own_processes_only(
        self, runtime: Runtime, tmp_path: Path
    ) -> None:
        code = (
            "import os, signal, subprocess, sys, time\n"
            "own = subprocess.Popen(['sleep', '600'])\n"
            "for attempt in (lambda: os.kill(int(sys.argv[1]), 9),\n"
            "                lambda: open(f'/proc/{sys.argv[1]}/environ').read()):\n"
            "    try: attempt(); sys.exit('reached others')\n"
            "    except (PermissionError, ProcessLookupError, FileNotFoundError): pass\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "os.kill(-1, 9)\n"  # all that it may signal, but itself
            "print('ended', own.wait())"
        )
        with subprocess.Popen(["sleep", "600"]) as other:
            try:
                said = self.run_confined(runtime, tmp_path, code, Reach(), Path(str(other.pid)))
                assert other.poll() is None
            finally:
                other.kill()
        assert said == "ended -9\n"
        assert self.status(runtime).state is ServiceState.COMPLETED

    def test_a_confined_service_has_working_multiprocessing_and_leaves_no_shared_memory(
        self, runtime: Runtime, tmp_path: Path
    ) -> None:
        before = set(SHARED_MEMORY.iterdir())
        code = (
            "import multiprocessing, pathlib, resource\n"
            "print(multiprocessing.Pool(2).map(abs, [-1, -2]))\n"
            "multiprocessing.shared_memory.SharedMemory('left-behind', create=True, size=10)\n"
            "print(resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE)[1])\n"
        ).replace("import multiprocessing,", "import multiprocessing.shared_memory,")
        said = self.run_confined(runtime, tmp_path, code)
        assert said.splitlines()[:2] == ["[1, 2]", "(0, 0) 16384"]
        assert os.geteuid() != 0 or set(SHARED_MEMORY.iterdir()) <= before

    def test_a_service_dials_and_listens_where_it_may(self, runtime: Runtime, tmp_path: Path) -> None:
        if "network" not in runtime.limits()[0]:
            pytest.skip("the network is not limited here")
        with socket.create_server(("127.0.0.1", 0)) as given, socket.create_server(("127.0.0.1", 0)) as other:
            ports = [listener.getsockname()[1] for listener in (given, other)]
            argv = [sys.executable, "-I", "-c", DIALLING, *map(str, ports)]
            for reach, may in (
                (Reach(dials=(ports[0],)), {"given", "free"}),
                (Reach(dials=(), listens=(ports[1] - 1,)), {"listen", "free"}),
                (Reach(), {"given", "other", "sent", "listen", "free", "udp", "mptcp"}),
            ):
                runtime.start(S1, argv, {"PATH": os.defpath}, tmp_path, Resources(), reach)
                assert self.end(runtime).state is ServiceState.COMPLETED, runtime.output(S1)
                said = json.loads(runtime.output(S1).splitlines()[-1])
                assert {name for name, refusal in said.items() if not refusal} == may | {"local", "names"}
                assert set(said.values()) <= {0, errno.EACCES}
