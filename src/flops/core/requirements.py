"""What a repository's dependency file asks for: conda.yml, requirements.txt and pyproject.toml, made one.

The rules are pure: they turn text into requirements, and say in notes what they left out and why.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from typing import Any

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from flops.core.ids import EnvironmentKey
from flops.core.model import Value
from flops.errors import ErrorCode, FlopsError

DEPENDENCY_FILES = ("conda.yml", "conda.yaml", "requirements.txt", "pyproject.toml")
"""Names that are looked for, the first one found wins."""

# The learner never talks to these: they belong to the platform, whose version the project must not constrain.
_PROVIDED = {"flops-utils", "flops", "flwr", "flwr-datasets", "mlflow", "mlflow-skinny"}
# What conda environments list and PyPI does not have, or has as part of the interpreter.
_CONDA_ONLY = {
    "pip", "setuptools", "wheel", "libgcc", "libgcc-ng", "libstdcxx-ng", "gcc", "gxx", "openssl",
    "ca-certificates", "cudatoolkit", "cpuonly", "mkl", "libblas", "openblas", "blas", "libopenblas",
}  # fmt: skip
_CONDA_NAMES = {"pytorch": "torch"}  # conda name -> PyPI name
_CONDA_SPEC = re.compile(r"^(?:[\w.-]+::)?(?P<name>[A-Za-z0-9][\w.-]*)\s*(?P<spec>.*)$")


class Dependencies(Value):
    """What a repository needs, read from its dependency file."""

    file: str
    python: str = ""  # version specifiers, "" when any will do
    requirements: tuple[str, ...] = ()  # PEP 508, sorted, one a distribution and marker
    notes: tuple[str, ...] = ()  # what was left out, and why


def parse_dependencies(file: str, text: str) -> Dependencies:
    """Read a dependency file.

    Args:
        file: its name, one of `DEPENDENCY_FILES`; decides the format.
        text: its content.

    Raises:
        FlopsError: ``dependencies_invalid``, naming the file and the line or key.
    """
    if file.endswith((".yml", ".yaml")):
        return _parse_conda(file, text)
    if file.endswith(".toml"):
        return _parse_pyproject(file, text)
    return _parse_requirements(file, text)


def environment_key(
    dependencies: Dependencies, *, flavor: str, platform: str, extras: Iterable[str]
) -> EnvironmentKey:
    """The key of the environment that satisfies the dependencies; equal content has an equal key.

    Args:
        dependencies: what the repository asks for; its notes and its file's name do not matter.
        flavor: MLflow flavor of the model.
        platform: what wheels are chosen for, such as ``linux-x86_64-3.11``.
        extras: requirements the platform adds for its own actors.
    """
    content = {
        "python": dependencies.python,
        "requirements": sorted(dependencies.requirements),
        "flavor": flavor,
        "platform": platform,
        "extras": sorted(extras),
    }
    return EnvironmentKey(hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())


def _parse_requirements(file: str, text: str) -> Dependencies:
    lines: list[tuple[str, str]] = []
    for number, line in enumerate(text.replace("\\\n", " ").splitlines(), start=1):
        content = re.sub(r"(^|\s)#.*$", "", line).strip()
        content = re.sub(r"\s+--hash=\S+", "", content)
        if not content:
            continue
        where = f"{file}, line {number}"
        if content.startswith("-"):
            raise _invalid(
                where, f"option {content.split()[0]!r} is not supported; list the requirements themselves"
            )
        lines.append((where, content))
    return _collect(file, "", lines, [])


def _parse_pyproject(file: str, text: str) -> Dependencies:
    try:
        project = tomllib.loads(text).get("project")
    except tomllib.TOMLDecodeError as exc:
        raise _invalid(file, f"it is not TOML: {exc}") from exc
    if not isinstance(project, dict):
        raise _invalid(file, "it has no [project] table with dependencies")
    listed = project.get("dependencies", [])
    python = project.get("requires-python", "")
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise _invalid(f"{file}, project.dependencies", "it must be a list of texts")
    lines = [(f"{file}, project.dependencies[{number}]", item) for number, item in enumerate(listed)]
    return _collect(file, _specifier(f"{file}, project.requires-python", python), lines, [])


def _parse_conda(file: str, text: str) -> Dependencies:
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise _invalid(file, f"it is not YAML: {' '.join(str(exc).split())}") from exc
    listed = document.get("dependencies") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise _invalid(file, "it has no list 'dependencies'")
    python, lines, notes = "", [], []
    for number, item in enumerate(listed):
        where = f"{file}, dependencies[{number}]"
        if isinstance(item, dict) and set(item) == {"pip"}:
            lines += _pip_section(where, item["pip"])
        elif isinstance(item, str):
            name, specifier = _read_conda_item(where, item)
            if name == "python":
                python = specifier
            elif name in _CONDA_ONLY:
                notes.append(f"{item!r} of {file} was left out: it is part of conda, not of PyPI.")
            else:
                lines.append((where, f"{_CONDA_NAMES.get(name, name)}{specifier}"))
        else:
            raise _invalid(where, f"it must be a text, or 'pip:' with a list, got {item!r}")
    return _collect(file, python, lines, notes)


def _pip_section(where: str, listed: Any) -> list[tuple[str, str]]:
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise _invalid(f"{where}.pip", "it must be a list of texts")
    return [(f"{where}.pip[{number}]", item) for number, item in enumerate(listed)]


def _read_conda_item(where: str, item: str) -> tuple[str, str]:
    """Turn ``numpy=1.26`` (conda: any 1.26.x) into ``("numpy", "==1.26.*")``."""
    match = _CONDA_SPEC.match(item.strip())
    if match is None:
        raise _invalid(where, f"{item!r} is no conda requirement")
    name, spec = match["name"].lower(), match["spec"].strip()
    if not spec:
        return name, ""
    if spec[0] == "=" and not spec.startswith("=="):
        version = spec.lstrip("= ").split("=")[0].removesuffix("*").removesuffix(".")
        return name, _specifier(where, f"=={version}.*")
    if spec.startswith("==") and spec.count("=") > 2:  # name==version=build
        spec = "==" + spec[2:].split("=")[0]
    elif spec[0].isdigit():
        spec = f"=={spec.split()[0]}"
    return name, _specifier(where, spec)


def _collect(file: str, python: str, lines: list[tuple[str, str]], notes: list[str]) -> Dependencies:
    wanted: set[str] = set()
    for where, content in lines:
        requirement = _read_requirement(where, content)
        name = canonicalize_name(requirement.name)
        if name in _PROVIDED:
            notes.append(f"{content!r} of {file} was left out: FLOps provides it.")
        else:
            wanted.add(str(requirement))
    return Dependencies(file=file, python=python, requirements=tuple(sorted(wanted)), notes=tuple(notes))


def _read_requirement(where: str, content: str) -> Requirement:
    if re.match(r"^(git\+|https?:|file:|\.|/)", content):
        name = re.search(r"(?:#egg=|/)(?P<name>flops[_-]utils)", content)
        if name is None:
            raise _invalid(where, f"{content!r} has no name; write 'name @ URL', or a released version")
        return Requirement("flops-utils")
    try:
        return Requirement(content)
    except InvalidRequirement as exc:
        raise _invalid(where, f"{content!r} is no requirement ({str(exc).splitlines()[0]})") from exc


def _specifier(where: str, text: Any) -> str:
    try:
        return str(SpecifierSet(text))
    except (InvalidSpecifier, AttributeError, TypeError) as exc:
        raise _invalid(where, f"{text!r} is no version specifier") from exc


def _invalid(where: str, problem: str) -> FlopsError:
    return FlopsError(
        ErrorCode.DEPENDENCIES_INVALID, f"The dependency file is invalid at {where}: {problem}."
    )
