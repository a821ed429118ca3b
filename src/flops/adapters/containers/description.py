"""What a container of a service is, as the Docker Engine API takes it: its rights, limits and mounts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flops.adapters.confinement import OPEN_FILES
from flops.adapters.containers.engine import EngineFacts
from flops.adapters.containers.mounts import binds_of, empty_root, temporary_files
from flops.adapters.containers.node_python import rules_binds, rules_command
from flops.adapters.gpus import device_files
from flops.core.cluster import Resources
from flops.core.reach import Reach
from flops.errors import ErrorCode, FlopsError

IMAGE_USER = 65_532  # as in our images: nobody's user, on the node too
_PODMANS_GPUS = (5, 4)  # the first version to heed requests for devices; before, they are ignored
_PROCESSES = 32_768  # of the user; each service has a limit of its own below that
_SHARED_MEMORY_BYTES = 1024**3  # it counts as memory of the service


def describe(
    facts: EngineFacts,
    argv: Sequence[str],
    env: Mapping[str, str],
    work_dir: Path,
    resources: Resources,
    reach: Reach | None,
) -> dict[str, Any]:
    """The body of ``POST /containers/create``.

    No user is root, no right is kept, and nothing can be written but the work folder, what the reach names,
    and file systems in memory. Its own program is started by one of the node's, which holds it to its ports.

    Raises:
        FlopsError: ``service_failed`` when the engine cannot give it the GPUs that it is to have.
    """
    image = reach.image if reach is not None and reach.image else empty_root()[0]
    binds = binds_of(argv, env, work_dir, reach)
    if reach is not None and reach.dials is not None and facts.can_restrict_network:
        argv = [*rules_command(reach.dials, reach.listens), *argv]
        binds += rules_binds()
    gpus = _gpus(facts, reach) if reach is not None and reach.gpus else {}
    # Without it, an image's own word may give it all GPUs where NVIDIA's runtime is the engine's usual one.
    variables = dict(env) if "DeviceRequests" in gpus else {**env, "NVIDIA_VISIBLE_DEVICES": "void"}
    return {
        "Image": image,
        "Entrypoint": [argv[0]],
        "Cmd": list(argv[1:]),
        "Env": [f"{name}={value}" for name, value in variables.items()],
        "WorkingDir": str(work_dir),
        "User": _user(facts),
        "HostConfig": {
            "Binds": binds,
            "NetworkMode": "host",
            "UsernsMode": "keep-id" if facts.is_rootless and facts.name == "podman" else "",
            "IpcMode": "private",
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": True,
            "Tmpfs": temporary_files(),
            "ShmSize": _SHARED_MEMORY_BYTES,
            "Init": True,  # passes signals on, and reaps; it is no part of the service
            "RestartPolicy": {"Name": "no"},  # the node restarts services, and counts
            **_limits(facts, resources),
            **gpus,
        },
    }


def _user(facts: EngineFacts) -> str:
    """Whoever owns the work folder: the node's own user, or for root nobody's."""
    if os.geteuid() == 0 and not facts.is_rootless:
        return f"{IMAGE_USER}:{IMAGE_USER}"
    if facts.is_rootless and facts.name == "docker":
        return "0:0"  # which is the node's user there
    return f"{os.geteuid()}:{os.getegid()}"


def _limits(facts: EngineFacts, resources: Resources) -> dict[str, Any]:
    limits: dict[str, Any] = {
        "Ulimits": [
            _ulimit("core", 0),
            _ulimit("nofile", OPEN_FILES),
            _ulimit("nproc", _PROCESSES),
        ]
    }
    if resources.memory_mb is not None and "memory" in facts.limits:
        limits["Memory"] = limits["MemorySwap"] = resources.memory_mb * 1024**2
    if resources.vcpus is not None and "cpu" in facts.limits:
        limits["NanoCpus"] = round(resources.vcpus * 1e9)
    if resources.pids is not None and "pids" in facts.limits:
        limits["PidsLimit"] = resources.pids + 1  # the engine's init
    return limits


def _gpus(facts: EngineFacts, reach: Reach) -> dict[str, Any]:
    """NVIDIA's GPUs: an image needs the engine's own support, which brings the driver's libraries, too."""
    numbers = [str(number) for number in reach.gpus]
    if not reach.image:
        return {
            "Devices": [
                {"PathOnHost": path, "PathInContainer": path, "CgroupPermissions": "rw"}
                for path in device_files(reach.gpus)
                if Path(path).exists()
            ]
        }
    if facts.name == "docker":
        return {"DeviceRequests": [{"Driver": "", "DeviceIDs": numbers, "Capabilities": [["gpu"]]}]}
    if not facts.is_at_least(*_PODMANS_GPUS):
        raise FlopsError(
            ErrorCode.SERVICE_FAILED,
            f"{reach.image} needs GPUs, which Podman gives to images since version "
            f"{'.'.join(map(str, _PODMANS_GPUS))}, and this is {facts.version}.",
            hint="Use a newer Podman, Docker, or `packaging: environment`.",
        )
    devices = [f"nvidia.com/gpu={number}" for number in numbers]
    return {"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": devices}]}


def _ulimit(name: str, value: int) -> dict[str, Any]:
    return {"Name": name, "Soft": value, "Hard": value}
