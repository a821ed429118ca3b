"""Every example keeps the contract, and every SLA beside them is valid and about one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flops.core.ml_repository import read_ml_repository
from flops.core.sla import ModelFlavor, ProjectSla, parse_mock_data_sla, parse_project_sla

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
REPOSITORIES = sorted(path for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "slas")
PROJECTS = sorted((EXAMPLES / "slas/projects").glob("*.json"))
MOCKS = sorted((EXAMPLES / "slas/mocks").glob("*.json"))


def sla_of(file: Path) -> ProjectSla:
    return parse_project_sla(json.loads(file.read_text()))


@pytest.mark.parametrize("folder", REPOSITORIES, ids=lambda path: path.name)
def test_repositories_keep_the_contract(folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert read_ml_repository(files).dependencies.requirements
    assert (folder / "README.md").read_text()


@pytest.mark.parametrize("file", PROJECTS, ids=lambda path: path.name)
def test_slas_are_about_a_repository_and_data_that_a_mock_gives(file: Path) -> None:
    sla = sla_of(file)
    assert EXAMPLES / Path(sla.ml_repo_url).name in REPOSITORIES
    tags = {
        parse_mock_data_sla(json.loads(mock.read_text())).mock_data_configuration.data_tag for mock in MOCKS
    }
    assert set(sla.training_configuration.data_tags) <= tags


def test_every_flavor_has_an_example() -> None:
    flavors = {sla_of(file).ml_model_flavor for file in PROJECTS}
    assert flavors == set(ModelFlavor) - {ModelFlavor.TENSORFLOW}  # which keeps Keras models, too
    assert {Path(sla_of(file).ml_repo_url).name for file in PROJECTS} == {path.name for path in REPOSITORIES}


@pytest.mark.parametrize("file", [*PROJECTS, *MOCKS], ids=lambda path: path.name)
def test_the_list_of_slas_is_complete(file: Path) -> None:
    assert f"{file.parent.name}/{file.name}" in (EXAMPLES / "slas/README.md").read_text()
