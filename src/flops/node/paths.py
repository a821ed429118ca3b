"""Where a node keeps what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NodePaths:
    """The files of one node.

    Args:
        home: folder of the node's state.
        conf: its configuration file.
        log: what the daemon writes.
        is_system: whether it is the machine's own node, which systemd may run.
    """

    home: Path
    conf: Path
    log: Path
    is_system: bool = False

    @property
    def pid(self) -> Path:
        """Held locked by the daemon while it runs; holds its process id."""
        return self.home / "nodeengine.pid"

    @property
    def status(self) -> Path:
        """The daemon's last report about itself."""
        return self.home / "status.json"

    @property
    def startup_error(self) -> Path:
        """Why the daemon ended before it ran."""
        return self.home / "startup_error.json"

    @property
    def node_id(self) -> Path:
        """The node's id, made at its first start."""
        return self.home / "node_id"

    @property
    def identity(self) -> Path:
        """The node's key, and its certificate of a cluster that encrypts; readable by its owner only."""
        return self.home / "identity.pem"

    @property
    def services(self) -> Path:
        """One folder per service that the cluster placed here."""
        return self.home / "services"

    @property
    def bundles(self) -> Path:
        """Unpacked bundles by digest."""
        return self.home / "bundles"

    @property
    def environments(self) -> Path:
        """Virtual environments by the digest of their lock."""
        return self.home / "environments"

    @property
    def images(self) -> Path:
        """What a builder keeps of the images it makes."""
        return self.home / "images"

    @property
    def kit(self) -> Path:
        """The modules that run in projects' environments."""
        return self.home / "kit"

    @property
    def data_server(self) -> Path:
        """State of the ML data server."""
        return self.home / "dataserver"

    @property
    def runtime(self) -> Path:
        """What the runtime knows of the services' processes."""
        return self.home / "runtime"

    @property
    def container_runtime(self) -> Path:
        """Likewise for those that run in containers."""
        return self.home / "containers"

    @property
    def addon_runtime(self) -> Path:
        """Likewise for the processes of addons."""
        return self.home / "addons"

    @property
    def addon_container_runtime(self) -> Path:
        """Likewise for addons in containers."""
        return self.home / "addon-containers"

    @property
    def output(self) -> Path:
        """Output of the services' processes, unless configured otherwise."""
        return self.home / "logs"
