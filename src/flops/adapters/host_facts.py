"""Facts about this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil

from flops.core.address import is_any
from flops.core.cluster import NodeFacts, NodeLoad

_MB = 1024**2
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class LocalHost:
    """Implements `flops.ports.Host`.

    Args:
        state_dir: folder whose disk matters.
        cluster_address: services are reached at the address from which this machine reaches the cluster.
        version: of FLOps.
        is_public: prefer an address that the Internet knows, if this machine has one.
        gpus: models of the GPUs that services may use.
    """

    def __init__(
        self,
        state_dir: Path,
        cluster_address: str,
        version: str,
        *,
        is_public: bool,
        gpus: Sequence[str] = (),
    ) -> None:
        self._state_dir = state_dir
        self._cluster_address = cluster_address
        self._version = version
        self._is_public = is_public
        self._gpus = tuple(gpus)
        psutil.cpu_percent()  # the next call tells the load since this one

    def facts(self) -> NodeFacts:
        """What the machine is; `limits` are left to the runtime."""
        return NodeFacts(
            hostname=socket.gethostname(),
            address=self.address(),
            architecture=platform.machine(),
            operating_system=_operating_system(),
            python_version=platform.python_version(),
            flops_version=self._version,
            cpu_cores=len(os.sched_getaffinity(0)),
            memory_mb=memory_bytes() // _MB,
            disk_free_mb=self._disk_mb()[0],
            gpus=self._gpus,
        )

    def load(self) -> NodeLoad:
        """What it is doing right now; quick."""
        free_mb, total_mb = self._disk_mb()
        return NodeLoad(
            cpu_percent=psutil.cpu_percent(),
            memory_percent=psutil.virtual_memory().percent,
            disk_free_mb=free_mb,
            disk_total_mb=total_mb,
        )

    def address(self) -> str:
        """Where others reach services of this machine."""
        public = _public_address() if self._is_public else None
        return public or address_towards(self._cluster_address)

    def _disk_mb(self) -> tuple[int, int]:
        """Free and total."""
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(self._state_dir)
            return usage.free // _MB, usage.total // _MB
        return 0, 0


def address_towards(host: str) -> str:
    """The address of ours that packets to `host` come from; nothing is sent."""
    with contextlib.suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def _public_address() -> str | None:
    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            with contextlib.suppress(ValueError):
                if ipaddress.ip_address(entry.address.partition("%")[0]).is_global:
                    return entry.address
    return None


def _operating_system() -> str:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    return platform.system()


def memory_bytes() -> int:
    """Memory of the machine, or of the container this process runs in."""
    total = psutil.virtual_memory().total
    for file in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(file.read_text()))
    return total


def names_of(host: str) -> tuple[str, ...]:
    """Names and addresses by which others may know what listens on an address of this machine."""
    names = {"localhost", "127.0.0.1", "::1", host, socket.gethostname(), socket.getfqdn()}
    if is_any(host):
        for addresses in psutil.net_if_addrs().values():
            names |= {
                entry.address.partition("%")[0]
                for entry in addresses
                if entry.family in (socket.AF_INET, socket.AF_INET6)
            }
    return tuple(sorted(name for name in names if name.isascii() and not is_any(name)))
