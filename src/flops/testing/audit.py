"""Looks over what the manager and MLflow recorded of a project: whether it is whole, and agrees."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from flops.cli.api_client import ApiClient
from flops.cli.connection import find_manager
from flops.control.lifetime import ENDPOINT_FILE
from flops.core.project import Project, ProjectEvent, Stage
from flops.settings import ClientSettings
from flops.testing.deployment import Deployment

_PARENT_TAG = "mlflow.parentRunId"  # learners are child runs
_RUN_STATES = {Stage.COMPLETED: "FINISHED", Stage.FAILED: "FAILED", Stage.STOPPED: "KILLED"}


class Tracking:
    """Reads an MLflow server's record, by its own REST API.

    Args:
        url: base URL of the server.
    """

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=f"{url}/api/2.0/mlflow", timeout=30.0, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def runs(self, project_id: str) -> list[dict[str, Any]]:
        """All runs of a project: its training, and a child run per learner."""
        name = {"experiment_name": f"FLOps Project {project_id}"}
        found = self._http.get("/experiments/get-by-name", params=name)
        if found.status_code == httpx.codes.NOT_FOUND:
            return []
        experiment = found.raise_for_status().json()["experiment"]["experiment_id"]
        query = {"experiment_ids": [experiment], "max_results": 100}
        answer = self._http.post("/runs/search", json=query).raise_for_status().json()
        return list(answer.get("runs", []))

    def artifact(self, run: Mapping[str, Any], path: str) -> str:
        """A text that a run has; "" when it has not."""
        query = {"run_uuid": run["info"]["run_id"], "path": path}
        answer = self._http.get(self._http.base_url.copy_with(path="/get-artifact"), params=query)
        return answer.text if answer.is_success else ""

    def steps(self, run: Mapping[str, Any], metric: str) -> list[int]:
        """The steps at which a run has a metric, in order of recording."""
        query = {"run_id": run["info"]["run_id"], "metric_key": metric, "max_results": 10_000}
        answer = self._http.get("/metrics/get-history", params=query).raise_for_status().json()
        return [int(entry.get("step", 0)) for entry in answer.get("metrics", [])]


class Books:
    """What a deployment's manager and MLflow recorded, asked by their own interfaces.

    Args:
        deployment: one that is up.
    """

    def __init__(self, deployment: Deployment) -> None:
        control = deployment.home / "control"
        endpoint = json.loads((control / ENDPOINT_FILE).read_text())
        manager = find_manager(ClientSettings.read({}, home=deployment.home))
        self.api = ApiClient(manager.url, manager.token, authority=manager.authority)
        self.tracking = Tracking(endpoint["tracking_loopback_url"])

    def close(self) -> None:
        """Close the connections."""
        self.api.close()
        self.tracking.close()

    def problems_of(self, project: Project) -> list[str]:
        """What is wrong with an ended project's records; see the function of this name."""
        return problems_of(project, self.api.history(project.id), self.tracking)


def problems_of(project: Project, history: Sequence[ProjectEvent], tracking: Tracking) -> list[str]:
    """What is wrong with an ended project's records, one sentence each; empty when nothing is.

    A run has to be ended as its project, hold each finished round once, and be the only one. A gap or a
    duplicate in the history or in the rounds is a problem, and so is a failure without a reason.
    """
    return [f"{project.id}: {problem}" for problem in _problems(project, history, tracking)]


def _problems(project: Project, history: Sequence[ProjectEvent], tracking: Tracking) -> Iterator[str]:
    if not project.stage.is_final:
        yield f"has not ended: {project.stage}, {project.doing}"
        return
    numbers = [event.seq for event in history]
    if numbers != list(range(1, project.history_length + 1)):
        yield f"the history has the lines {numbers}, expected 1 to {project.history_length}"
    told = [event.data["record"]["number"] for event in history if event.kind == "round_completed"]
    rounds = [record.number for record in project.training.history] if project.training else []
    if told != rounds or rounds != list(range(1, len(rounds) + 1)):
        yield f"the history tells the rounds {told}, the project has {rounds}"
    if project.stage is Stage.FAILED and (project.failure is None or not project.failure.hint):
        yield "it failed without a reason and a hint"
    if project.stage is Stage.COMPLETED:
        yield from _problems_of_completed(project, rounds)
    yield from _problems_of_runs(project, rounds, tracking)


def _problems_of_completed(project: Project, rounds: Sequence[int]) -> Iterator[str]:
    configuration = project.sla.training_configuration
    wanted = configuration.training_cycles if configuration.is_hierarchical else configuration.training_rounds
    if len(rounds) != wanted:
        yield f"it completed after {len(rounds)} of {wanted} rounds"
    if project.model is None or project.training is None:
        yield "it completed without a model"
    elif project.training.history[project.model.round - 1].accuracy != project.model.accuracy:
        yield f"its model's accuracy is not that of round {project.model.round}"


def _problems_of_runs(project: Project, rounds: Sequence[int], tracking: Tracking) -> Iterator[str]:
    every = tracking.runs(project.id)
    runs = [run for run in every if _PARENT_TAG not in {tag["key"] for tag in run["data"].get("tags", [])}]
    if len(runs) > 1 or (rounds and not runs):
        yield f"MLflow has {len(runs)} runs of its training"
    # A training that was completed stays so, whatever became of its project.
    wanted = "FINISHED" if project.model is not None else _RUN_STATES[project.stage]
    wrong = {run["info"]["status"] for run in every} - {wanted}
    if wrong:
        yield f"MLflow has runs that are {', '.join(wrong)}, the project is {project.stage}"
    for run in runs:
        counts = Counter(tracking.steps(run, "accuracy"))
        # The last round of a project that did not complete may have been finished without being told.
        missing = [n for n in rounds if counts[n] == 0] if project.stage is Stage.COMPLETED else []
        repeated = [n for n, count in counts.items() if count > 1]
        if missing or repeated:
            yield f"MLflow's run lacks the rounds {missing} and has more than once {repeated}"
