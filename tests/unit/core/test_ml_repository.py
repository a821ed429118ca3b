"""What of a repository's code decides its contract and environment."""

from __future__ import annotations

import pytest

from flops.core.ml_repository import environment_key, read_ml_repository

MODEL = b"class ModelManager:\n    pass\n"
DATA = b"class DataManager:\n    pass\n"


def files(**changes: bytes) -> dict[str, bytes]:
    found = {"model_manager.py": MODEL, "data_manager.py": DATA, "requirements.txt": b"numpy\nmlflow\n"}
    return found | {name.replace("__", "/") + ".py": text for name, text in changes.items()}


@pytest.mark.parametrize(
    "text",
    [
        b"from flops_utils.ml_repo_building_blocks import load_dataset\n",
        b"from flops_utils.ml_repo_building_blocks import *\n",
        b"import flops_utils.ml_repo_building_blocks as blocks\nblocks.load_dataset()\n",
    ],
)
def test_load_dataset_is_noticed_wherever_it_is_used(text: bytes) -> None:
    assert read_ml_repository(files(data_manager=DATA + text)).uses_load_dataset
    assert read_ml_repository(files(inner__module=text)).uses_load_dataset


def test_load_table_needs_no_datasets() -> None:
    text = b"from flops_utils.ml_repo_building_blocks import load_table\n"
    repository = read_ml_repository(files(data_manager=DATA + text))
    assert not repository.uses_load_dataset
    assert "datasets" not in repository.platform_requirements


def test_imports_are_those_of_other_packages() -> None:
    text = (
        b"import os, sklearn.linear_model\nfrom inner import module\nfrom . import x\nfrom PIL import Image\n"
    )
    repository = read_ml_repository(files(model_manager=MODEL + text, inner__module=b"import numpy as np\n"))
    assert repository.imports == ("PIL", "numpy", "sklearn.linear_model")


def test_mlflow_stays_when_the_code_imports_it() -> None:
    assert read_ml_repository(files()).dependencies.requirements == ("numpy",)
    repository = read_ml_repository(files(model_manager=MODEL + b"import mlflow.sklearn\n"))
    assert repository.dependencies.requirements == ("numpy", "mlflow")


def test_a_class_may_come_from_elsewhere() -> None:
    read_ml_repository(files(model_manager=b"from inner import Model as ModelManager\n"))
    read_ml_repository(files(model_manager=b"try:\n    class ModelManager: pass\nfinally: pass\n"))


def test_code_beside_the_contract_may_be_anything() -> None:
    read_ml_repository(files(scratch=b"def (:\n", other=b"\0\xff"))


def test_the_key_depends_on_what_is_installed() -> None:
    def key(
        text: bytes = b"",
        flavor: str = "sklearn",
        mlflow: str = "3.1",
        platform: str = "p",
        needs_gpu: bool = False,
    ) -> str:
        repository = read_ml_repository(files(model_manager=MODEL + text))
        return environment_key(
            repository, flavor, mlflow_version=mlflow, platform=platform, needs_gpu=needs_gpu
        )

    assert key() == key(b"x = 1\n")
    loads = b"from flops_utils.ml_repo_building_blocks import load_dataset\n"
    others = {
        key(loads),
        key(flavor="pytorch"),
        key(mlflow="3.2"),
        key(platform="q"),
        key(b"import mlflow\n"),
        key(needs_gpu=True),
    }
    assert len(others | {key()}) == 7
