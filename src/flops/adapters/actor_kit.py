"""The actor kit: our few modules that run in environments of projects, copied into a folder of their own.

Putting `flops` itself on such a process's path would offer it modules whose dependencies it does not have.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from flops.durable_file import file_error, sync_folder

KIT_MODULES = (
    "flops",
    "flops.errors",
    "flops.disclosure",
    "flops.actor",
    "flops.wire",
    "flops.wire.training",
    "flops.wire.flight",
    "flops.wire.keepalive",
    "flops.wire.server_trust",
    "flops.wire.row_batches",
    "flops.wire.tag_schema",
    "flops.trainer",
    "flops.trainer.dialling",
    "flops.trainer.half_precision",
    "flops.trainer.learner",
    "flops.trainer.loading",
    "flops.trainer.ml_repo",
    "flops.trainer.model_host",
    "flops.trainer.export",
    "flops.serving",
    "flops.serving.app",
)
KIT_PACKAGE = "flops_utils"


def install_kit(root: Path) -> Path:
    """Copy the kit into ``<root>/<digest of its content>`` unless it is there.

    Returns:
        The folder to put on PYTHONPATH.

    Raises:
        FlopsError: ``disk_full``, ``file_unreadable``.
    """
    files = kit_files()
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    folder = root / digest.hexdigest()[:16]
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=root, prefix=".incoming-", ignore_cleanup_errors=True
        ) as scratch:
            _write(Path(scratch) / "kit", files)
            _publish(Path(scratch) / "kit", folder)
        sync_folder(root)
    except OSError as exc:
        raise file_error(exc, folder) from exc
    return folder


def kit_files() -> dict[str, bytes]:
    """Path in the kit → content."""
    files: dict[str, bytes] = {}
    for name in KIT_MODULES:
        source = _source_of(name)
        relative = name.replace(".", "/")
        files[f"{relative}/__init__.py" if source.name == "__init__.py" else f"{relative}.py"] = (
            source.read_bytes()
        )
    package = _source_of(KIT_PACKAGE).parent
    for path in sorted(package.rglob("*.py")):
        files[f"{KIT_PACKAGE}/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    return files


def _source_of(name: str) -> Path:
    """Where a module's source lies; it is not imported, nor is more than its parents."""
    parent, _, leaf = name.rpartition(".")
    if parent:
        folder = _source_of(parent).parent
        package = folder / leaf / "__init__.py"
        return package if package.is_file() else folder / f"{leaf}.py"
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(spec.origin)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(path)


def _publish(written: Path, folder: Path) -> None:
    try:
        written.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same content
            raise
        shutil.rmtree(written, ignore_errors=True)
