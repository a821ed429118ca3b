"""What of a folder goes into images, and what decides about each file of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = frozenset({"__pycache__", ".git"})


def files_in(folder: Path) -> Iterator[Path]:
    """Files and symbolic links of a folder; an empty folder is nothing."""
    for here, names, files in os.walk(folder):
        links = [name for name in names if (Path(here) / name).is_symlink()]
        names[:] = sorted(name for name in names if name not in _LEFT_OUT and name not in links)
        yield from (Path(here) / name for name in sorted([*files, *links]))


def fingerprint(path: Path) -> str:
    """What decides about a file in a layer: content, or where it leads, and whether it can be run."""
    if path.is_symlink():
        return f"-> {path.readlink()}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{digest} {bool(path.stat().st_mode & 0o111)}"
