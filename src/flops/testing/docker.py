"""A Docker for tests, with all its state in one folder, without networks and rules of its own.

Needs root and Debian's package ``docker.io``: `missing_for_docker` says what is missing. Nothing installs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from flops.adapters.containers.engine import ContainerEngine
from flops.errors import FlopsError
from flops.testing.waiting import until

_PROGRAMS = ("dockerd", "containerd", "runc", "docker-init")
_PATH = f"{os.defpath}:/usr/sbin:/sbin:/usr/libexec/docker"
_OPTIONS = ("--iptables=false", "--ip-masq=false", "--bridge=none")


def missing_for_docker() -> str:
    """Why no Docker can be started here; "" when one can."""
    if os.geteuid() != 0:
        return "needs root, to start a container engine"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    return f"needs {', '.join(missing)} (Debian: docker.io)" if missing else ""


@contextmanager
def running_docker() -> Iterator[ContainerEngine]:
    """An engine that is gone afterwards, with all its containers and images."""
    folder = Path(tempfile.mkdtemp(prefix="flops-docker-"))
    socket = folder / "docker.sock"
    folders = {"--data-root": "data", "--exec-root": "exec", "--pidfile": "pid"}
    options = [text for name, path in folders.items() for text in (name, str(folder / path))]
    with (folder / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(
            ["dockerd", *_OPTIONS, *options, "--host", f"unix://{socket}"],
            env={"PATH": _PATH, "HOME": str(folder)}, cwd=folder,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        engine = ContainerEngine(socket)
        until(lambda: daemon.poll() is not None or _answers(engine), "the socket of Docker", timeout_s=60)
        yield engine
    finally:
        children = psutil.Process(daemon.pid).children(recursive=True) if daemon.poll() is None else []
        daemon.terminate()
        daemon.wait(timeout=30)
        psutil.wait_procs(children, timeout=10)
        lines = Path("/proc/self/mounts").read_text().splitlines()
        mounts = [path for line in lines if (path := line.split()[1]).startswith(f"{folder}/")]
        for mount in reversed(mounts):
            subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(folder)


def _answers(engine: ContainerEngine) -> bool:
    try:
        engine.facts()
    except FlopsError:
        return False
    return True
