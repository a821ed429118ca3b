"""The addons of a node: what they start, how they are, and what they contribute."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flops.core.build_tools import BuildTools, build_findings, missing_sentence
from flops.core.cluster import IMAGE_BUILDER_ADDON, Addon, AddonState, DataTag, Resources, ServiceState
from flops.core.ids import ServiceId
from flops.durable_file import write_durably
from flops.errors import CATALOGUE, ErrorCode, FlopsError
from flops.node.backoff import Backoff
from flops.ports import DataCatalog, Runtime
from flops.wire import flight
from flops.wire.flight import ENDPOINT_FILE

DATA_SERVER = ServiceId(flight.DATA_SERVER)
CHECK_INTERVAL_S = 2.0
QUICK_CHECK_INTERVAL_S = 0.1  # while it starts
CERTIFY_INTERVAL_S = 60.0  # how often is looked whether its certificate is to be renewed
UNHEALTHY_AFTER_S = 20.0  # of starting
_STOP_GRACE_S = 5.0
_PORT_FILE = "port.json"  # the port it had, beside its data: devices know it

_log = logging.getLogger(__name__)


class NodeAddon(Protocol):
    """An addon that is switched on."""

    def check(self) -> float:
        """Look after the addon, starting what is missing; returns seconds until the next look."""
        ...

    def stop(self) -> None:
        """End what it started."""
        ...

    def state(self) -> Addon:
        """How it is."""
        ...

    def data_tags(self) -> tuple[DataTag, ...]:
        """Data that it holds."""
        ...


class ImageBuilder:
    """The addon image-builder: nothing runs, but the tools must be there.

    Args:
        find_tools: looks what is there for building.
    """

    def __init__(self, find_tools: Callable[[], BuildTools]) -> None:
        self._find_tools = find_tools
        self._state = Addon(name=IMAGE_BUILDER_ADDON, state=AddonState.STARTING)

    def check(self) -> float:
        """Look for the tools. Healthy is what can build something; the detail says what it cannot."""
        tools = self._find_tools()
        state = AddonState.UNHEALTHY if tools.missing else AddonState.HEALTHY
        detail = missing_sentence(build_findings(tools))
        self._state = Addon(name=IMAGE_BUILDER_ADDON, state=state, detail=detail)
        return 10.0

    def stop(self) -> None:
        """Nothing runs."""

    def state(self) -> Addon:
        """How it is."""
        return self._state

    def data_tags(self) -> tuple[DataTag, ...]:
        """It holds none."""
        return ()


@dataclass(frozen=True)
class DataServerPlan:
    """How to run the ML data server.

    Args:
        argv: its command line, to which ``--port PORT`` is added.
        env: its environment.
        folder: its state; it writes ``endpoint.json`` there when it is ready.
        host: address it listens on.
        port: port it should have; a free one is taken when another program has it.
        certify: sees to the certificate that it shows, and says whether that is a new one; None where it
            does not encrypt. Raises ``unreachable`` and others.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    folder: Path
    host: str
    port: int
    certify: Callable[[], bool] | None = None


class DataServerAddon:
    """The addon FLOps-learner: runs the ML data server, also after it crashed, and asks it for its tags.

    Args:
        name: the addon's name.
        plan: how to run the server.
        runtime: runs its process, which outlives the daemon.
        open_catalog: connects to the server in a folder; raises ``unreachable``.
    """

    def __init__(
        self,
        name: str,
        plan: DataServerPlan,
        runtime: Runtime,
        open_catalog: Callable[[Path], DataCatalog],
    ) -> None:
        self._name = name
        self._plan = plan
        self._runtime = runtime
        self._open_catalog = open_catalog
        self._pauses = Backoff(0.5, 30.0)
        self._start_at_s = 0.0
        self._started_at_s: float | None = None
        self._certify_at_s = 0.0
        self._is_port_taken = False
        self._catalog: DataCatalog | None = None
        self._tags: tuple[DataTag, ...] = ()
        self._state = Addon(name=name, state=AddonState.STARTING)

    def state(self) -> Addon:
        """How it is."""
        return self._state

    def data_tags(self) -> tuple[DataTag, ...]:
        """What the server holds, as last heard."""
        return self._tags

    def check(self) -> float:
        """Start the server if it does not run, and ask it for its tags."""
        try:
            return self._check()
        except FlopsError as error:
            self._set(AddonState.UNHEALTHY, error.message)
            self._start_at_s = time.monotonic() + self._pauses.next_s()
            return QUICK_CHECK_INTERVAL_S

    def _check(self) -> float:
        status = self._runtime.status(DATA_SERVER)
        if status is None or status.state is not ServiceState.RUNNING:
            if time.monotonic() < self._start_at_s:
                return QUICK_CHECK_INTERVAL_S
            if self._started_at_s is not None:
                return self._take_end(None if status is None else status.exit_code)
            self._start()
            return QUICK_CHECK_INTERVAL_S
        if self._started_at_s is None:
            self._started_at_s = time.monotonic()  # an earlier daemon has started it
        if self._renew():
            return 0.0
        return self._ask()

    def _renew(self) -> bool:
        """Have the server end when it has a new certificate to show, which it reads when it starts."""
        if self._plan.certify is None or time.monotonic() < self._certify_at_s:
            return False
        self._certify_at_s = time.monotonic() + CERTIFY_INTERVAL_S
        try:
            if not self._plan.certify():
                return False
        except FlopsError as error:
            _log.warning("the certificate of the ML data server is not renewed: %s", error)
            return False
        self._set(AddonState.STARTING, "It starts again, with a new certificate.")
        self._runtime.stop(DATA_SERVER, grace_s=_STOP_GRACE_S)
        self._started_at_s = None
        return True

    def _start(self) -> None:
        (self._plan.folder / ENDPOINT_FILE).unlink(missing_ok=True)
        if self._plan.certify is not None:
            self._plan.certify()
            self._certify_at_s = time.monotonic() + CERTIFY_INTERVAL_S
        port = self._choose_port()
        self._plan.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        argv = (*self._plan.argv, "--port", str(port))
        self._runtime.start(DATA_SERVER, argv, self._plan.env, self._plan.folder, Resources())
        self._started_at_s = time.monotonic()

    def _choose_port(self) -> int:
        """The port it had before, that devices know; else the one asked for; else any (0)."""
        if self._is_port_taken:
            return 0
        wanted = (self._kept_port(), self._plan.port)
        return next((port for port in wanted if port and _is_free(self._plan.host, port)), 0)

    def _kept_port(self) -> int:
        """The port it had last; 0 when there was none, or another one is asked for since."""
        try:
            kept = json.loads((self._plan.folder / _PORT_FILE).read_text())
            return int(kept["port"]) if kept["asked"] == self._plan.port else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _keep_port(self) -> None:
        port = endpoint_port(self._plan.folder)
        if port and port != self._kept_port():
            kept = json.dumps({"asked": self._plan.port, "port": port})
            write_durably(self._plan.folder / _PORT_FILE, kept + "\n")

    def _take_end(self, exit_code: int | None) -> float:
        self._started_at_s = None
        self._catalog = None
        self._tags = ()
        if exit_code == CATALOGUE[ErrorCode.PORT_OCCUPIED].exit_code and not self._is_port_taken:
            self._is_port_taken = True
            return 0.0
        lines = self._runtime.output(DATA_SERVER, tail_bytes=2_000).strip().splitlines()
        last = f": {lines[-1][:300]}" if lines else ""
        self._set(AddonState.UNHEALTHY, f"The ML data server ended with exit code {exit_code}{last}.")
        _log.warning("%s", self._state.detail)
        self._start_at_s = time.monotonic() + self._pauses.next_s()
        return QUICK_CHECK_INTERVAL_S

    def _ask(self) -> float:
        started_at_s = self._started_at_s if self._started_at_s is not None else time.monotonic()
        try:
            if self._catalog is None:
                self._catalog = self._open_catalog(self._plan.folder)
            self._tags = tuple(self._catalog.tags())
        except FlopsError as error:
            self._catalog = None
            if (
                self._state.state is AddonState.STARTING
                and time.monotonic() - started_at_s < UNHEALTHY_AFTER_S
            ):
                return QUICK_CHECK_INTERVAL_S
            self._set(AddonState.UNHEALTHY, error.message)
            return CHECK_INTERVAL_S
        self._pauses.reset()
        self._keep_port()
        self._set(AddonState.HEALTHY, self._port_sentence())
        return CHECK_INTERVAL_S

    def _port_sentence(self) -> str:
        port = endpoint_port(self._plan.folder)
        if self._plan.port in {0, port}:
            return ""
        return f"Port {self._plan.port} was taken by another program: the data server listens on port {port}."

    def _set(self, state: AddonState, detail: str) -> None:
        if state is not self._state.state:
            _log.info("addon %s: %s %s", self._name, state.value, detail)
        port = endpoint_port(self._plan.folder) if state is AddonState.HEALTHY else 0
        self._state = Addon(name=self._name, state=state, detail=detail, port=port)

    def stop(self) -> None:
        """End the server."""
        self._runtime.stop(DATA_SERVER, grace_s=_STOP_GRACE_S)


class Addons:
    """All addons that are on, looked after in one thread each.

    Args:
        addons: the addons.
    """

    def __init__(self, addons: Sequence[NodeAddon]) -> None:
        self._addons = addons
        self._is_stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to look after them."""
        for addon in self._addons:
            thread = threading.Thread(target=self._look_after, args=(addon,), name="addon", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _look_after(self, addon: NodeAddon) -> None:
        while not self._is_stopping.is_set():
            try:
                pause_s = addon.check()
            except Exception:  # noqa: BLE001 (a failing addon never takes the node with it)
                _log.exception("an addon has a defect")
                pause_s = CHECK_INTERVAL_S
            self._is_stopping.wait(pause_s)

    def stop(self) -> None:
        """End what they started."""
        self._is_stopping.set()
        for thread in self._threads:
            thread.join(10.0)
        for addon in self._addons:
            addon.stop()

    def states(self) -> tuple[Addon, ...]:
        """How they are."""
        return tuple(addon.state() for addon in self._addons)

    def data_tags(self) -> tuple[DataTag, ...]:
        """Data on this node."""
        return tuple(tag for addon in self._addons for tag in addon.data_tags())


def endpoint_port(folder: Path) -> int:
    """The port a data server listens on; 0 when it is not ready."""
    try:
        return int(json.loads((folder / ENDPOINT_FILE).read_text())["port"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _is_free(host: str, port: int) -> bool:
    # A plain bind: gRPC would share a port with another program that allows it.
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
