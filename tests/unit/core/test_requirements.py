"""Dependency files of three formats become one list of requirements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core.requirements import (
    DEPENDENCY_FILES,
    Dependencies,
    find_dependency_file,
    model_requirements,
    project_requirements,
    read_dependencies,
)
from flops.errors import ErrorCode, FlopsError

CONDA = """
name: mnist
channels: [conda-forge]
dependencies:
  - python=3.11
  - pip<=24.0
  - numpy=1.26.4
  - conda-forge::scikit-learn==1.4.2
  - pytorch
  - cudatoolkit=11.8
  - libgcc-ng
  - pip:
      - packaging==24.0   # a comment
      - mlflow==2.12.1
      - git+https://github.com/example/flops_utils.git
      - flwr==1.8.0
"""


def read(file: str, text: str, *imported: str) -> Dependencies:
    return read_dependencies(file, text.encode(), frozenset(imported))


def test_conda_file_with_a_pip_section() -> None:
    found = read("conda.yml", CONDA)
    assert found.python == "==3.11.*"
    assert found.requirements == ("numpy==1.26.4.*", "scikit-learn==1.4.2", "torch", "packaging==24.0")
    assert len(found.notes) == 5
    for note, name in zip(
        found.notes, ("cudatoolkit", "libgcc-ng", "mlflow", "flops-utils", "flwr"), strict=True
    ):
        assert name in note


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("numpy", "numpy"),
        ("numpy=1.26", "numpy==1.26.*"),
        ("numpy=1.26.*", "numpy==1.26.*"),
        ("numpy 1.26*", "numpy==1.26.*"),
        ("numpy=1.26.4=py311h64a7726_0", "numpy==1.26.4"),
        ("numpy==1.26.4", "numpy==1.26.4"),
        ("numpy 1.26.4", "numpy==1.26.4"),
        ("numpy 1.26.4 py311_0", "numpy==1.26.4"),
        ("numpy >=1.26, <2", "numpy<2,>=1.26"),
        ("numpy=*", "numpy"),
        ("defaults::numpy~=1.26", "numpy~=1.26"),
        ("msgpack-python", "msgpack"),
    ],
)
def test_conda_notation(entry: str, expected: str) -> None:
    assert read("conda.yaml", f"dependencies: ['{entry}']\n").requirements == (expected,)


def test_requirements_file() -> None:
    text = (
        "# a comment\nnumpy>=1.26  # why\n\nscikit-learn==1.4.2 \\\n  --hash=sha256:00aa \\\n"
        " --hash=sha256:bb\n"
        "pandas; python_version<'3.12'\n"
    )
    found = read("requirements.txt", text)
    assert found.requirements == ("numpy>=1.26", "scikit-learn==1.4.2", 'pandas; python_version < "3.12"')
    assert found.hashes == {"scikit-learn": ("sha256:00aa", "sha256:bb")}


def test_pyproject_file() -> None:
    text = '[project]\nname = "x"\nrequires-python = ">=3.11"\ndependencies = ["numpy<2"]\n'
    found = read("pyproject.toml", text)
    assert (found.python, found.requirements) == (">=3.11", ("numpy<2",))


def test_what_the_platform_provides_stays_when_the_code_imports_it() -> None:
    text = "mlflow==3.1\nflwr\nnumpy\n"
    assert read("requirements.txt", text).requirements == ("numpy",)
    assert read("requirements.txt", text, "mlflow", "flwr").requirements == ("mlflow==3.1", "flwr", "numpy")


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("requirements.txt", "numpy\n-r other.txt\n", "line 2"),
        ("requirements.txt", "--index-url=http://evil\n", "line 1"),
        ("requirements.txt", "numpy --index-url=http://evil\n", "line 1"),
        ("requirements.txt", "numpy \\\n  --index-url=http://evil\n", "line 1"),
        ("requirements.txt", "\n-e .\n", "line 2"),
        ("requirements.txt", "numpy=>1\n", "'numpy=>1'"),
        ("requirements.txt", "https://example.org/x.whl\n", "has no name"),
        ("requirements.txt", "./local\n", "has no name"),
        ("requirements.txt", "x @ git+https://example.org/x\n", "locked by hash"),
        ("requirements.txt", "x @ file:///etc/passwd\n", "locked by hash"),
        ("conda.yml", "name: x\n", "no list named 'dependencies'"),
        ("conda.yml", "a: [\n", "line 2 is not YAML"),
        ("conda.yml", "dependencies: [[3]]\n", "line 1"),
        ("conda.yml", "dependencies: [{pip: numpy}]\n", "pip section is no list"),
        ("conda.yml", "dependencies:\n- numpy\n- pip:\n  - -r more.txt\n", "line 4"),
        ("conda.yml", 'dependencies:\n- pip:\n  - "numpy\\n--index-url http://evil"\n', "control characters"),
        ("conda.yml", "dependencies:\n- numpy\n- scipy=1.1|1.2\n", "line 3"),
        ("conda.yml", "dependencies:\n- 'numpy[version=\">1\"]'\n", "line 2"),
        ("conda.yml", "dependencies: ['python=x y']\n", "range of Python"),
        ("pyproject.toml", "[tool.x]\n", "no [project] table"),
        ("pyproject.toml", "[project\n", "not TOML"),
        ("pyproject.toml", "[project]\ndependencies = 3\n", "no list of texts"),
        (
            "pyproject.toml",
            '[project]\ndynamic = ["dependencies"]\n',
            "no [project] table with a static list",
        ),
        ("pyproject.toml", '[project]\ndependencies = [\n "numpy",\n "a b"]\n', "line 4"),
        ("pyproject.toml", "[project]\nrequires-python = 3\n", "range of Python"),
    ],
)
def test_what_is_wrong_is_named(file: str, text: str, expected: str) -> None:
    with pytest.raises(FlopsError) as caught:
        read(file, text)
    assert caught.value.code is ErrorCode.DEPENDENCIES_INVALID
    assert file in caught.value.message
    assert expected in caught.value.message


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"x" * 2_000_000])
def test_a_file_that_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(FlopsError) as caught:
        read_dependencies("requirements.txt", data, frozenset())
    assert caught.value.code is ErrorCode.DEPENDENCIES_INVALID


@given(st.text(), st.sampled_from(DEPENDENCY_FILES))
def test_any_text_is_read_or_refused(text: str, file: str) -> None:
    try:
        found = read(file, text)
    except FlopsError:
        return
    assert all("\n" not in requirement for requirement in found.requirements)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=4))
def test_no_line_becomes_an_option_of_uv(lines: list[str]) -> None:
    try:
        found = read("requirements.txt", "\n".join(lines))
    except FlopsError:
        return
    assert not any(requirement.lstrip().startswith("-") for requirement in found.requirements)


def test_the_first_dependency_file_counts() -> None:
    assert find_dependency_file(reversed(DEPENDENCY_FILES)) == "conda.yml"
    assert find_dependency_file(["pyproject.toml", "README.md"]) == "pyproject.toml"
    with pytest.raises(FlopsError) as caught:
        find_dependency_file(["README.md"])
    assert caught.value.code is ErrorCode.DEPENDENCIES_INVALID


def test_what_the_platform_adds() -> None:
    assert "datasets" in project_requirements(uses_load_dataset=True)
    assert "datasets" not in project_requirements(uses_load_dataset=False)
    assert "mlflow-skinny==3.1" in model_requirements("sklearn", "3.1")
    assert "skops" in model_requirements("sklearn", "3.1")
    assert "skops" not in model_requirements("pytorch", "3.1")
