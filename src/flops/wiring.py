"""The one place that knows both processes and adapters, and joins them. The only module that reads settings.

Every process of ours is started as ``python -m flops.wiring <process> ARGUMENTS``. Imports stand inside the
functions, so that `flops --help` and `NodeEngine config addon` load nothing they do not need.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence


def main(argv: Sequence[str]) -> int:
    """Start the process named first, with the remaining arguments; returns its exit code."""
    name, *arguments = argv
    return PROCESSES[name](arguments)


PROCESSES: Mapping[str, Callable[[list[str]], int]] = {}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
