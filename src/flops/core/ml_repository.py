"""What a repository with training code must hold, and what of it decides its environment."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from flops.core.ids import EnvironmentKey
from flops.core.requirements import (
    Dependencies,
    find_dependency_file,
    model_requirements,
    project_requirements,
    read_dependencies,
)
from flops.errors import ErrorCode, FlopsError

CONTRACT = {"model_manager.py": "ModelManager", "data_manager.py": "DataManager"}
_PLATFORM_MODULES = frozenset({"flops_utils", "flops"})
_LOADERS = frozenset({"load_dataset", "*"})


@dataclass(frozen=True)
class MLRepository:
    """A repository that keeps the contract.

    Args:
        dependencies: what its dependency file asks for.
        imports: modules of other packages that its code imports, by full name, sorted.
        uses_load_dataset: whether it reads its data as a Hugging Face dataset.
    """

    dependencies: Dependencies
    imports: tuple[str, ...]
    uses_load_dataset: bool

    @property
    def platform_requirements(self) -> tuple[str, ...]:
        """What its environment needs for our learner."""
        return project_requirements(uses_load_dataset=self.uses_load_dataset)


def read_ml_repository(files: Mapping[str, bytes]) -> MLRepository:
    """Check the contract and read what decides the environment.

    Args:
        files: path in the repository ("/" between folders) → content; files that are neither Python nor a
            dependency file may be left out.

    Raises:
        FlopsError: ``repo_contract_broken``, ``dependencies_invalid``.
    """
    for name, class_name in CONTRACT.items():
        _check_module(name, class_name, files)
    imports, uses_load_dataset = _scan(files)
    file = find_dependency_file(files)
    top_level = frozenset(name.partition(".")[0] for name in imports)
    return MLRepository(read_dependencies(file, files[file], top_level), imports, uses_load_dataset)


def environment_key(
    repository: MLRepository, flavor: str, *, mlflow_version: str, platform: str, needs_gpu: bool
) -> EnvironmentKey:
    """The key under which the repository's locked environment is known.

    A change of code keeps it; a change of what is installed, by the user or by us, does not.

    Args:
        repository: the repository.
        flavor: the MLflow flavor of its model.
        mlflow_version: the MLflow that saves models.
        platform: machine and Python that environments are locked for.
        needs_gpu: whether CUDA may be in it.
    """
    dependencies = repository.dependencies
    content = {
        "requirements": sorted(dependencies.requirements),
        "python": dependencies.python,
        "hashes": {name: sorted(hashes) for name, hashes in sorted(dependencies.hashes.items())},
        "project": repository.platform_requirements,
        "model": model_requirements(flavor, mlflow_version),
        "flavor": flavor,
        "platform": platform,
        "gpu": needs_gpu,
    }
    return EnvironmentKey(hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())


def _check_module(name: str, class_name: str, files: Mapping[str, bytes]) -> None:
    if name not in files:
        raise FlopsError(
            ErrorCode.REPO_CONTRACT_BROKEN,
            f"{name} is not in the root of the repository; it must define the class {class_name}.",
        )
    try:
        tree = ast.parse(files[name], filename=name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        line = getattr(exc, "lineno", None)
        place = f"{name}, line {line}" if line else name
        raise FlopsError(
            ErrorCode.REPO_CONTRACT_BROKEN,
            f"{place} is not valid Python: {getattr(exc, 'msg', None) or exc}.",
            details={"file": name, "line": line},
        ) from exc
    if class_name not in {bound for statement in tree.body for bound in _bound_names(statement)}:
        raise FlopsError(ErrorCode.REPO_CONTRACT_BROKEN, f"{name} does not define the class {class_name}.")


def _bound_names(statement: ast.stmt) -> set[str]:
    """Names a statement may bind in its module; what stands in `if` and `try` counts."""
    names: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _scan(files: Mapping[str, bytes]) -> tuple[tuple[str, ...], bool]:
    own = {path.partition("/")[0].removesuffix(".py") for path in files}
    imports: set[str] = set()
    uses_load_dataset = False
    for path, content in files.items():
        if not path.endswith(".py"):
            continue
        try:
            tree = ast.parse(content, filename=path)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # a file that is not part of the contract may be anything
        for node in ast.walk(tree):
            imports |= _imported_modules(node)
            uses_load_dataset = uses_load_dataset or _names_loader(node)
    foreign = {
        name
        for name in imports
        if name.partition(".")[0] not in own | _PLATFORM_MODULES | sys.stdlib_module_names
    }
    return tuple(sorted(foreign)), uses_load_dataset


def _imported_modules(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return {node.module}
    return set()


def _names_loader(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flops_utils"):
        return any(alias.name in _LOADERS for alias in node.names)
    return isinstance(node, ast.Attribute) and node.attr == "load_dataset"
