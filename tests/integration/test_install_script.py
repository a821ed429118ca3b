"""Setting up says what is missing on a machine, before it changes anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flops.errors import CATALOGUE, ErrorCode

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "install"


def run_with(python: Path, venv: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), str(python), str(venv)], capture_output=True, text=True, timeout=30, check=False
    )


def fake_python(folder: Path, *, is_recent: bool) -> Path:
    """An interpreter that is too old, or one that has no venv module."""
    path = folder / "python"
    answer = 0 if is_recent else 1
    cases = f"*version_info*) exit {answer};; --version) echo Python 3.9.2;; *) exit 1;;"
    path.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("is_recent", "expected"), [(False, "needs Python 3.11 or newer"), (True, "python3-venv")]
)
def test_an_unusable_python_is_named(tmp_path: Path, is_recent: bool, expected: str) -> None:
    result = run_with(fake_python(tmp_path, is_recent=is_recent), tmp_path / "venv")
    assert result.returncode == CATALOGUE[ErrorCode.PYTHON_UNSUPPORTED].exit_code
    assert expected in result.stderr
    assert "Hint:" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    result = run_with(tmp_path / "nowhere", tmp_path / "venv")
    assert result.returncode == CATALOGUE[ErrorCode.PYTHON_UNSUPPORTED].exit_code
    assert "nowhere" in result.stderr
