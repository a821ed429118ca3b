"""The node's own interpreter in a container, whatever the image: it holds a service to its ports.

What an image brings may be made by users, its interpreter and system libraries included, and would decide for
itself which rules it takes. So the node's are mounted into a folder of their own, and the node's loader is
told to use nothing else.
"""

from __future__ import annotations

import functools
import re
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flops import network_rules

_FOLDER = "/.flops"
_RULES = f"{_FOLDER}/network_rules.py"
_LIBRARIES = re.compile(r"/(ld-|lib(c|m|z|ffi|expat|dl|pthread|util|python)[-.\d])[^/]*\.so[^/]*$")


@dataclass(frozen=True)
class _NodePython:
    """Its command in a container, and what is mounted for it: path on the node → path in the container."""

    command: tuple[str, ...]
    mounts: dict[str, str]


def rules_command(dials: Iterable[int], listens: Iterable[int]) -> list[str]:
    """What to put in front of a service's command, to hold it to ports."""
    return network_rules.command(_node_python().command, _RULES, dials, listens)


def rules_binds() -> list[str]:
    """The bind mounts that the command needs."""
    return [f"{path}:{inside}:ro,rprivate" for path, inside in _node_python().mounts.items()]


@functools.cache
def _node_python() -> _NodePython:
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    program = f"{_FOLDER}/python/bin/{name}"
    mounts = {
        str((Path(sys.base_prefix) / "bin" / name).resolve()): program,
        sysconfig.get_path("stdlib"): f"{_FOLDER}/python/{sys.platlibdir}/{name}",
        network_rules.__file__: _RULES,
    }
    # This process has loaded what that one needs, and the loader itself is among it.
    loaded = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    libraries = [Path(path) for path in sorted(loaded) if _LIBRARIES.search(path)]
    folders: dict[Path, str] = {}
    for library in libraries:
        folders.setdefault(library.parent, f"{_FOLDER}/libraries/{len(folders)}")
    loader = next(library for library in libraries if library.name.startswith("ld-"))
    start = (f"{folders[loader.parent]}/{loader.name}", "--library-path", ":".join(folders.values()), program)
    return _NodePython(start, mounts | {str(folder): inside for folder, inside in folders.items()})
