"""A network of machines inside this one: network namespaces on cables that can be cut, each way on its own.

Every machine is a namespace with one interface; all cables meet in a router, a namespace of its own. This
machine is plugged in as well. What is cut is dropped in the router without a word, as by a broken cable: no
program at its ends is told. A machine may have disks of its own: folders that are others' there than here.
Needs root, and of programs only ``ip``, ``nsenter`` and ``unshare``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NET = "198.18"  # set aside for tests of networks (RFC 2544): no route of a real machine leads there
_PREFIX = "flops"
_NAMESPACES = Path("/run/netns")
_FORWARD = "/proc/sys/net/ipv4/ip_forward"
_MOUNT = """
set -e
mount -t tmpfs none /dev/shm
while [ $# -gt 0 ]; do mount --bind "$2" "$1"; shift 2; done
echo ready
exec cat
"""


def missing_for_networks() -> str:
    """Why no network can be made here; "" when one can."""
    missing = [program for program in ("ip", "nsenter", "unshare") if shutil.which(program) is None]
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    return f"needs {' and '.join(missing)}" if missing else ""


@dataclass(frozen=True)
class Machine:
    """A machine of the network.

    Args:
        address: its address, which all others reach it at.
        prefix: what to put before a command to run it there; nothing for this machine.
    """

    address: str
    prefix: tuple[str, ...] = ()


class Network:
    """A router with this machine plugged in; `close` removes it, with all that was plugged in.

    Raises:
        OSError: this machine allows none; see `missing_for_networks`.
    """

    def __init__(self) -> None:
        _sweep()
        self._name = f"{_PREFIX}{os.getpid()}"
        self._net = f"{NET}.{os.getpid() % 256}"
        self._ports = 0
        self._holders: list[subprocess.Popen[str]] = []
        _ip("netns", "add", self._name)
        try:
            _run("nsenter", f"--net={_NAMESPACES / self._name}", "sh", "-c", f"echo 1 > {_FORWARD}")
            self.here = Machine(self._plug(""))
            _ip("route", "add", f"{self._net}.0/24", "via", f"{self._net}.1")
        except OSError:
            self.close()
            raise

    def add_machine(self, disks: Mapping[Path, Path] | None = None) -> Machine:
        """Plug another machine in.

        Args:
            disks: by the path of a folder, the folder that is there instead on that machine. It has a
                shared memory of its own then, too.
        """
        namespace = f"{self._name}-{self._ports}"
        _ip("netns", "add", namespace)
        address = self._plug(namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "route", "add", "default", "via", _next_to(address, -1))
        enter = ["nsenter", f"--net={_NAMESPACES / namespace}"]
        if disks:
            enter.append(f"--mount=/proc/{self._mount(disks)}/ns/mnt")
        return Machine(address, tuple(enter))

    def _mount(self, disks: Mapping[Path, Path]) -> int:
        """A process that holds a namespace with these mounts as long as we live; returns its id."""
        pairs = [str(path) for pair in disks.items() for path in pair]
        holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "sh", "-c", _MOUNT, "sh", *pairs],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._holders.append(holder)
        if holder.stdout is None or not holder.stdout.readline():
            raise OSError(f"No disks can be mounted: {', '.join(pairs)}")
        return holder.pid

    def _plug(self, namespace: str) -> str:
        """Lay a cable from the router to a namespace, or to this machine; returns the address at its end."""
        first = 4 * self._ports  # every cable is a net of its own: .1 is the router's end, .2 the other one
        ours, theirs = f"{self._name}p{self._ports}", "eth0" if namespace else f"{self._name}p"
        self._ports += 1
        _ip("-n", self._name, "link", "add", ours, "type", "veth", "peer", "name", theirs,
            "netns", namespace or str(os.getpid()))  # fmt: skip
        where = ["-n", namespace] if namespace else []
        for place, name, host in ((["-n", self._name], ours, first + 1), (where, theirs, first + 2)):
            _ip(*place, "addr", "add", f"{self._net}.{host}/30", "dev", name)
            _ip(*place, "link", "set", name, "up")
        return f"{self._net}.{first + 2}"

    @contextmanager
    def cut(self, *ways: tuple[Machine, Machine]) -> Iterator[None]:
        """Drop what is sent these ways, from the first to the second, until the end of the block."""
        rules = [("from", source.address, "to", target.address, "blackhole") for source, target in ways]
        for rule in rules:
            _ip("-n", self._name, "rule", "add", *rule)
        try:
            yield
        finally:
            for rule in rules:
                _ip("-n", self._name, "rule", "del", *rule)

    def close(self) -> None:
        """Remove everything; cables vanish with the router."""
        for holder in self._holders:
            holder.communicate()  # it ends with its input
        _remove(self._name)


@contextmanager
def network() -> Iterator[Network]:
    """A network that is removed at the end, whatever happens."""
    made = Network()
    try:
        yield made
    finally:
        made.close()


def _sweep() -> None:
    """Remove the networks of tests that were killed."""
    for path in _NAMESPACES.glob(f"{_PREFIX}[0-9]*"):
        number = path.name.removeprefix(_PREFIX).partition("-")[0]
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            _remove(f"{_PREFIX}{number}")


def _remove(name: str) -> None:
    subprocess.run(["ip", "link", "del", f"{name}p"], capture_output=True, check=False)  # at once
    for path in [_NAMESPACES / name, *_NAMESPACES.glob(f"{name}-*")]:
        if path.exists():
            _ip("netns", "del", path.name)


def _next_to(address: str, step: int) -> str:
    net, _, host = address.rpartition(".")
    return f"{net}.{int(host) + step}"


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
