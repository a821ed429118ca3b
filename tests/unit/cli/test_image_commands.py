"""`flops image` against a manager, with a registry of its own files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.core.images import MANIFEST
from flops.registry.repositories import Repositories
from flops.testing.images import make_image
from flops.testing.projects import sla_with

from .conftest import Flops, Manager

GONE = "flops/0123456789ab/learner"


@pytest.fixture
def registry(manager: Manager, tmp_path: Path) -> Repositories:
    blobs = FileBlobs(tmp_path / "images")
    registry = Repositories(tmp_path / "names", blobs)
    image = make_image(blobs, "layer", size=2_000_000)
    running = manager.cluster.engine.submit(sla_with()).id
    for name in (GONE, f"flops/{running}/learner"):
        registry.put(name, blobs.get(image.digest), MANIFEST, "v1")
    other = make_image(blobs, "other", size=3_000_000)
    registry.put(GONE, blobs.get(other.digest), MANIFEST, "v2")
    for path in (tmp_path / "images").rglob("*"):
        os.utime(path, (1_000, 1_000))
    manager.stop()
    manager.images = registry
    manager.start()
    return registry


def test_what_is_listed_is_what_is_pruned(flops: Flops, registry: Repositories) -> None:
    listed = flops("image", "list")
    assert listed.exit_code == 0
    (row,) = [line for line in listed.out.splitlines() if GONE in line]
    assert row.startswith(f"{GONE}:v2  0123456789ab")
    assert "5.0 MB" in row
    assert "3.0 MB" in row
    assert "its project is" in listed.out
    assert "5.0 MB in all" in listed.err
    planned = flops("image", "prune", "--dry-run")
    assert "1 image would be removed, and 3.0 MB given back" in planned.err
    assert GONE in registry.names()
    done = flops("image", "prune", "--format", "json").data
    assert [image["name"] for image in done["images"]] == [GONE]
    assert (done["is_dry_run"], done["size_bytes"] > 3_000_000) == (False, True)
    assert done["freed_bytes"] > 3_000_000
    assert GONE not in registry.names()
    assert "Every image is in use." in flops("image", "prune").err
