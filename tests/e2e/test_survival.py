"""Kills in the middle of projects, one component after the other and all at once: everything goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.cli.api_client import ApiClient
from flops.core.project import Project, Stage
from flops.testing.audit import Tracking, problems_of
from flops.testing.chaos import (
    Role,
    forget_boot,
    kill,
    kill_machine,
    processes_of,
    revive,
    services_of,
)
from flops.testing.deployment import Deployment, commit_all, deployed, make_repository

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two learner nodes with data, and a repository whose training takes long enough to be disturbed."""
    with deployed(tmp_path_factory.mktemp("deployment")) as deployment:
        deployment.up()
        deployment.start_node("node-1", "FLOps-learner", "imageBuilder")
        deployment.start_node("node-2", "FLOps-learner")
        deployment.wait_for_nodes(2)
        deployment.flops("mock-data", "create", str(EXAMPLES / "slas/mocks/breast_cancer.json"), "--watch")
        repository = make_repository(EXAMPLES / "breast_cancer_sklearn", deployment.home / "repository")
        slow_down(repository, 0.2)
        yield deployment


def slow_down(repository: Path, pause_s: float) -> None:
    """Have every training take some time."""
    manager = repository / "model_manager.py"
    source, start = manager.read_text(), "def fit_model(self) -> int:"
    assert start in source
    manager.write_text(source.replace(start, f"{start}\n        __import__('time').sleep({pause_s})", 1))
    commit_all(repository, "Take time")


class Disturbed:
    """A project that is watched while things are killed."""

    def __init__(self, deployment: Deployment, rounds: int) -> None:
        self._deployment = deployment
        endpoint = json.loads((deployment.home / "control" / "endpoint.json").read_text())
        self._api = ApiClient(endpoint["manager_url"], deployment.home / "control" / "admin.token")
        self._tracking = Tracking(endpoint["tracking_url"])
        sla = json.loads((EXAMPLES / "slas/projects/breast_cancer_sklearn.json").read_text())
        sla["ml_repo_url"] = (deployment.home / "repository").as_uri()
        sla["training_configuration"]["training_rounds"] = rounds
        path = deployment.home / "sla.json"
        path.write_text(json.dumps(sla))
        self.id = deployment.flops("project", "create", str(path)).stdout.split()[0]

    def project(self) -> Project:
        return self._api.project(self.id)

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
        assert problems_of(project, self._api.history(self.id), self._tracking) == []
        return project

    def close(self) -> None:
        """Delete it; nothing of it may be left."""
        self._deployment.flops("project", "delete", self.id)
        self._deployment.wait_for(lambda: not services_of(self._deployment), "the end of all services")
        self._api.close()
        self._tracking.close()


@pytest.mark.parametrize(
    ("stage", "rounds"),
    [
        (Stage.BUILDING, 0),  # only the first project builds
        pytest.param(Stage.RESOLVING, 0, marks=pytest.mark.chaos),
        pytest.param(Stage.PLACING, 0, marks=pytest.mark.chaos),
        pytest.param(Stage.TRAINING, 0, marks=pytest.mark.chaos),
        (Stage.TRAINING, 3),
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
    (path,) = deployment.home.glob("node-*/services/aggregator-*/work/checkpoint/history.jsonl")
    return len(path.read_text().splitlines())
