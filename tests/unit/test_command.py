"""Other programs end in time, with their children, whatever they print."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flops.command import Completed, StoppedError, run_command, stopped_when
from flops.settings import inherited_environment
from flops.testing.waiting import until


def run(code: str, folder: Path, *, timeout_s: float = 20.0, send: bytes = b"") -> Completed:
    return run_command(
        [sys.executable, "-I", "-S", "-c", code],
        environ=inherited_environment(),
        cwd=folder,
        timeout_s=timeout_s,
        send=send,
    )


def test_output_errors_and_exit_code(tmp_path: Path) -> None:
    code = "import sys; print(sys.stdin.read()); print('bad', file=sys.stderr); sys.exit(3)"
    done = run(code, tmp_path, send=b"hello")
    assert (done.exit_code, done.output, done.errors) == (3, b"hello\n", "bad\n")
    assert not done.is_timed_out


def test_a_flood_of_output_does_not_block(tmp_path: Path) -> None:
    done = run("import sys; sys.stdout.write('x' * 3_000_000); sys.stderr.write('y' * 3_000_000)", tmp_path)
    assert (len(done.output), len(done.errors)) == (3_000_000, 1_048_576)


def test_the_deadline_ends_children_too(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    done = run(code, tmp_path, timeout_s=1.0)
    assert done.is_timed_out
    assert done.exit_code == -9
    deadline = time.monotonic() + 5
    while psutil.pid_exists(int(done.output)) and time.monotonic() < deadline:
        if psutil.Process(int(done.output)).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.01)
    assert time.monotonic() < deadline


def test_a_program_and_its_children_end_with_the_process_that_ran_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = f"sleep 60 & echo $$ $! >> {pids}; wait"
    runs = (
        "from pathlib import Path; from flops.command import run_command;"
        f"run_command(['/bin/sh', '-c', {program!r}], environ={{}}, cwd=Path('/'), timeout_s=60.0)"
    )
    runner = subprocess.Popen([sys.executable, "-c", runs])
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    family = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    runner.kill()
    runner.wait()
    assert psutil.wait_procs(family, timeout=5)[1] == []


def test_watch_sees_every_line_once_and_ends_the_program(tmp_path: Path) -> None:
    seen: list[str] = []

    def watch(news: str) -> str | None:
        seen.append(news)
        return "enough" if "two" in "".join(seen) else None

    code = (
        "import sys, time\n"
        "for word in ('one', 'two'): print(word, file=sys.stderr, flush=True)\n"
        "time.sleep(60)\n"
    )
    done = run_command(
        [sys.executable, "-I", "-S", "-c", code],
        environ=inherited_environment(),
        cwd=tmp_path,
        timeout_s=30,
        watch=watch,
    )
    assert done.stopped_because == "enough"
    assert "".join(seen) == "one\ntwo\n"


def test_a_program_whose_result_nobody_needs_is_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    with stopped_when(lambda: time.monotonic() - started > 0.3), pytest.raises(StoppedError):
        run("import time; time.sleep(60)", tmp_path)
    assert time.monotonic() - started < 5
    assert run("print(1)", tmp_path).exit_code == 0  # what comes afterwards is needed


def test_work_within_needless_work_is_needless(tmp_path: Path) -> None:
    started = time.monotonic()
    with (
        stopped_when(lambda: time.monotonic() - started > 0.3),
        stopped_when(lambda: False),
        pytest.raises(StoppedError),
    ):
        run("import time; time.sleep(60)", tmp_path)
    assert time.monotonic() - started < 5
