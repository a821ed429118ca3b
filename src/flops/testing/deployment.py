"""A whole deployment of real processes on free ports, driven by the same commands users type."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

POLL_S = 0.1
COMMAND_TIMEOUT_S = 240.0


class Deployment:
    """One control plane and its nodes, with all state below `home`.

    Args:
        home: an empty folder, kept by the caller.
        environ: environment of every process; the current one when None.
        address: where the control plane listens, and nodes dial it.
        container_socket: of the engine that nodes use; None for what they find.
    """

    def __init__(
        self,
        home: Path,
        environ: Mapping[str, str] | None = None,
        *,
        address: str = "127.0.0.1",
        container_socket: Path | None = None,
    ) -> None:
        self.home = home
        self._bin = Path(sys.executable).parent
        base = dict(os.environ if environ is None else environ)  # noqa: TID251 (children inherit it)
        self._environ = {**base, "FLOPS_HOME": str(home), "PATH": f"{self._bin}:{base.get('PATH', '')}"}
        self._environ |= {"FLOPS_HOST": address, "FLOPS_CLUSTER_HOST": address}
        if container_socket is not None:
            self._environ["FLOPS_CONTAINER_SOCKET"] = str(container_socket)
        self._address = address
        self._is_local = ipaddress.ip_address(address).is_loopback
        self._ports = dict(zip(("manager", "cluster", "tracking"), free_ports(3), strict=True))
        self.nodes: list[str] = []
        self.prefixes: dict[str, tuple[str, ...]] = {}  # by node: what runs its commands on another machine

    @property
    def cluster_port(self) -> int:
        """The port nodes dial."""
        return self._ports["cluster"]

    def run(
        self, *command: str, exit_code: int | None = 0, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of ours, after a prefix; `exit_code` is the expected one, None for any."""
        result = subprocess.run(
            [*prefix, str(self._bin / command[0]), *command[1:]],
            env=self._environ,
            cwd=self.home,
            text=True,
            capture_output=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if exit_code is not None:
            assert result.returncode == exit_code, (
                f"{command}: {result.returncode}\n{result.stdout}\n{result.stderr}"
            )
        return result

    def begin(self, *command: str) -> subprocess.Popen[str]:
        """Start a command of ours that goes on; its whole output is its standard output."""
        return subprocess.Popen(
            [str(self._bin / command[0]), *command[1:]],
            env=self._environ,
            cwd=self.home,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def flops(self, *arguments: str, exit_code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a `flops` command."""
        return self.run("flops", *arguments, exit_code=exit_code)

    def ask(self, *arguments: str) -> Any:
        """Run a `flops` command with ``--format json``; returns its data."""
        return json.loads(self.flops(*arguments, "--format", "json").stdout)["data"]

    def node(self, name: str, *arguments: str, exit_code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a `NodeEngine` command of one node."""
        home = ("--home", str(self.home / name))
        return self.run(
            "NodeEngine", *home, *arguments, exit_code=exit_code, prefix=self.prefixes.get(name, ())
        )

    def up(self) -> None:
        """Start the control plane."""
        ports = [f"--{name}-port={port}" for name, port in self._ports.items()]
        self.flops("up", *ports)

    def start_node(self, name: str, *addons: str) -> None:
        """Prepare a node with addons and start it; beyond loopback it joins by a token."""
        for addon in addons:
            self.node(name, "config", "addon", addon, "on")
        joining = ["-a", self._address, "-p", str(self.cluster_port)]
        if not self._is_local and name not in self.nodes:
            joining = ["--token", self.flops("node", "invite").stdout.strip()]
        self.node(name, *joining, "-d")
        if name not in self.nodes:
            self.nodes.append(name)

    def wait_for_nodes(self, count: int) -> None:
        """Wait until so many nodes are connected with all their addons healthy."""
        self.wait_for(lambda: self._ready_nodes() == count, f"{count} ready nodes")

    def _ready_nodes(self) -> int:
        nodes = self.ask("node", "list")
        return sum(n["is_connected"] and all(a["state"] == "healthy" for a in n["addons"]) for n in nodes)

    def rows(self, tag: str) -> int:
        """Rows that the cluster knows of under a tag, over all nodes."""
        nodes = self.ask("node", "list")
        return sum(t["rows"] for n in nodes for t in n["data_tags"] if t["name"] == tag)

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Poll until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"gave up waiting for {what}"
            time.sleep(POLL_S)

    def down(self) -> None:
        """Stop every node and the control plane; never fails, so that a failed test leaves nothing."""
        for name in self.nodes:
            self.node(name, "stop", exit_code=None)
        self.flops("down", exit_code=None)


@contextmanager
def deployed(
    home: Path, *, address: str = "127.0.0.1", container_socket: Path | None = None
) -> Iterator[Deployment]:
    """A deployment that is stopped at the end, whatever happens."""
    deployment = Deployment(home, address=address, container_socket=container_socket)
    try:
        yield deployment
    finally:
        deployment.down()


def free_ports(count: int) -> list[int]:
    """Ports that are free right now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def make_repository(source: Path, target: Path) -> Path:
    """Make a Git repository with one commit from a folder; returns its path."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    commit_all(target, "Train")
    return target


def commit_all(repository: Path, message: str) -> None:
    """Commit everything in a folder, making it a repository if it is none."""
    identity = ["-c", "user.name=An ML engineer", "-c", "user.email=engineer@example.org"]
    for arguments in (
        ["init", "--quiet", "--initial-branch", "main"],
        ["add", "--all"],
        [*identity, "commit", "--quiet", "--message", message],
    ):
        subprocess.run(["git", "-C", str(repository), *arguments], check=True)
