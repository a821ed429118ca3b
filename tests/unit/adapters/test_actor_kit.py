"""The actor kit is copied whole, once, and changes its folder with its content."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from flops.adapters.actor_kit import install_kit, kit_files
from flops.errors import ErrorCode, FlopsError
from flops.testing.disk import small_disk


def test_the_kit_is_copied_once(tmp_path: Path) -> None:
    folder = install_kit(tmp_path / "kit")
    stamp = folder.stat().st_mtime_ns
    assert install_kit(tmp_path / "kit") == folder
    assert folder.stat().st_mtime_ns == stamp
    copied = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert copied == kit_files()
    assert "flops/trainer/learner.py" in copied
    assert "flops_utils/__init__.py" in copied
    assert not any("adapters" in name for name in copied)
    assert [path.name for path in (tmp_path / "kit").iterdir()] == [folder.name]


def test_many_at_once(tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(install_kit(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path, "32k"):
        with pytest.raises(FlopsError) as caught:
            install_kit(tmp_path)
        assert caught.value.code is ErrorCode.DISK_FULL
        assert list(tmp_path.iterdir()) == []
