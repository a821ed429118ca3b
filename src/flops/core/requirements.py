"""What a repository's dependency file asks for, in one form: PEP 508 requirements and a range of Pythons.

Read are ``conda.yml``, ``conda.yaml``, ``requirements.txt`` and ``pyproject.toml``, the first one there is.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from flops.core.conda import read_conda
from flops.core.dependency_line import Line, invalid
from flops.errors import ErrorCode, FlopsError

DEPENDENCY_FILES = ("conda.yml", "conda.yaml", "requirements.txt", "pyproject.toml")
OLDEST_PYTHON = (3, 11)  # the actor kit needs it
MLFLOW_NAMES = frozenset({"mlflow", "mlflow-skinny", "mlflow-tracing"})
_PROVIDED = frozenset({"flops-utils", "flwr"})  # the ancestor's images installed them
_SERVER = ("starlette", "uvicorn", "httptools", "uvloop", "orjson")
_MAX_FILE_BYTES = 1_048_576
_HASH_OPTION = re.compile(r"\s--hash[= ](?P<hash>sha\d+:[0-9a-f]+)")
_BARE_URL = re.compile(r"[a-z]+\+|https?:|file:|ssh:|[./]", re.IGNORECASE)
_PLATFORM_URL = re.compile(r"(#egg=|/)flops[_-]utils", re.IGNORECASE)
_COMMENT = re.compile(r"(^|\s)#.*$")


@dataclass(frozen=True)
class Dependencies:
    """What a dependency file asks for.

    Args:
        file: name of the file.
        requirements: PEP 508 requirements, as the file has them, without what the platform provides.
        python: versions of Python it allows, as a PEP 440 specifier; "" for any.
        notes: what was left out and why, one sentence each.
        hashes: by normalised name, the only hashes the file allows.
    """

    file: str
    requirements: tuple[str, ...] = ()
    python: str = ""
    notes: tuple[str, ...] = ()
    hashes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def find_dependency_file(names: Iterable[str]) -> str:
    """The name of the dependency file that counts.

    Raises:
        FlopsError: ``dependencies_invalid`` when there is none.
    """
    present = set(names)
    for name in DEPENDENCY_FILES:
        if name in present:
            return name
    raise FlopsError(
        ErrorCode.DEPENDENCIES_INVALID,
        f"The repository has no dependency file: none of {', '.join(DEPENDENCY_FILES)} is in its root.",
    )


def read_dependencies(file: str, data: bytes, imported: frozenset[str]) -> Dependencies:
    """Read a dependency file.

    Args:
        file: its name, which decides the format.
        data: its content.
        imported: top-level names of the modules that the repository's code imports.

    Raises:
        FlopsError: ``dependencies_invalid``, naming file and line.
    """
    if len(data) > _MAX_FILE_BYTES:
        raise FlopsError(ErrorCode.DEPENDENCIES_INVALID, f"{file} is larger than {_MAX_FILE_BYTES} bytes.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise FlopsError(
            ErrorCode.DEPENDENCIES_INVALID, f"{file} is not UTF-8 text (byte {exc.start})."
        ) from exc
    if file.startswith("conda"):
        lines, python, notes = read_conda(file, text)
    elif file == "requirements.txt":
        lines, python, notes = _read_requirements(file, text), "", []
    else:
        lines, python, notes = *_read_pyproject(file, text), []
    return _collect(file, lines, python, notes, imported)


def project_requirements(*, uses_load_dataset: bool) -> tuple[str, ...]:
    """What our learner needs beside the user's requirements."""
    # pyarrow 26 needs NumPy 2 without saying so, and would meet pins such as numpy==1.26.4.
    needed = ("numpy", "pyarrow>=15,<26")
    return (*needed, "datasets", "pillow") if uses_load_dataset else needed


def model_requirements(flavor: str, mlflow_version: str) -> tuple[str, ...]:
    """What saving, logging and serving a model needs beside the project's environment."""
    needed = (f"mlflow-skinny=={mlflow_version}", "pandas", *_SERVER)
    return (*needed, "skops") if flavor == "sklearn" else needed


def name_of(requirement: str) -> str:
    """The normalised name of a valid requirement."""
    return canonicalize_name(Requirement(requirement).name)


def _collect(
    file: str, lines: Iterable[Line], python: str, notes: list[str], imported: frozenset[str]
) -> Dependencies:
    requirements: list[str] = []
    hashes: dict[str, tuple[str, ...]] = {}
    for line in lines:
        requirement, allowed = _parse(line)
        name = canonicalize_name(requirement.name)
        if (note := _reason_to_drop(name, imported)) is not None:
            notes += [f"{file}: {requirement} is left out: {note}."] if note else []
            continue
        _refuse_unlockable(requirement, line)
        requirements.append(str(requirement))
        if allowed:
            hashes[name] = allowed
    try:
        SpecifierSet(python)
    except InvalidSpecifier as exc:
        raise FlopsError(
            ErrorCode.DEPENDENCIES_INVALID, f"{file}: {python!r} is not a range of Python versions."
        ) from exc
    return Dependencies(file, tuple(requirements), python, tuple(notes), hashes)


def _parse(line: Line) -> tuple[Requirement, tuple[str, ...]]:
    text = line.text
    if not text.isprintable():
        raise invalid(line, "it has control characters")
    hashes = tuple(found["hash"] for found in _HASH_OPTION.finditer(text))
    text = _HASH_OPTION.sub("", text).strip()
    if text.startswith("-"):
        raise invalid(
            line,
            "options are not accepted, every requirement stands in this file; which index is used, the "
            "operator of the node decides",
        )
    if _BARE_URL.match(text):
        if _PLATFORM_URL.search(text):
            return Requirement("flops-utils"), hashes
        raise invalid(line, "it has no name; name a released version, or write 'NAME @ URL'")
    try:
        return Requirement(text), hashes
    except InvalidRequirement as exc:
        reason = str(exc).splitlines()[0] if str(exc) else "it is malformed"
        raise invalid(line, f"it is not a requirement ({reason.strip()})") from exc


def _reason_to_drop(name: str, imported: frozenset[str]) -> str | None:
    """None: keep it; "": nothing to say; else why it is left out."""
    if name == "pip":
        return ""
    if name in MLFLOW_NAMES and "mlflow" not in imported:
        return "learners do not talk to MLflow, and the platform brings its own to save the model"
    if name in _PROVIDED and name not in imported:
        return "the platform provides it"
    return None


def _refuse_unlockable(requirement: Requirement, line: Line) -> None:
    url = requirement.url
    if url is not None and not url.startswith(("https://", "http://")):
        raise invalid(
            line, "only packages and https:// archives can be locked by hash; name a released version"
        )


def _read_requirements(file: str, text: str) -> list[Line]:
    lines: list[Line] = []
    pending, started = "", 1
    for number, raw in enumerate(text.splitlines(), start=1):
        started = started if pending else number
        pending += _COMMENT.sub("", raw)
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        if pending.strip():
            lines.append(Line(file, started, pending.strip()))
        pending = ""
    if pending.strip():
        lines.append(Line(file, started, pending.strip()))
    return lines


def _read_pyproject(file: str, text: str) -> tuple[list[Line], str]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise FlopsError(ErrorCode.DEPENDENCIES_INVALID, f"{file} is not TOML: {exc}.") from exc
    project = document.get("project")
    if not isinstance(project, dict) or "dependencies" in project.get("dynamic", []):
        raise FlopsError(
            ErrorCode.DEPENDENCIES_INVALID,
            f"{file} has no [project] table with a static list of dependencies.",
            hint="Write dependencies = [...] under [project], or add a requirements.txt.",
        )
    entries = project.get("dependencies", [])
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise FlopsError(
            ErrorCode.DEPENDENCIES_INVALID, f"{file}: [project].dependencies is no list of texts."
        )
    source = text.splitlines()
    return [Line(file, _find(source, entry), entry) for entry in entries], str(
        project.get("requires-python", "")
    )


def _find(source: list[str], entry: str) -> int:
    return next((number for number, line in enumerate(source, start=1) if entry in line), 1)
