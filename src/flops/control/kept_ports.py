"""The ports that a control plane listened on last: taken again where it is asked for any free one (0).

Nodes, clients and running aggregators know it by them, also after a kill.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flops.durable_file import write_durably

_FILE = "ports.json"


class KeptPorts:
    """The last ports by what listens there.

    Args:
        folder: the control plane's own folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._ports: dict[str, int] = {}
        try:
            raw = json.loads(self._path.read_text())
            self._ports = {str(name): int(port) for name, port in raw.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # the first start, or a file that others damaged: free ports are taken

    def wanted(self, name: str, configured: int) -> int:
        """The port to listen on: the configured one; for 0 the last one, or 0 again at the first start."""
        return configured or self._ports.get(name, 0)

    def keep(self, ports: Mapping[str, int]) -> None:
        """Keep the ports listened on, durably.

        Raises:
            FlopsError: ``disk_full``.
        """
        if dict(ports) != self._ports:
            write_durably(self._path, json.dumps(ports))
            self._ports = dict(ports)
