"""A container engine for tests: Podman with all its state in one folder, which vanishes with it.

Needs root and some of Debian's packages: `missing_for_podman` says what is not there, and
``scripts/install-containers`` installs it.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from flops.testing.waiting import until

_PROGRAMS = ("podman", "runc", "conmon", "catatonit")
_CONFIGURATION = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc=32768:32768"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
"""
_REGISTRIES = """
unqualified-search-registries = []
[[registry]]
location = "127.0.0.1"
insecure = true
[[registry]]
location = "localhost"
insecure = true
"""


def missing_for_podman() -> str:
    """Why no engine can be started here; "" when one can."""
    if os.geteuid() != 0:
        return "needs root, to start a container engine"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=f"{os.defpath}:/usr/sbin") is None]
    return f"needs {', '.join(missing)} (scripts/install-containers installs it)" if missing else ""


class Podman:
    """An engine with its own containers, images and networks.

    Args:
        folder: of everything; its path has to be short, since that of a socket has to be.
        prefix: what runs its commands on another machine.
    """

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        self.folder = folder
        self._prefix = prefix
        self.socket = folder / "podman.sock"
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        (folder / "containers.conf").write_text(_CONFIGURATION.format(files=files))
        (folder / "registries.conf").write_text(_REGISTRIES)
        self._env = {
            "PATH": f"{os.defpath}:/usr/sbin:/sbin",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(folder / "registries.conf"),
        }
        self._service: psutil.Process | None = None

    def start(self) -> None:
        """Start the service, and wait until it listens."""
        self.socket.unlink(missing_ok=True)
        service = [*self._command(), "system", "service", "--time=0", f"unix://{self.socket}"]
        # No child of the tests' process: a test may start it again, and leave it to the next. In its folder,
        # since conmon leaves a file where it was started when it sees a kill for want of memory.
        starter = ["sh", "-c", 'cd "$1" && shift && { "$@" >>service.log 2>&1 & echo $!; }', "sh"]
        done = subprocess.run(
            [*self._prefix, *starter, str(self.folder), *service],
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
        self._service = psutil.Process(int(done.stdout))
        until(self._listens, "the socket of Podman")

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def kill(self) -> None:
        """Kill the service; the containers go on."""
        if self._service is not None:
            self._service.kill()
            self._service.wait(timeout=10)
            self._service = None

    def run(self, *arguments: str) -> str:
        """Run one of Podman's commands on this engine; returns what it prints."""
        done = subprocess.run(
            [*self._prefix, *self._command(), *arguments],
            env=self._env,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    def close(self) -> None:
        """Remove all containers, and whatever else there is."""
        self.kill()
        self.run("rm", "--all", "--force", "--time", "0")
        self.run("network", "prune", "--force")
        for mount in reversed(self.mounts()):
            subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(self.folder)

    def mounts(self) -> list[str]:
        """What is mounted in its folder."""
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return [path for line in lines if (path := line.split()[1]).startswith(f"{self.folder}/")]

    def _command(self) -> list[str]:
        folders = {
            "--root": "storage",
            "--runroot": "run",
            "--tmpdir": "tmp",
            "--network-config-dir": "networks",
        }
        options = [text for name, folder in folders.items() for text in (name, str(self.folder / folder))]
        return ["podman", *options]


@contextmanager
def running_podman(prefix: Sequence[str] = ()) -> Iterator[Podman]:
    """An engine that is gone afterwards, with all its containers and images; see `Podman`."""
    podman = Podman(Path(tempfile.mkdtemp(prefix="flops-podman-")), prefix)
    try:
        podman.start()
        yield podman
    finally:
        podman.close()
