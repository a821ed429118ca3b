"""The actor kit runs in environments that hold nothing of ours: numpy and pyarrow, or MLflow and a server."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from flops.adapters.actor_kit import KIT_MODULES, install_kit, kit_files
from flops.settings import inherited_environment

ALWAYS = {"numpy", "pyarrow", "flops", "flops_utils"}
MODEL_ONLY = {"mlflow", "pandas", "starlette", "uvicorn", "httptools", "uvloop", "orjson"}
NEED_MODEL = {"flops/trainer/export.py", "flops/serving/app.py"}
FILES = kit_files()

# Hides every installed package but those a learner may count on.
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
allowed = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Hidden())
for name in sys.argv[2].split(","):
    __import__(name)
"""


def top_imports(tree: ast.AST, *, is_whole: bool) -> set[str]:
    """Top-level packages a module imports, with those inside functions if `is_whole`."""
    nodes = ast.walk(tree) if is_whole else ast.iter_child_nodes(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_of_the_kit_imports_only_what_is_there(name: str) -> None:
    allowed = ALWAYS | MODEL_ONLY if name in NEED_MODEL else ALWAYS
    assert top_imports(ast.parse(FILES[name]), is_whole=False) <= allowed


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_of_the_kit_imports_of_ours_only_the_kit(name: str) -> None:
    kit = {file.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".") for file in FILES}
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flops"):
            imported = {f"{node.module}.{alias.name}" for alias in node.names}
            assert node.module in kit or imported <= kit, f"{name} imports {node.module}"
        elif isinstance(node, ast.Import):
            assert all(a.name in kit or not a.name.startswith("flops") for a in node.names), name


def test_the_kit_of_a_learner_imports_beside_numpy_and_pyarrow_alone(tmp_path: Path) -> None:
    kit = install_kit(tmp_path)
    modules = [name for name in KIT_MODULES if f"{name.replace('.', '/')}.py" not in NEED_MODEL]
    environment = {**inherited_environment(), "PYTHONPATH": str(kit), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HIDE, ",".join(ALWAYS), ",".join([*modules, "flops_utils"])],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
