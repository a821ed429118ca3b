"""The record of experiments, as aggregators write it and the manager ends it; beside `flops.ports`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from flops.core.ids import ProjectId
from flops.core.project import Round, TrainedModel
from flops.core.run_end import RunEnd


class Tracker(Protocol):
    """The record of experiments. Calls may be repeated: the record has no gap and no duplicate."""

    def open_run(
        self, project_id: ProjectId, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> tuple[str, str]:
        """Find or create the project's experiment and its training run; returns their ids."""
        ...

    def log_round(self, run_id: str, record: Round) -> None:
        """Record a round's metrics with the round as step."""
        ...

    def log_model(self, run_id: str, folder: Path, best: Round, model_name: str) -> TrainedModel:
        """Record an MLflow model folder with the best round's numbers, and register it."""
        ...

    def close_run(self, run_id: str, *, is_success: bool) -> None:
        """End the run and those of its learners; one whose project has ended keeps its end."""
        ...

    def end_runs(self, project_id: ProjectId, end: RunEnd) -> None:
        """End all runs of a project for good: none runs on, and none that is opened later does.

        An unknown project is no error.
        """
        ...

    def url_of(self, experiment_id: str, run_id: str) -> str:
        """Where people see the run."""
        ...

    def delete(self, project_id: ProjectId) -> None:
        """Remove the project's experiment; an unknown one is no error."""
        ...
