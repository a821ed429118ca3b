"""Kills in the middle of projects, one component after the other and all at once: everything goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flops.core.project import Project, Stage
from flops.node.service_folder import ServiceFolder
from flops.testing.audit import Books
from flops.testing.chaos import (
    Role,
    forget_boot,
    kill,
    kill_machine,
    processes_of,
    revive,
    services_of,
)
from flops.testing.deployment import Deployment, commit_all
from flops.testing.example import (
    REPOSITORY,
    begin_fit_with,
    example_deployment,
    sla_file,
    submit,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The example, with a training that takes long enough to be disturbed."""
    with example_deployment(tmp_path_factory.mktemp("deployment")) as deployment:
        repository = deployment.home / REPOSITORY
        begin_fit_with(repository, "__import__('time').sleep(0.2)")
        commit_all(repository, "Take time")
        yield deployment


class Disturbed:
    """A project that is watched while things are killed."""

    def __init__(self, deployment: Deployment, rounds: int) -> None:
        self._deployment = deployment
        self._books = Books(deployment)
        sla = sla_file(deployment, training_configuration={"training_rounds": rounds})
        self.id = submit(deployment, sla)

    def project(self) -> Project:
        return self._books.api.project(self.id)

    def wait_for(self, *stages: Stage, rounds: int = 0) -> None:
        """Wait until it is in one of the stages, and has finished so many rounds."""

        def is_there() -> bool:
            project = self.project()
            assert project.failure is None, project.failure
            done = len(project.training.history) if project.training else 0
            return project.stage in stages and done >= rounds

        self._deployment.wait_for(is_there, f"stage {stages}, round {rounds}")

    def finish(self) -> Project:
        """Wait for its end; its books have to be in order."""
        self.wait_for(Stage.COMPLETED)
        project = self.project()
        assert self._books.problems_of(project) == []
        return project

    def close(self) -> None:
        """Delete it; nothing of it may be left."""
        self._deployment.flops("project", "delete", self.id)
        self._deployment.wait_for(lambda: not services_of(self._deployment), "the end of all services")
        self._books.close()


@pytest.mark.parametrize(
    ("stage", "rounds"),
    [
        (Stage.BUILDING, 0),  # only the first project builds
        pytest.param(Stage.RESOLVING, 0, marks=pytest.mark.chaos),
        pytest.param(Stage.PLACING, 0, marks=pytest.mark.chaos),
        pytest.param(Stage.TRAINING, 0, marks=pytest.mark.chaos),
        pytest.param(Stage.TRAINING, 3, marks=pytest.mark.chaos),
        pytest.param(Stage.TRAINING, 8, marks=pytest.mark.chaos),
        pytest.param(Stage.DEPLOYING, 8, marks=pytest.mark.chaos),
    ],
)
def test_a_project_survives_the_kill_of_its_whole_machine(
    deployment: Deployment, stage: Stage, rounds: int
) -> None:
    later = tuple(Stage)[tuple(Stage).index(stage) :]
    disturbed = Disturbed(deployment, rounds=8)
    disturbed.wait_for(*later, rounds=rounds)
    kill_machine(deployment)
    forget_boot(deployment)
    revive(deployment)
    project = disturbed.finish()
    assert project.inference_url
    disturbed.close()


def test_training_goes_on_while_one_thing_after_the_other_is_killed(deployment: Deployment) -> None:
    disturbed = Disturbed(deployment, rounds=60)
    disturbed.wait_for(Stage.TRAINING, rounds=2)
    learners = {found.service_id: found.process.pid for found in processes_of(deployment, Role.LEARNER)}
    for role in (Role.TRACKING, Role.DATA_SERVER, Role.NODE, Role.CONTROL_PLANE, Role.AGGREGATOR):
        before = len(disturbed.project().training.history)  # type: ignore[union-attr]  # it trains
        kill(processes_of(deployment, role))
        revive(deployment)
        disturbed.wait_for(Stage.TRAINING, rounds=before + 3)
    now = {found.service_id: found.process.pid for found in processes_of(deployment, Role.LEARNER)}
    assert now == learners  # no learner was restarted for any of it
    kill(processes_of(deployment, Role.LEARNER))
    project = disturbed.finish()
    assert {len(record.participants) for record in project.training.history} == {2}  # type: ignore[union-attr]
    disturbed.close()


def test_training_goes_on_while_the_control_plane_is_away(deployment: Deployment) -> None:
    disturbed = Disturbed(deployment, rounds=40)
    disturbed.wait_for(Stage.TRAINING, rounds=2)
    kill(processes_of(deployment, Role.CONTROL_PLANE, Role.TRACKING))
    before = rounds_on_disk(deployment)
    deployment.wait_for(lambda: rounds_on_disk(deployment) >= before + 5, "five rounds without control plane")
    revive(deployment)
    disturbed.finish()
    disturbed.close()


def rounds_on_disk(deployment: Deployment) -> int:
    """Rounds in the aggregator's checkpoint."""
    (folder,) = deployment.home.glob("node-*/services/aggregator-*")
    return len((ServiceFolder(folder).work_dir / "checkpoint" / "history.jsonl").read_text().splitlines())
