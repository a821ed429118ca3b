"""Experiments in memory: for tests, and for what they show about the port's contract."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flops.core.ids import ProjectId
from flops.core.project import Round, TrainedModel
from flops.core.run_end import RunEnd
from flops.errors import ErrorCode, FlopsError


@dataclass
class MemoryRun:
    """A run as it was recorded."""

    experiment_id: str
    run_id: str
    params: dict[str, str]
    tags: dict[str, str]
    rounds: dict[int, Round] = field(default_factory=dict)
    models: dict[int, TrainedModel] = field(default_factory=dict)  # by round
    status: str = "RUNNING"


class MemoryTracker:
    """Implements `flops.tracker_port.Tracker`.

    `problem` is raised by every call while it is set: a tracking server that is away.
    """

    def __init__(self) -> None:
        self.runs: dict[ProjectId, MemoryRun] = {}
        self.ends: dict[ProjectId, RunEnd] = {}
        self.problem: FlopsError | None = None
        self._lock = threading.Lock()
        self._versions: dict[str, int] = {}

    def open_run(
        self, project_id: ProjectId, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> tuple[str, str]:
        """Find or create the project's run; returns the ids of experiment and run."""
        with self._lock:
            self._check()
            run = self.runs.get(project_id)
            if run is None:
                run = MemoryRun(f"experiment-{project_id}", f"run-{project_id}", {}, {})
                self.runs[project_id] = run
            run.params = {**params, **run.params}
            run.tags.update(tags)
            run.status = self.ends[project_id].status if project_id in self.ends else "RUNNING"
            return run.experiment_id, run.run_id

    def log_round(self, run_id: str, record: Round) -> None:
        """Record a round, once."""
        with self._lock:
            self._run(run_id).rounds.setdefault(record.number, record)

    def log_model(self, run_id: str, folder: Path, best: Round, model_name: str) -> TrainedModel:
        """Record a model with the best round's numbers, once a round."""
        with self._lock:
            run = self._run(run_id)
            if not (folder / "MLmodel").is_file():
                raise FlopsError(
                    ErrorCode.MODEL_EXPORT_FAILED, f"{folder} is not a folder of an MLflow model."
                )
            if best.number not in run.models:
                version = self._versions[model_name] = self._versions.get(model_name, 0) + 1
                run.models[best.number] = TrainedModel(
                    experiment_id=run.experiment_id,
                    run_id=run_id,
                    model_uri=f"models:/{model_name}/{version}",
                    name=model_name,
                    version=str(version),
                    round=best.number,
                    accuracy=best.accuracy,
                    loss=best.loss,
                )
            return run.models[best.number]

    def close_run(self, run_id: str, *, is_success: bool) -> None:
        """End the run."""
        with self._lock:
            run = self._run(run_id)
            if not any(self.runs[project_id] is run for project_id in self.ends):
                run.status = "FINISHED" if is_success else "FAILED"

    def end_runs(self, project_id: ProjectId, end: RunEnd) -> None:
        """End the project's run for good."""
        with self._lock:
            self._check()
            run = self.runs.get(project_id)
            if run is not None:
                self.ends[project_id] = end
                run.status = end.status
                run.tags.update(end.tags)

    def url_of(self, experiment_id: str, run_id: str) -> str:
        """A link that leads nowhere."""
        return f"memory://{experiment_id}/{run_id}"

    def delete(self, project_id: ProjectId) -> None:
        """Forget the project's experiment."""
        with self._lock:
            self._check()
            self.runs.pop(project_id, None)
            self.ends.pop(project_id, None)

    def _check(self) -> None:
        if self.problem is not None:
            raise self.problem

    def _run(self, run_id: str) -> MemoryRun:
        self._check()
        for run in self.runs.values():
            if run.run_id == run_id:
                return run
        raise FlopsError(ErrorCode.TRACKING_FAILED, f"There is no run {run_id!r}.")
