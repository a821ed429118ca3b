"""What `flops doctor` checks on this machine: the home, ports, databases, tools. Works without a manager."""

from __future__ import annotations

import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from flops.adapters.mlflow_server import DATABASE_FILE
from flops.adapters.sqlite_file import check_sqlite_file
from flops.adapters.system_clock import SystemClock
from flops.cli.control import LOG_FILE, read_endpoint
from flops.cli.examination import HERE, WAIT_S
from flops.control.lifetime import (
    ADMIN_TOKEN_FILE,
    CLUSTER_FILE,
    ENDPOINT_FILE,
    PROJECTS_FILE,
    SECRET_FILE,
    TRACKING_FOLDER,
)
from flops.core.health import fine, known, problem, warning
from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from flops.core.health import Finding
    from flops.settings import ControlSettings

DATABASES = (CLUSTER_FILE, PROJECTS_FILE, f"{TRACKING_FOLDER}/{DATABASE_FILE}")
_PRIVATE = (ADMIN_TOKEN_FILE, SECRET_FILE)
_FUTURE_S = 60.0


def examine_home(control: Path) -> Iterator[Finding]:
    """The control plane's folder, and who may read its tokens."""
    if not control.exists():
        yield known("home", str(control), "No control plane has run here yet.")
        return
    found = []
    if stat.S_IMODE(control.stat().st_mode) & 0o022:
        what = "Other users may write to this folder."
        found.append(problem("home", str(control), what, f"chmod 700 {control}"))
    for name in _PRIVATE:
        file = control / name
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE(file.stat().st_mode)
            if mode & 0o077:
                what = f"Other users may read this token: its mode is {mode:03o}."
                found.append(problem("home", str(file), what, f"chmod 600 {file}"))
    yield from found or [fine("home", str(control), "Only its owner may write to it and read its tokens.")]


def examine_ports(control: Path, settings: ControlSettings) -> Iterator[Finding]:
    """The three ports: ours while the control plane runs, else free."""
    endpoint = read_endpoint(control)
    listeners = _listeners()
    if endpoint is None:
        for name, host, port in _configured(settings):
            yield _free_port(name, host, port, listeners)
        return
    family = _family(int(endpoint["pid"]))
    for name, host, port in _announced(endpoint):
        owners = listeners.get(port, set())
        if owners & family:
            yield fine("ports", f"{host}:{port}", f"The port of {name} is ours.")
        elif owners:
            what = f"The port of {name} is held by {_names(owners)}, which is not the control plane."
            yield problem(
                "ports", f"{host}:{port}", what, "Stop that program, or `flops down` and other ports."
            )
        else:
            what = f"Nothing listens on the port of {name}."
            yield problem(
                "ports", f"{host}:{port}", what, f"Look at {control / LOG_FILE}; `flops down`, `flops up`."
            )


def _free_port(name: str, host: str, port: int, listeners: Mapping[int, set[int | None]]) -> Finding:
    option = f"--{name.split()[-1].lower()}-port"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            owners = listeners.get(port)
            if owners is None:
                what = f"The port of {name} cannot be used: {exc.strerror}."
                return problem("ports", f"{host}:{port}", what, "Check FLOPS_HOST and FLOPS_CLUSTER_HOST.")
            what = f"The port of {name} is taken by {_names(owners)}."
            advice = f"Stop that program, or start with another port: flops up {option}=N."
            return problem("ports", f"{host}:{port}", what, advice)
    return fine("ports", f"{host}:{port}", f"The port of {name} is free.")


def _configured(settings: ControlSettings) -> list[tuple[str, str, int]]:
    ports = [
        ("the manager", settings.host, settings.manager_port),
        ("the cluster", settings.cluster_host, settings.cluster_port),
        ("MLflow's tracking", "127.0.0.1", settings.tracking_port),
    ]
    return [entry for entry in ports if entry[2]]


def _announced(endpoint: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    keys = (
        ("manager_url", "the manager"),
        ("cluster_address", "the cluster"),
        ("tracking_loopback_url", "MLflow"),
    )
    for key, name in keys:
        host, _, port = str(endpoint.get(key, "")).rstrip("/").rpartition("://")[2].rpartition(":")
        if port.isdecimal():
            yield name, host, int(port)


def _listeners() -> dict[int, set[int | None]]:
    """Which processes listen on which TCP port; None is one of another user."""
    found: dict[int, set[int | None]] = {}
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr:
            found.setdefault(connection.laddr[1], set()).add(connection.pid)
    return found


def _family(pid: int) -> set[int | None]:
    with suppress(psutil.Error):
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return {pid}


def _names(pids: set[int | None]) -> str:
    names = []
    for pid in pids:
        name = "a program of another user"
        if pid is not None:
            with suppress(psutil.Error):
                name = f"{psutil.Process(pid).name()} (process {pid})"
        names.append(name)
    return " and ".join(sorted(names))


def examine_databases(control: Path) -> Iterator[Finding]:
    """The control plane's SQLite files, read only, whether it runs or not."""
    for name in DATABASES:
        path = control / name
        if not path.exists():
            continue
        try:
            check_sqlite_file(path, within_s=WAIT_S / len(DATABASES))
        except FlopsError as error:
            if error.code is ErrorCode.TIMEOUT:
                yield known("databases", str(path), f"It was not looked through to its end: {error.message}")
                continue
            advice = (
                "`flops down`, keep a copy of the file, and put a backup in its place, or the output of"
                f" `sqlite3 {path.name} .recover`; without the file, FLOps begins anew."
            )
            yield problem("databases", str(path), error.message, advice)
        else:
            yield fine("databases", str(path), "It is intact.")


def examine_clock(control: Path) -> Iterator[Finding]:
    """Files from the future: this machine's clock is, or was, wrong."""
    now_s = SystemClock().now_s()
    ahead_s = 0.0
    for name in (ENDPOINT_FILE, ADMIN_TOKEN_FILE, LOG_FILE, *DATABASES):
        with suppress(OSError):
            ahead_s = max(ahead_s, (control / name).stat().st_mtime - now_s)
    if ahead_s > _FUTURE_S:
        what = f"Files of the control plane were written {ahead_s:.0f} s in the future."
        yield warning("clock", HERE, what, "Have the clock set by NTP (`timedatectl set-ntp true`).")


def examine_tools(is_needed: bool) -> Iterator[Finding]:
    """git and uv; `is_needed` where the control plane or a builder runs, which read repositories by git."""
    import uv

    git = shutil.which("git")
    if git is not None:
        yield fine("tools", HERE, f"git is {git}.")
    elif is_needed:
        what = "git cannot be found: no project's repository can be read."
        yield problem("tools", HERE, what, "Install git.")
    else:
        yield known(
            "tools", HERE, "git cannot be found; only the control plane's machine and builders need it."
        )
    try:
        yield fine("tools", HERE, f"uv is {uv.find_uv_bin()}.")
    except FileNotFoundError:
        yield warning("tools", HERE, "uv cannot be found.", "Install FLOps anew: uv comes with it.")
