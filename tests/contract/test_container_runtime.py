"""Services as containers: the contract, and what is particular to engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flops.adapters.containers.engine import ContainerEngine
from flops.adapters.containers.runtime import ContainerRuntime
from flops.ports import Runtime
from flops.testing.contracts.runtime import S1, RuntimeContract
from flops.testing.podman import Podman, missing_for_podman, running_podman

pytestmark = pytest.mark.skipif(bool(missing_for_podman()), reason=missing_for_podman())


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with running_podman() as podman:
        yield podman


@pytest.fixture(scope="module")
def engine(podman: Podman) -> Iterator[ContainerEngine]:
    engine = ContainerEngine(podman.socket)
    yield engine
    engine.close()


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


def make_runtime(folder: Path, engine: ContainerEngine) -> ContainerRuntime:
    return ContainerRuntime(folder / "runtime", folder / "output", engine)


class TestContainerRuntime(RuntimeContract):
    @pytest.fixture
    def runtime(self, folder: Path, engine: ContainerEngine) -> Iterator[Runtime]:
        runtime = make_runtime(folder, engine)
        yield runtime
        runtime.remove(S1)

    @pytest.fixture
    def reopen(self, folder: Path, engine: ContainerEngine) -> Callable[[], Runtime]:
        return lambda: make_runtime(folder, engine)
