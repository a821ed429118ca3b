"""What users see of a project while it happens: failures, learners, output, restarts of what they look at."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Self

import pytest

from flops.testing.audit import Books
from flops.testing.deployment import Deployment, commit_all
from flops.testing.example import begin_fit_with, example_deployment, make_example, sla_file, submit

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ALL_LEARNERS = {"min_available_clients": 2, "min_fit_clients": 2, "min_evaluate_clients": 2}
PATIENCE_S = 300.0
BOUND_S = 10.0  # for a machine that is busy with other things; what was measured is printed


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The example, on a control plane that all tests here share."""
    with example_deployment(tmp_path_factory.mktemp("deployment")) as deployment:
        yield deployment


@pytest.fixture
def books(deployment: Deployment) -> Iterator[Books]:
    books = Books(deployment)
    yield books
    books.close()


class Watcher:
    """A `flops` command whose lines are noted with the time at which they came."""

    def __init__(self, deployment: Deployment, *arguments: str) -> None:
        self._process = deployment.begin("flops", *arguments)
        self.lines: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)
        self._thread.join(10)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self.lines.append((time.time(), line))

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)

    def time_of(self, text: str) -> float:
        return next(at_s for at_s, line in self.lines if text in line)

    def wait(self) -> int:
        """Wait for the command's end; returns its exit code."""
        code = self._process.wait(60)
        self._thread.join(10)
        return code


def test_a_traceback_is_everywhere_within_seconds_of_the_raise(
    deployment: Deployment, books: Books, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = make_example(deployment, "raises")
    begin_fit_with(repository, "raise ValueError(f'raised at {__import__(\"time\").time():.3f}')")
    commit_all(repository, "Break it")
    project_id = submit(
        deployment, sla_file(deployment, "raises", "raises", training_configuration=ALL_LEARNERS)
    )
    seen: dict[str, float] = {}

    def is_in_mlflow() -> bool:
        runs = books.tracking.runs(project_id)
        return any(
            run["info"]["status"] == "FAILED"
            and "model_manager.py" in books.tracking.artifact(run, "failure.txt")
            for run in runs
        )

    def look() -> bool:
        if "API" not in seen and books.api.project(project_id).failure is not None:
            seen["API"] = time.time()
        if "API" in seen and is_in_mlflow():
            seen["MLflow"] = time.time()
        return "MLflow" in seen

    with Watcher(deployment, "project", "watch", project_id) as watcher:
        deployment.wait_for(look, "the failure in the API and in MLflow", PATIENCE_S)
        watcher.wait()
    seen["watch"] = watcher.time_of("model_manager.py")
    failure = books.api.project(project_id).failure
    assert failure is not None
    raised_at_s = float(re.findall(r"raised at ([0-9.]+[0-9])", failure.message)[0])
    with capsys.disabled():
        sys.stdout.write(
            f"\nfrom the raise to { ({k: f'{at_s - raised_at_s:.2f} s' for k, at_s in seen.items()}) }\n"
        )
    assert max(seen.values()) - raised_at_s < BOUND_S
    shown = deployment.flops("project", "show", project_id).stdout
    for text in (shown, watcher.text, str(failure.details)):
        for part in ("raised at", "model_manager.py", "fit_model", "node-"):
            assert part in text
    assert "round 1" in shown
