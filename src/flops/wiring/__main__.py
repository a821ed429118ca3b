"""Starts every process that is joined here: ``python -m flops.wiring <process> ARGUMENTS``.

This package is the one place that knows both processes and adapters, and joins them; it alone reads settings.
Each process's module is imported when it is started, and no earlier.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

PROCESSES: Mapping[str, tuple[str, str]] = {
    "aggregator": ("flops.wiring.services", "run_aggregator"),
    "builder": ("flops.wiring.services", "run_builder"),
    "control-plane": ("flops.wiring.control_plane", "run_control_plane"),
    "data-server": ("flops.wiring.data", "run_data_server"),
    "mock-data-provider": ("flops.wiring.services", "run_mock_data_provider"),
    "relay": ("flops.wiring.relay", "run_relay"),
    "node": ("flops.wiring.node", "run_node_daemon"),
}


def main(argv: Sequence[str]) -> int:
    """Start the process named first, with the remaining arguments; returns its exit code."""
    name, *arguments = argv
    module, function = PROCESSES[name]
    return int(getattr(import_module(module), function)(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
