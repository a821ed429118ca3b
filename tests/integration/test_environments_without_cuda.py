"""Where no GPU is asked for, environments are locked without CUDA; where that is impossible, it is said."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import uv

from flops.adapters.uv_environments import UvEnvironments
from flops.core.resolution import locked_versions
from flops.errors import ErrorCode, FlopsError
from flops.settings import inherited_environment
from flops.testing.contracts.ml_repos import REPOSITORY
from flops.testing.wheels import make_platform_wheels, make_wheel, use_only

MLFLOW = "3.17.2"
NEW, CPU = "2.15.0", "2.13.0+cpu"


class Site:
    """A package index that has PyTorch and XGBoost as they are, but for their content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        make_platform_wheels(self.wheels, mlflow_version=MLFLOW)
        for name in ("cuda-toolkit", "nvidia-nccl-cu12"):
            make_wheel(self.wheels, name, "13.0")
        make_wheel(self.wheels, "torch", NEW, requires=["cuda-toolkit", "nvidia-nccl-cu12"])
        make_wheel(self.wheels, "xgboost", "3.2.0", requires=["nvidia-nccl-cu12"])
        self.environ = {**inherited_environment(), **use_only(self.wheels, folder / "cache")}
        self.uv = Path(uv.find_uv_bin())

    def add_cpu_build(self, folder: Path | None = None) -> None:
        make_wheel(folder or self.wheels, "torch", CPU, modules=["torch"])

    def environments(self, **changes: str) -> UvEnvironments:
        environ = {**self.environ, **changes}
        return UvEnvironments(
            self.folder / "environments", uv=self.uv, environ=environ, mlflow_version=MLFLOW
        )

    def repository(self, requirements: str) -> Path:
        folder = self.folder / "repository"
        folder.mkdir(exist_ok=True)
        for name, text in {**REPOSITORY, "requirements.txt": requirements}.items():
            (folder / name).write_text(text)
        return folder

    def lock(self, requirements: str, *, needs_gpu: bool = False) -> tuple[list[dict[str, str]], list[str]]:
        """What both environments have, and the notes."""
        *locks, environment = self.environments().lock(
            self.repository(requirements), "sklearn", lambda _: None, needs_gpu=needs_gpu
        )
        return [locked_versions(lock) for lock in locks], list(environment.notes)

    def refusal(self, requirements: str) -> FlopsError:
        with pytest.raises(FlopsError) as caught:
            self.lock(requirements)
        assert caught.value.code is ErrorCode.DEPENDENCIES_UNRESOLVABLE
        return caught.value


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_build_without_cuda_is_chosen_where_no_gpu_is_asked_for(site: Site) -> None:
    site.add_cpu_build()
    found, notes = site.lock("torch\n")
    for environment in found:
        assert environment["torch"] == CPU
        assert "cuda-toolkit" not in environment
    assert notes == [f"Without CUDA, as no GPU is asked for: torch {CPU}."]


def test_the_build_with_cuda_is_chosen_where_gpus_are_asked_for(site: Site) -> None:
    site.add_cpu_build()
    found, notes = site.lock("torch\nxgboost\n", needs_gpu=True)
    for environment in found:
        assert environment["torch"] == NEW
        assert {"cuda-toolkit", "nvidia-nccl-cu12"} <= set(environment)
    assert notes == []


def test_what_xgboost_needs_on_several_gpus_only_is_left_out(site: Site) -> None:
    found, _ = site.lock("xgboost\n")
    for environment in found:
        assert environment["xgboost"] == "3.2.0"
        assert "nvidia-nccl-cu12" not in environment


def test_an_index_without_a_build_for_cpus_is_told(site: Site) -> None:
    error = site.refusal("torch>=2\nnumpy\n")
    assert "has torch>=2 only as builds for GPUs" in error.message
    assert "numpy" not in error.message
    assert "vgpus" in error.hint


def test_a_pin_is_not_loosened_to_get_rid_of_cuda(site: Site) -> None:
    site.add_cpu_build()
    assert f"has torch=={NEW} only as builds for GPUs" in site.refusal(f"torch=={NEW}\n").message


def test_a_conflict_that_is_not_about_cuda_is_told_as_it_is(site: Site) -> None:
    make_wheel(site.wheels, "old", "1", requires=["torch<2"])
    message = site.refusal("torch>=2\nold\n").message
    assert "torch<2" in message
    assert "CUDA" not in message
    assert "cuda-toolkit" not in message


# Stands in for PyTorch's own index, which only uv's `--torch-backend` knows.
UV_WITH_CPU_INDEX = """#!/usr/bin/env python3
import os, sys
arguments = sys.argv[1:]
if "--torch-backend" in arguments:
    at = arguments.index("--torch-backend")
    assert arguments[at + 1] == "cpu"
    arguments[at:at + 2] = {replacement!r}
os.execv({uv!r}, [{uv!r}, *arguments])
"""


def use_cpu_index(site: Site, *replacement: str) -> None:
    """Have uv look elsewhere when it is asked for PyTorch's own index."""
    program = site.folder / "uv"
    program.write_text(UV_WITH_CPU_INDEX.format(replacement=list(replacement), uv=uv.find_uv_bin()))
    program.chmod(0o755)
    site.uv = program


def test_pytorch_s_own_index_is_asked_when_the_configured_one_has_only_cuda(site: Site) -> None:
    other = site.folder / "cpu-index"
    other.mkdir()
    site.add_cpu_build(other)
    use_cpu_index(site, "--find-links", str(other))
    lock, _, environment = site.environments().lock(site.repository("torch\n"), "sklearn", lambda _: None)
    assert locked_versions(lock)["torch"] == CPU
    assert environment.lock == hashlib.sha256(lock.encode()).hexdigest()
    told: list[str] = []
    python = site.environments().materialise(lock, told.append)
    assert list((python.parent.parent / "lib").glob("python*/site-packages/torch/__init__.py"))
    assert any("PyTorch's own index" in message for message in told)


def test_an_index_of_pytorch_s_that_cannot_be_reached_changes_no_answer(site: Site) -> None:
    use_cpu_index(site, "--extra-index-url", "http://127.0.0.1:1/simple")
    configuration = Path(site.environ["UV_CONFIG_FILE"])
    configuration.write_text(configuration.read_text().replace("no-index = true\n", ""))
    site.environ["UV_DEFAULT_INDEX"] = (site.folder / "simple").as_uri()
    (site.folder / "simple").mkdir()
    assert "has torch only as builds for GPUs" in site.refusal("torch\n").message
