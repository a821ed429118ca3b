"""Which container engine this machine has, and what is missing of what services need."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from flops.adapters.containers.engine import ContainerEngine, EngineRefusedError
from flops.core.health import Finding, fine, known, problem, warning
from flops.errors import FlopsError

CHECK = "containers"
_SYSTEM_SOCKETS = ("/run/docker.sock", "/var/run/docker.sock", "/run/podman/podman.sock")
_USERS_SOCKETS = ("docker.sock", "podman/podman.sock")
_PODMANS_INITS = (
    "/usr/libexec/podman/catatonit", "/usr/local/libexec/podman/catatonit", "/usr/lib/podman/catatonit",
    "/usr/bin/catatonit",
)  # fmt: skip
_HOW_TO_GET = (
    "Install podman (Debian: `apt-get install podman runc catatonit`, then `systemctl enable --now"
    " podman.socket`), or Docker. Another socket is named by FLOPS_CONTAINER_SOCKET."
)


def engine_socket(given: Path | None, environ: Mapping[str, str]) -> Path:
    """The socket of the engine to use: the one named, else the first there is; the user's own comes first.

    Args:
        given: what the operator names.
        environ: this process's environment variables: ``DOCKER_HOST``, ``XDG_RUNTIME_DIR``.

    An engine of another machine, by ``tcp://``, is not used: services need this machine's files.
    """
    if given is not None:
        return given
    scheme, _, path = environ.get("DOCKER_HOST", "").partition("://")
    if scheme == "unix" and path:
        return Path(path)
    found = [path for path in _candidates(environ) if path.is_socket() and os.access(path, os.W_OK)]
    return found[0] if found else Path(_SYSTEM_SOCKETS[-1])


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    folder = environ.get("XDG_RUNTIME_DIR", "")
    if folder and os.geteuid() != 0:
        yield from (Path(folder) / name for name in _USERS_SOCKETS)
    yield from map(Path, _SYSTEM_SOCKETS)


def engine_findings(socket: Path, *, is_preferred: bool) -> Iterator[Finding]:
    """Whether the engine can run services, and holds them to their limits.

    Args:
        socket: of the engine.
        is_preferred: whether the operator has switched containers on; else nothing is a problem.
    """
    where = str(socket)
    try:
        facts = ContainerEngine(socket).facts()
    except (FlopsError, EngineRefusedError) as exc:
        what = exc.message.rstrip(".")
        if is_preferred:
            yield problem(CHECK, where, f"No service can be started in a container: {what}.", _HOW_TO_GET)
        else:
            yield known(CHECK, where, "No container engine is used, and none is needed.")
        return
    rights = "without root" if facts.is_rootless else "as root"
    is_used = "" if is_preferred else " It is not used: `NodeEngine config virtualization container on`."
    groups = f", control groups of version {facts.cgroup_version}" if facts.cgroup_version else ""
    yield fine(CHECK, where, f"{facts.name} {facts.version} answers ({rights}{groups}).{is_used}")
    if is_preferred and facts.name == "podman" and not any(Path(path).exists() for path in _PODMANS_INITS):
        what = "Podman has no init for containers, and starts none that needs one: catatonit is missing."
        yield problem(CHECK, where, what, "Install catatonit.")
    missing = [name for name in ("memory", "cpu", "pids") if name not in facts.limits]
    if is_preferred and missing:
        what = f"{facts.name} does not limit what containers use here: {', '.join(missing)}."
        advice = "Without root, that needs control groups of version 2 that systemd delegates to the user."
        yield warning(CHECK, where, what, advice)
