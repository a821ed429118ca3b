"""What linters cannot say about the layout: names, sizes, empty package files, a suite for every port."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
MODULES = sorted(SOURCE.rglob("*.py"))
NAMELESS = {"utils", "helpers", "common", "misc", "base", "main", "classes", "types"}
LONGEST_MODULE = 500
LONGEST_FUNCTION = 80


def test_there_is_code_to_check() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_module_has_a_name_and_a_bounded_size(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert path.stem not in NAMELESS, "name modules after the concept they hold"
    assert len(lines) <= LONGEST_MODULE
    if path.name == "__init__.py" and path.parent.name not in {"flops", "flops_utils"}:
        assert not lines, "package files stay empty: import from the module itself"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_functions_are_short(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, node.name
