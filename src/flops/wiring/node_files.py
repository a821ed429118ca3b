"""Where a node keeps its files, for its daemon and its commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flops.adapters.conf_file import ConfFile
    from flops.core.build_tools import BuildTools
    from flops.core.health import Finding
    from flops.node.paths import NodePaths


def node_paths(home: Path | None = None) -> NodePaths:
    """Where a node's files are: below `home`, else as the settings and the user's rights say."""
    import os

    from flops.node.paths import NodePaths
    from flops.settings import NodeSettings

    settings = NodeSettings.read(node_home=home)
    folder = settings.node_home
    if folder is None and "home" not in settings.model_fields_set and os.geteuid() == 0:
        log = Path("/var/log/oakestra/nodeengine.log")
        return NodePaths(Path("/var/lib/flops"), Path("/etc/oakestra/conf.json"), log, is_system=True)
    folder = (folder or settings.home / "node").expanduser().absolute()
    return NodePaths(folder, folder / "conf.json", folder / "nodeengine.log")


def node_conf_file(paths: NodePaths) -> ConfFile:
    """The file with what a node's operator configured."""
    from flops.adapters.conf_file import ConfFile
    from flops.node.configuration import check_configuration, default_configuration

    return ConfFile(paths.conf, lambda: dict(default_configuration().raw), check_configuration)


def container_socket() -> Path:
    """The socket of the container engine that this machine's nodes use."""
    from flops.adapters.containers.detection import engine_socket
    from flops.settings import NodeSettings, inherited_environment

    return engine_socket(NodeSettings.read().container_socket, inherited_environment())


def node_engine_findings(*, is_preferred: bool) -> list[Finding]:
    """What the container engine of this machine is, and what is missing.

    Args:
        is_preferred: whether services are to run in containers.
    """
    from flops.adapters.containers.detection import engine_findings

    return list(engine_findings(container_socket(), is_preferred=is_preferred))


def node_build_tools() -> BuildTools:
    """What this machine has for building."""
    from flops.adapters.images.build_tools import find_build_tools

    return find_build_tools(container_socket())


def end_node_leftovers(paths: NodePaths) -> int:
    """End what a killed daemon left running; returns how many services and addons that were."""
    folders = (
        paths.runtime, paths.container_runtime, paths.addon_runtime, paths.addon_container_runtime,
    )  # fmt: skip
    if not any(folder.is_dir() for folder in folders):
        return 0
    from flops.wiring.node import end_leftovers

    return end_leftovers(paths)
