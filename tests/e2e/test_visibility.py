"""What users see of a project while it happens: failures, learners, output, restarts of what they look at."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Self

import pytest

from flops.core.learner_states import LearnerStanding, LearnerState, learner_standings
from flops.errors import CATALOGUE, ErrorCode
from flops.testing.audit import Books
from flops.testing.chaos import Role, kill, processes_of
from flops.testing.deployment import Deployment, commit_all
from flops.testing.example import begin_fit_with, example_deployment, make_example, sla_file, submit
from flops.wire.rest import NodeList, ServiceList

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

    def events(self) -> list[str]:
        """The events that it told, without its notes of a manager that is away and back."""
        lines = re.findall(r"^[0-9]{2}:[0-9]{2}:[0-9]{2}  (.*)$", self.text, re.MULTILINE)
        notes = ("waiting for the manager.", "The manager answers again.")
        return [line for line in lines if not line.endswith(notes)]

    def output_of(self, service: str) -> list[str]:
        """The output of a service that it printed, without its titles and notes."""
        lines, is_own = [], False
        for line in self.text.splitlines():
            if re.match("── learner-[^ ]+ on ", line):
                is_own = line.startswith(f"── {service} on ")
            elif is_own and (not line.startswith("── ") or "started again" in line):
                lines.append(line)
        return lines

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


class Learners:
    """Where the learners of a project stand, as `flops project show` says it."""

    def __init__(self, deployment: Deployment, books: Books, project_id: str) -> None:
        self._deployment = deployment
        self._api = books.api
        self._project_id = project_id

    def by_state(self) -> dict[LearnerState, LearnerStanding]:
        project = self._api.project(self._project_id)
        names = {node.id: node.name for node in self._api.get("/nodes", NodeList).nodes}
        services = [
            service
            for service in self._api.get("/services", ServiceList).services
            if service.spec.project_id == project.id
        ]
        found = learner_standings(project, services, self._api.history(project.id), names)
        return {one.state: one for one in found}

    def wait_for(self, *states: LearnerState) -> LearnerStanding:
        """Wait until one of them is in one of these states."""
        found: list[LearnerStanding] = []

        def is_there() -> bool:
            found.extend(one for state, one in self.by_state().items() if state in states)
            return bool(found)

        self._deployment.wait_for(is_there, f"a learner that is {' or '.join(states)}", PATIENCE_S)
        return found[0]

    def wait_for_all(self, state: LearnerState) -> None:
        self._deployment.wait_for(lambda: set(self.by_state()) == {state}, f"all are {state}", PATIENCE_S)


def kill_until_seen(deployment: Deployment, learners: Learners) -> LearnerStanding:
    """Kill a learner until the pause before its restart is seen; each pause is longer than the last."""
    victim = processes_of(deployment, Role.LEARNER)[0].service_id
    seen: list[LearnerStanding] = []

    def is_seen() -> bool:
        kill([found for found in processes_of(deployment, Role.LEARNER) if found.service_id == victim])
        seen.extend(one for state, one in learners.by_state().items() if state is LearnerState.RESTARTING)
        return bool(seen)

    deployment.wait_for(is_seen, "the pause before a restart")
    assert seen[0].service == victim
    return seen[0]


def test_learners_and_a_killed_control_plane_while_a_project_is_watched(
    deployment: Deployment, books: Books
) -> None:
    repository = make_example(deployment, "slow")
    begin_fit_with(repository, "import time; time.sleep(0.3); print('trained at', time.time(), flush=True)")
    commit_all(repository, "Take time")
    rounds = {"training_rounds": 400, "min_fit_clients": 1, "min_evaluate_clients": 1}
    project_id = submit(deployment, sla_file(deployment, "slow", "slow", training_configuration=rounds))
    learners = Learners(deployment, books, project_id)
    with (
        Watcher(deployment, "project", "watch", project_id) as watcher,
        Watcher(deployment, "project", "logs", project_id, "--follow", "--service", "learner") as follower,
    ):
        assert learners.wait_for(LearnerState.WAITING, LearnerState.LOADING).doing
        learners.wait_for_all(LearnerState.TRAINING)
        restarting = kill_until_seen(deployment, learners)
        assert restarting.doing == "Waits for its node to start it again."
        assert "SIGKILL" in restarting.reason
        learners.wait_for_all(LearnerState.TRAINING)

        kill(processes_of(deployment, Role.CONTROL_PLANE))
        deployment.wait_for(lambda: "waiting for the manager" in watcher.text, "the gap")
        deployment.up()
        deployment.wait_for(lambda: "The manager answers again." in watcher.text, "the return")

        kill([found for found in processes_of(deployment, Role.NODE) if found.node == "node-2"])
        lost = learners.wait_for(LearnerState.LOST)
        assert lost.doing == "Waits for its node, which is gone."
        deployment.start_node("node-2")
        learners.wait_for_all(LearnerState.TRAINING)
        deployment.flops("project", "stop", project_id)
        assert watcher.wait() == CATALOGUE[ErrorCode.CONFLICT].exit_code
        assert follower.wait() == 0, follower.text
    learners.wait_for_all(LearnerState.ENDED)
    told = [event.message.splitlines()[0] for event in books.api.history(project_id)]
    assert watcher.events() == told
    for log in deployment.ask("project", "logs", project_id, "--service", "learner"):
        assert follower.output_of(log["service_id"]) == log["text"].splitlines()
        restart = f"── started again (attempt 2): {restarting.service} was ended by SIGKILL."
        assert (restart in log["text"]) == (log["service_id"] == restarting.service)
