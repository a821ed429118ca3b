"""Shared fixtures: nothing outlives a test."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest


@pytest.fixture(autouse=True)
def _no_leaked_processes() -> Iterator[None]:
    """Fail a test that leaves a child process behind, and end the child."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    leaked = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, leaked = psutil.wait_procs(leaked, timeout=3)
    names = []
    for child in leaked:
        try:
            names.append(" ".join(child.cmdline())[:200])
            child.kill()
        except psutil.NoSuchProcess:
            continue
    assert not names, f"processes left behind: {names}"
