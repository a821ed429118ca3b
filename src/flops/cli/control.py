"""The control plane of this machine as a process: finding, starting and ending it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from flops.adapters.mlflow_server import end_left_over
from flops.adapters.system_clock import SystemClock
from flops.cli.output import say
from flops.cli.own_process import Ended, OwnProcess
from flops.control.kept_ports import KeptPorts
from flops.control.lifetime import ENDPOINT_FILE, TRACKING_FOLDER
from flops.errors import ErrorCode, FlopsError
from flops.settings import ControlSettings

LOG_FILE = "control.log"


def read_endpoint(folder: Path) -> dict[str, Any] | None:
    """What the running control plane of a folder tells its clients; None when none runs."""
    return _process(folder).endpoint()


def start_control_plane(settings: ControlSettings, options: Sequence[str]) -> Mapping[str, Any]:
    """Start the control plane in the background, and wait until it is ready.

    Args:
        settings: as the process will have them.
        options: arguments of its process, such as ``--manager-port=5072``.

    Returns:
        Its endpoint.

    Raises:
        FlopsError: ``already_running``, ``port_occupied``, ``timeout``, or what kept it from starting.
    """
    with _ports_named(settings):
        return _process(settings.control_dir).start(options)


def run_in_foreground(
    settings: ControlSettings, options: Sequence[str], on_ready: Callable[[Mapping[str, Any]], None]
) -> None:
    """Run the control plane attached to this terminal until it ends; see `OwnProcess.run_in_foreground`."""
    with _ports_named(settings):
        _process(settings.control_dir).run_in_foreground(options, on_ready)


def stop_control_plane(folder: Path) -> Ended:
    """End the control plane with its MLflow server, by force when it does not end by itself.

    An MLflow server that a killed control plane left over is ended as well.

    Raises:
        FlopsError: ``not_running``; ``forbidden`` when it belongs to another user.
    """
    process = _process(folder)
    ended = process.stop()
    if ended is None:
        ended = _end_orphan(folder / TRACKING_FOLDER)
        if ended is None:
            raise process.not_running()
        (folder / ENDPOINT_FILE).unlink(missing_ok=True)
    return ended


def _process(folder: Path) -> OwnProcess:
    return OwnProcess("control-plane", "control plane", folder, LOG_FILE, "manager_url", "flops")


def _end_orphan(folder: Path) -> Ended | None:
    """End the MLflow server that a killed control plane left over; None when there is none."""
    now_s = SystemClock().now_s()
    try:
        orphan = end_left_over(folder)
    except (OSError, psutil.AccessDenied):  # another user's: not ours to end
        return None
    if orphan is None:
        return None
    say("The control plane had been killed; its MLflow server was left over.")
    return Ended({}, orphan.pid, now_s - orphan.create_time(), ())


@contextmanager
def _ports_named(settings: ControlSettings) -> Iterator[None]:
    try:
        yield
    except FlopsError as error:
        if error.code is ErrorCode.PORT_OCCUPIED:
            error.hint = _port_hint(settings, error.message)
        raise


def _port_hint(settings: ControlSettings, message: str) -> str:
    """Which option of `flops up` moves the port that an error names."""
    kept = KeptPorts(settings.control_dir)
    ports = {
        "--manager-port": kept.wanted("manager", settings.manager_port),
        "--cluster-port": kept.wanted("cluster", settings.cluster_port),
        "--tracking-port": kept.wanted("tracking", settings.tracking_port),
    }
    numbers = {int(number) for number in re.findall(r"\d+", message)}
    options = [option for option, port in ports.items() if port and port in numbers] or list(ports)
    return f"Stop the program that holds the port, or choose another one with {' or '.join(options)}."
