"""What every `flops.ports.Environments` does."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from flops.errors import ErrorCode, FlopsError
from flops.ports import Environments
from flops.testing.contracts.ml_repos import REPOSITORY

WriteRepository = Callable[[Mapping[str, str]], Path]


class EnvironmentsContract:
    """Subclass it, and provide the fixtures `environments` and `write_repository`.

    `write_repository(files)` makes a folder with the files; packages other than ``numpy`` are not asked for.
    """

    @pytest.fixture
    def environments(self) -> Environments:
        raise NotImplementedError

    @pytest.fixture
    def write_repository(self, tmp_path: Path) -> WriteRepository:
        def write(files: Mapping[str, str]) -> Path:
            folder = tmp_path / "repository"
            folder.mkdir(exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text)
            return folder

        return write

    def test_the_environment_names_both_locks_by_their_digest(
        self, environments: Environments, write_repository: WriteRepository
    ) -> None:
        told: list[str] = []
        lock, model_lock, environment = environments.lock(
            write_repository(REPOSITORY), "sklearn", told.append
        )
        assert environment.lock == hashlib.sha256(lock.encode()).hexdigest()
        assert environment.model_lock == hashlib.sha256(model_lock.encode()).hexdigest()
        assert lock.startswith(f"# python {environment.python}\n")
        assert told

    def test_the_same_repository_has_the_same_locks(
        self, environments: Environments, write_repository: WriteRepository
    ) -> None:
        folder = write_repository(REPOSITORY)
        assert environments.lock(folder, "sklearn", _ignore) == environments.lock(folder, "sklearn", _ignore)

    def test_a_lock_becomes_an_interpreter_once(
        self, environments: Environments, write_repository: WriteRepository
    ) -> None:
        lock, _, _ = environments.lock(write_repository(REPOSITORY), "sklearn", _ignore)
        python = environments.materialise(lock, _ignore)
        done = subprocess.run([python, "-I", "-c", "import numpy, pyarrow"], check=False, capture_output=True)
        assert done.returncode == 0
        told: list[str] = []
        assert environments.materialise(lock, told.append) == python
        assert told == []

    def test_a_wrong_dependency_file_is_refused(
        self, environments: Environments, write_repository: WriteRepository
    ) -> None:
        folder = write_repository({**REPOSITORY, "requirements.txt": "numpy\n=\n"})
        with pytest.raises(FlopsError) as caught:
            environments.lock(folder, "sklearn", _ignore)
        assert caught.value.code is ErrorCode.DEPENDENCIES_INVALID
        assert "line 2" in caught.value.message

    def test_a_package_that_does_not_exist_is_named(
        self, environments: Environments, write_repository: WriteRepository
    ) -> None:
        folder = write_repository({**REPOSITORY, "requirements.txt": "no-such-package-of-flops\n"})
        with pytest.raises(FlopsError) as caught:
            environments.lock(folder, "sklearn", _ignore)
        assert caught.value.code is ErrorCode.DEPENDENCIES_UNRESOLVABLE
        assert "no-such-package-of-flops" in caught.value.message

    def test_a_text_that_is_no_lock_is_refused(self, environments: Environments) -> None:
        with pytest.raises(FlopsError) as caught:
            environments.materialise("numpy==1.26.4\n", _ignore)
        assert caught.value.code is ErrorCode.ENVIRONMENT_BUILD_FAILED


def _ignore(_message: str) -> None:
    pass
