"""What this machine has for building: programs, packages, a container engine, emulation."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import uv

from flops.adapters.images.buildah import Buildah
from flops.adapters.images.debian_base import DebianBase
from flops.adapters.uv_program import OWN_MINOR
from flops.core.build_tools import BuildTools
from flops.core.platforms import Platform
from flops.errors import FlopsError

_BINFMT = Path("/proc/sys/fs/binfmt_misc")


def find_build_tools(engine_socket: Path) -> BuildTools:
    """Look what is there; starts no program.

    Args:
        engine_socket: where the container engine of this machine listens, if there is one.
    """
    missing = [] if shutil.which("git") else ["git"]
    try:
        uv.find_uv_bin()
    except FileNotFoundError:
        missing.append("uv")
    return BuildTools(
        platform=own_platform(),
        missing=tuple(missing),
        missing_for_base=DebianBase.missing(),
        python=OWN_MINOR,
        base_python=DebianBase.python(),
        missing_for_dockerfiles=Buildah.missing(),
        has_engine=engine_socket.is_socket(),
        emulated=tuple(found for found in Platform if is_emulated(found)),
    )


def runs_here(platform: Platform) -> bool:
    """Whether this machine runs programs of a platform, by itself or by emulation."""
    return platform is own_platform() or is_emulated(platform)


def is_emulated(found: Platform) -> bool:
    """Whether the kernel hands programs of a platform to QEMU; not for this machine's own."""
    try:
        return (_BINFMT / f"qemu-{found.machine}").read_text().startswith("enabled")
    except OSError:
        return False


def own_platform() -> Platform | None:
    """The platform of this machine; None for one that no images are made for."""
    try:
        return Platform.of(platform.machine())
    except FlopsError:
        return None
