"""Conda's environment files, read as requirements of PyPI packages."""

from __future__ import annotations

import re

import yaml
from packaging.utils import canonicalize_name

from flops.core.dependency_line import Line, invalid
from flops.errors import ErrorCode, FlopsError

_PYPI_NAMES = {
    "pytorch": "torch",
    "pytorch-cpu": "torch",
    "pytorch-gpu": "torch",
    "matplotlib-base": "matplotlib",
    "msgpack-python": "msgpack",
    "opencv": "opencv-python-headless",
    "py-opencv": "opencv-python-headless",
    "pytables": "tables",
    "py-xgboost": "xgboost",
    "py-xgboost-cpu": "xgboost",
    "dask-core": "dask",
    "tensorflow-base": "tensorflow",
    "python-graphviz": "graphviz",
    "pyqt": "pyqt5",
    "huggingface-hub": "huggingface_hub",
}
_ONLY_CONDA = frozenset(
    {
        "blas", "bzip2", "ca-certificates", "cmake-base", "compilers", "conda", "cpuonly",
        "cuda", "cuda-runtime", "cudatoolkit", "cudnn", "c-compiler", "cxx-compiler", "ffmpeg",
        "freetype", "gcc", "gxx", "git", "hdf5", "intel-openmp", "llvm-openmp",
        "mamba", "mkl", "mkl-service", "nccl", "ncurses", "nodejs", "openblas",
        "openjdk", "openmpi", "openssl", "pytorch-cuda", "pytorch-mutex", "python-abi", "python-abi3",
        "readline", "sqlite", "sysroot-linux-64", "tk", "tzdata-conda", "vs2015-runtime", "xz",
        "zlib",
    }
)  # fmt: skip
_ONLY_CONDA_PREFIXES = ("lib", "r-", "ld-impl", "_", "gcc-", "gxx-", "binutils")
_PREFIX_BUT_PYPI = frozenset({"librosa", "libsvm", "libclang", "libcst", "liblinear-official", "libtmux"})
_NAME = re.compile(r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)\s*(?P<rest>.*)", re.DOTALL)
_OPERATORS = ("==", ">=", "<=", "!=", "~=", ">", "<")


def read_conda(file: str, text: str) -> tuple[list[Line], str, list[str]]:
    """Read an environment file.

    Returns:
        Its PyPI requirements, the range of Pythons it allows, and notes on what was left out.

    Raises:
        FlopsError: ``dependencies_invalid``, naming file and line.
    """
    lines: list[Line] = []
    notes: list[str] = []
    python = ""
    for entry, is_pip in _entries(file, _dependencies(file, text)):
        if is_pip:
            lines.append(entry)
            continue
        name, specifier = _split(entry)
        if name == "python":
            python = specifier
        elif _is_only_conda(name):
            notes.append(
                f"{file}, line {entry.number}: {entry.text} is left out: conda packages that are not on PyPI "
                "are not supported; most PyPI wheels bring such libraries along."
            )
        else:
            requirement = _PYPI_NAMES.get(canonicalize_name(name), name) + specifier
            lines.append(Line(file, entry.number, requirement))
    return lines, python, notes


def _dependencies(file: str, text: str) -> list[yaml.Node]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(exc, "problem", None) or "it cannot be parsed"
        raise FlopsError(ErrorCode.DEPENDENCIES_INVALID, f"{file}{place} is not YAML: {problem}.") from exc
    except RecursionError as exc:
        raise FlopsError(ErrorCode.DEPENDENCIES_INVALID, f"{file} is nested too deeply.") from exc
    if isinstance(root, yaml.MappingNode):
        for key, value in root.value:
            if getattr(key, "value", None) == "dependencies" and isinstance(value, yaml.SequenceNode):
                return list(value.value)
    raise FlopsError(ErrorCode.DEPENDENCIES_INVALID, f"{file} has no list named 'dependencies'.")


def _entries(file: str, nodes: list[yaml.Node]) -> list[tuple[Line, bool]]:
    found: list[tuple[Line, bool]] = []
    for node in nodes:
        line = Line(file, node.start_mark.line + 1, "")
        if isinstance(node, yaml.ScalarNode):
            found.append((_line(file, node), False))
        elif isinstance(node, yaml.MappingNode) and [key.value for key, _ in node.value] == ["pip"]:
            section = node.value[0][1]
            if not isinstance(section, yaml.SequenceNode):
                raise invalid(line, "its pip section is no list")
            found += [(_line(file, item), True) for item in section.value]
        else:
            raise invalid(line, "an entry is a package, or the list named 'pip'")
    return found


def _line(file: str, node: yaml.Node) -> Line:
    line = Line(file, node.start_mark.line + 1, str(node.value).strip())
    if not isinstance(node, yaml.ScalarNode) or not line.text:
        raise invalid(line, "an entry is one text")
    return line


def _split(entry: Line) -> tuple[str, str]:
    """A conda entry's name, and its version range as a PEP 440 specifier."""
    match = _NAME.fullmatch(entry.text.rpartition("::")[2].strip())
    if match is None or "[" in entry.text or "|" in entry.text:
        raise invalid(entry, "its notation is not supported; write NAME=VERSION")
    name, rest = match["name"].lower(), match["rest"].strip()
    if not rest:
        return name, ""
    if rest.startswith(_OPERATORS):
        return name, ",".join(part.strip().replace(" ", "") for part in rest.split(","))
    if rest.startswith("="):
        version, _, build = rest[1:].strip().partition("=")
        return name, _exact(version.strip(), is_prefix=not build)
    version, _, _build = rest.partition(" ")
    return name, _exact(version, is_prefix=False)


def _exact(version: str, *, is_prefix: bool) -> str:
    if version in {"", "*"}:
        return ""
    if version.endswith("*"):
        return f"=={version.rstrip('*').rstrip('.')}.*"
    return f"=={version}.*" if is_prefix else f"=={version}"


def _is_only_conda(name: str) -> bool:
    normalised = "_" + name if name.startswith("_") else canonicalize_name(name)
    if normalised in _PREFIX_BUT_PYPI:
        return False
    return normalised in _ONLY_CONDA or normalised.startswith(_ONLY_CONDA_PREFIXES)
