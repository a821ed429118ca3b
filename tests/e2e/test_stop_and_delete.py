"""Stops and deletes projects at every stage: they end within seconds, and leave nothing on any node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Self

import pytest

from flops.core.project import Project, Stage
from flops.errors import ErrorCode, FlopsError
from flops.testing.audit import Books
from flops.testing.chaos import Role, processes_of, services_of
from flops.testing.deployment import Deployment, commit_all
from flops.testing.example import (
    REPOSITORY,
    begin_fit_with,
    example_deployment,
    make_example,
    sla_file,
    submit,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ENDED_WITHIN_S = 15.0
ENDLESS = "endless"
chaos = pytest.mark.chaos


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The example, and beside its repository one whose training never ends."""
    with example_deployment(tmp_path_factory.mktemp("deployment")) as deployment:
        deployment.wait_for(lambda: not services_of(deployment), "the end of the mock data provider")
        endless = make_example(deployment, ENDLESS)
        begin_fit_with(endless, "while True: pass")
        commit_all(endless, "Loop")
        yield deployment


class Ending:
    """A project that is brought to a point of its life and then ended."""

    def __init__(self, deployment: Deployment, repository: str, rounds: int = 2) -> None:
        self._deployment = deployment
        self._books = Books(deployment)
        self._left_before = folders_of(deployment)
        sla = sla_file(deployment, "sla", repository, training_configuration={"training_rounds": rounds})
        self.id = submit(deployment, sla)

    def project(self) -> Project | None:
        """As the manager knows it; None when it does not know it any more."""
        try:
            return self._books.api.project(self.id)
        except FlopsError as exc:
            if exc.code is not ErrorCode.PROJECT_NOT_FOUND:
                raise
            return None

    def wait_for(self, stage: Stage, *running: Role) -> None:
        """Wait until it is in a stage, with processes of these roles."""

        def is_there() -> bool:
            project = self.project()
            assert project is not None
            assert project.failure is None, project.failure
            assert not project.stage.is_final or project.stage is stage, f"it is {project.stage} already"
            here = {found.role for found in services_of(self._deployment)}
            return project.stage is stage and here.issuperset(running)

        self._deployment.wait_for(is_there, f"{stage} with {running}", timeout_s=120.0)

    def end(self, *commands: str) -> None:
        """Give the commands one after the other; their effect has to be whole within `ENDED_WITHIN_S`."""
        started = time.monotonic()
        for command in commands:
            self._deployment.flops("project", command, self.id)
        while left := self._left(is_deleted="delete" in commands):
            assert time.monotonic() < started + ENDED_WITHIN_S, f"left after {commands}: {left}"
            time.sleep(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        """Delete it, unless that is done or something failed; close the connections."""
        try:
            if kind is None and self.project() is not None:
                self.end("delete")
        finally:
            self._books.close()

    def _left(self, *, is_deleted: bool) -> list[str]:
        project = self.project()
        left = [str(found) for found in services_of(self._deployment)]
        if is_deleted:  # until then a folder keeps what its service wrote to its logs
            left += sorted(folders_of(self._deployment) - self._left_before)
            left += [f"project {project.stage}"] if project is not None else []
            left += [f"run {run['info']['status']}" for run in self._books.tracking.runs(self.id)]
        elif project is None or project.stage is not Stage.STOPPED:
            left.append(f"project {project and project.stage}")
        else:
            left += self._books.problems_of(project)
        return left


def folders_of(deployment: Deployment) -> set[str]:
    """Folders of services on all nodes."""
    return {str(path.relative_to(deployment.home)) for path in deployment.home.glob("node-*/services/*")}


STOP, DELETE, BOTH = ("stop",), ("delete",), ("stop", "delete")


@pytest.mark.parametrize(
    ("stage", "running", "repository", "commands"),
    [
        pytest.param(Stage.BUILDING, (Role.BUILDER,), REPOSITORY, DELETE, id="building-delete", marks=chaos),
        pytest.param(Stage.BUILDING, (Role.BUILDER,), REPOSITORY, STOP, id="building-stop", marks=chaos),
        pytest.param(Stage.PLACING, (), REPOSITORY, STOP, id="placing-stop", marks=chaos),
        pytest.param(Stage.PLACING, (), REPOSITORY, DELETE, id="placing-delete", marks=chaos),
        pytest.param(
            Stage.PLACING, (Role.AGGREGATOR,), REPOSITORY, STOP, id="aggregator-starts-stop", marks=chaos
        ),
        pytest.param(Stage.TRAINING, (), ENDLESS, STOP, id="training-stop", marks=chaos),
        pytest.param(Stage.TRAINING, (), ENDLESS, DELETE, id="training-delete", marks=chaos),
        pytest.param(Stage.TRAINING, (Role.LEARNER,), ENDLESS, BOTH, id="training-stop-then-delete"),
        pytest.param(Stage.DEPLOYING, (), REPOSITORY, STOP, id="deploying-stop", marks=chaos),
        pytest.param(Stage.DEPLOYING, (), REPOSITORY, DELETE, id="deploying-delete", marks=chaos),
        pytest.param(Stage.COMPLETED, (Role.INFERENCE,), REPOSITORY, DELETE, id="completed-delete"),
    ],
)
def test_a_project_ends_within_seconds_and_leaves_nothing(
    deployment: Deployment,
    stage: Stage,
    running: tuple[Role, ...],
    repository: str,
    commands: tuple[str, ...],
) -> None:
    if stage is Stage.BUILDING:
        deployment.flops("clear-registry")
    with Ending(deployment, repository) as ending:
        ending.wait_for(stage, *running)
        ending.end(*commands)


@pytest.mark.parametrize("commands", [STOP, DELETE, BOTH], ids=lambda commands: "-then-".join(commands))
@chaos
def test_a_project_ends_as_soon_as_it_is_submitted(deployment: Deployment, commands: tuple[str, ...]) -> None:
    with Ending(deployment, REPOSITORY) as ending:
        ending.end(*commands)


def test_a_learner_in_an_endless_loop_does_not_hold_up_a_stop(deployment: Deployment) -> None:
    def are_looping() -> bool:
        learners = [found.process for found in processes_of(deployment, Role.LEARNER)]
        return len(learners) == 2 and all(learner.cpu_percent(interval=0.3) > 20 for learner in learners)

    with Ending(deployment, ENDLESS) as ending:
        ending.wait_for(Stage.TRAINING, Role.LEARNER)
        deployment.wait_for(are_looping, "learners that loop")
        ending.end("stop")
