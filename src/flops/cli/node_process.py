"""Starting and ending a node's daemon: by systemd where it runs the machine's node, else as a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flops.errors import CATALOGUE, ErrorCode, FlopsError

if TYPE_CHECKING:
    from flops.node.paths import NodePaths
    from flops.node.report import NodeReport

UNIT = "nodeengine.service"
UNIT_FILE = Path("/etc/systemd/system") / UNIT
START_TIMEOUT_S = 30.0
JOIN_TIMEOUT_S = 3.0
STOP_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 5.0
_LOG_BYTES = 8 * 1024**2
_POLL_S = 0.05


def is_run_by_systemd(paths: NodePaths) -> bool:
    """Whether systemd runs this node: it is the machine's own, and its unit is installed."""
    return paths.is_system and Path("/run/systemd/system").is_dir() and UNIT_FILE.exists()


def start_daemon(paths: NodePaths, home: Path | None) -> None:
    """Start the daemon in the background, and wait until it runs.

    Raises:
        FlopsError: ``already_running``; why the daemon could not start.
    """
    for stale in (paths.startup_error, paths.status):  # of an earlier daemon that was killed
        stale.unlink(missing_ok=True)
    if is_run_by_systemd(paths):
        _systemctl("start")
        _wait_for_start(paths, lambda: None)
        return
    command = [sys.executable, "-m", "flops.wiring", "node", *([] if home is None else ["--home", str(home)])]
    paths.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    _rotate(paths.log)
    with paths.log.open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=paths.home
        )
    _wait_for_start(paths, process.poll)
    process.returncode = 0  # it goes on without us


def _wait_for_start(paths: NodePaths, ended: Callable[[], int | None]) -> None:
    from flops.node.home import already_running

    deadline_s = time.monotonic() + START_TIMEOUT_S
    while running_report(paths) is None:
        with contextlib.suppress(OSError, ValueError):
            raise FlopsError.from_dict(json.loads(paths.startup_error.read_text()))
        code = ended()
        if code == CATALOGUE[ErrorCode.ALREADY_RUNNING].exit_code:
            raise already_running(paths.pid)
        if code is not None or time.monotonic() > deadline_s:
            raise FlopsError(
                ErrorCode.INTERNAL,
                f"NodeEngine did not start; the end of {paths.log}:",
                hint="The log says more: NodeEngine logs",
                details={"log": _last_lines(paths.log)},
            )
        time.sleep(_POLL_S)


def running_report(paths: NodePaths) -> NodeReport | None:
    """What the running daemon tells about itself; None when none runs or it has told nothing yet."""
    from flops.node.home import running_pid
    from flops.node.report import read_report

    report = read_report(paths.status)
    return report if report is not None and report.pid == running_pid(paths.pid) else None


def wait_for_join(paths: NodePaths) -> NodeReport | None:
    """The daemon's report when it has joined its cluster, or when that takes long."""
    deadline_s = time.monotonic() + JOIN_TIMEOUT_S
    while True:
        report = running_report(paths)
        is_decided = report is not None and report.is_connected
        if is_decided or time.monotonic() > deadline_s:
            return report
        time.sleep(_POLL_S)


def stop_daemon(paths: NodePaths) -> bool:
    """End the daemon with its services and addons; false when none runs.

    Raises:
        FlopsError: ``timeout`` when it does not end, ``forbidden`` when it is another user's.
    """
    from flops.node.home import running_pid

    pid = running_pid(paths.pid)
    if pid is None:
        return False
    if is_run_by_systemd(paths) and _systemctl("is-active", check=False) == 0:
        _systemctl("stop")
    else:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            return True
        except PermissionError as exc:
            raise FlopsError(
                ErrorCode.FORBIDDEN, f"NodeEngine (process {pid}) belongs to another user.", hint="Use sudo."
            ) from exc
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while running_pid(paths.pid) is not None:
        if time.monotonic() > deadline_s:
            raise FlopsError(ErrorCode.TIMEOUT, f"NodeEngine (process {pid}) does not end.")
        time.sleep(_POLL_S)
    _wait_for_exit(pid)
    return True


def _wait_for_exit(pid: int) -> None:
    """The daemon has let go of its home; its process is about to be gone."""
    deadline_s = time.monotonic() + EXIT_TIMEOUT_S
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline_s:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return
            time.sleep(_POLL_S)


def _systemctl(verb: str, *, check: bool = True) -> int:
    result = subprocess.run(["systemctl", verb, UNIT], capture_output=True, text=True, check=False)
    if check and result.returncode != 0:
        raise FlopsError(
            ErrorCode.CONFLICT,
            f"systemctl {verb} {UNIT} failed: {result.stderr.strip()}",
            hint=f"`systemctl status {UNIT}` and `journalctl -u {UNIT}` say more.",
        )
    return result.returncode


def unit_text(paths: NodePaths) -> str:
    """The systemd unit of the machine's node.

    Services outlive a crash of the daemon (KillMode), and the daemon itself ends them when it is stopped.
    """
    return f"""[Unit]
Description=FLOps NodeEngine
After=network.target
StartLimitIntervalSec=10

[Service]
Type=simple
User=root
ExecStart={_quoted(sys.executable)} -m flops.wiring node
Restart=on-failure
RestartSec=2
RestartPreventExitStatus={CATALOGUE[ErrorCode.ALREADY_RUNNING].exit_code}
KillMode=process
TimeoutStopSec={STOP_TIMEOUT_S:.0f}
Delegate=yes
TasksMax=infinity
StandardOutput=append:{paths.log}
StandardError=append:{paths.log}

[Install]
WantedBy=multi-user.target
"""


def _quoted(path: str) -> str:
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _rotate(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.1"))


def _last_lines(log: Path, count: int = 10) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-count:]) + "\n"


def follow_log(log: Path, show: Callable[[str], None]) -> None:
    """Show what is appended to a log, until the process is interrupted.

    Raises:
        FlopsError: ``not_running`` when there is no log.
    """
    if not log.exists():
        raise FlopsError(
            ErrorCode.NOT_RUNNING,
            f"Error opening log file {log}, is the NodeEngine running? Use 'NodeEngine status' to check.",
        )
    file = log.open(errors="replace")
    try:
        file.seek(0, os.SEEK_END)
        while True:
            line = file.readline()
            if line:
                show(line.rstrip("\n"))
                continue
            time.sleep(_POLL_S * 4)
            if log.exists() and log.stat().st_ino != os.fstat(file.fileno()).st_ino:
                file.close()
                file = log.open(errors="replace")
    finally:
        file.close()
