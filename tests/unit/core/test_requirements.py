"""Dependency files of three formats become one list of requirements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core.requirements import Dependencies, environment_key, parse_dependencies
from flops.errors import ErrorCode, FlopsError

CONDA = """
name: mnist
channels: [conda-forge]
dependencies:
  - python=3.11
  - pip
  - numpy=1.26.4
  - conda-forge::scikit-learn==1.4.2
  - pytorch
  - pip:
      - packaging==24.0
      - mlflow==2.12.1
      - git+https://github.com/example/flops_utils.git
"""


def test_conda_file_with_a_pip_section() -> None:
    read = parse_dependencies("conda.yml", CONDA)
    assert read.python == "==3.11.*"
    assert read.requirements == ("numpy==1.26.4.*", "packaging==24.0", "scikit-learn==1.4.2", "torch")
    assert [note.split("'")[1] for note in read.notes] == [
        "pip",
        "mlflow==2.12.1",
        "git+https://github.com/example/flops_utils.git",
    ]


def test_requirements_file() -> None:
    text = (
        "# a comment\nnumpy>=1.26  # why\n\nscikit-learn==1.4.2 \\\n  --hash=sha256:00\n"
        "pandas; python_version<'3.12'\n"
    )
    assert parse_dependencies("requirements.txt", text).requirements == (
        "numpy>=1.26",
        'pandas; python_version < "3.12"',
        "scikit-learn==1.4.2",
    )


def test_pyproject_file() -> None:
    text = '[project]\nname = "x"\nrequires-python = ">=3.11"\ndependencies = ["numpy<2"]\n'
    read = parse_dependencies("pyproject.toml", text)
    assert (read.python, read.requirements) == (">=3.11", ("numpy<2",))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("requirements.txt", "numpy\n-r other.txt\n", "line 2"),
        ("requirements.txt", "--index-url=x\n", "--index-url"),
        ("requirements.txt", "numpy=>1\n", "'numpy=>1'"),
        ("requirements.txt", "https://example.org/x.whl\n", "has no name"),
        ("conda.yml", "name: x\n", "no list 'dependencies'"),
        ("conda.yml", "a: [\n", "not YAML"),
        ("conda.yml", "dependencies: [3]\n", "dependencies[0]"),
        ("conda.yml", "dependencies: [{pip: numpy}]\n", "dependencies[0].pip"),
        ("conda.yml", "dependencies: ['numpy=x']\n", "dependencies[0]"),
        ("pyproject.toml", "[tool.x]\n", "no [project] table"),
        ("pyproject.toml", "[project\n", "not TOML"),
        ("pyproject.toml", "[project]\ndependencies = 3\n", "project.dependencies"),
        ("pyproject.toml", "[project]\nrequires-python = 3\n", "requires-python"),
    ],
)
def test_what_is_wrong_is_named(file: str, text: str, expected: str) -> None:
    with pytest.raises(FlopsError) as caught:
        parse_dependencies(file, text)
    assert caught.value.code is ErrorCode.DEPENDENCIES_INVALID
    assert file in caught.value.message
    assert expected in caught.value.message


@given(st.text())
@pytest.mark.parametrize("file", ["conda.yml", "requirements.txt", "pyproject.toml"])
def test_any_text_is_read_or_refused(file: str, text: str) -> None:
    assert _outcome(file, text) == _outcome(file, text)


def _outcome(file: str, text: str) -> object:
    try:
        return parse_dependencies(file, text)
    except FlopsError as error:
        return error.code, error.message


def test_the_key_depends_on_content_alone() -> None:
    one = Dependencies(file="conda.yml", requirements=("a", "b"), notes=("x",))
    other = Dependencies(file="requirements.txt", requirements=("b", "a"))
    changed = Dependencies(file="conda.yml", requirements=("a",))
    facts = {"flavor": "sklearn", "platform": "linux-x86_64-3.11", "extras": ("numpy",)}
    assert environment_key(one, **facts) == environment_key(other, **facts)  # type: ignore[arg-type]
    assert environment_key(one, **facts) != environment_key(changed, **facts)  # type: ignore[arg-type]
