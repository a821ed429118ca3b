"""A tracker in memory that survives kills of its process, as a tracking server does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter

from flops.adapters.memory_tracker import MemoryRun, MemoryTracker
from flops.core.ids import ProjectId
from flops.core.project import Round, TrainedModel
from flops.durable_file import write_durably

_RUNS = TypeAdapter(dict[ProjectId, MemoryRun])


class KeptTracker(MemoryTracker):
    """Keeps its runs in a file.

    Args:
        path: the file; what it has is gone on from.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.runs = kept_runs(path)
        for run in self.runs.values():
            for model in run.models.values():
                self._versions[model.name] = max(self._versions.get(model.name, 0), int(model.version))

    def open_run(
        self, project_id: ProjectId, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> tuple[str, str]:
        """Find or create the project's run."""
        opened = super().open_run(project_id, params, tags)
        self._keep()
        return opened

    def log_round(self, run_id: str, record: Round) -> None:
        """Record a round, once."""
        super().log_round(run_id, record)
        self._keep()

    def log_model(self, run_id: str, folder: Path, best: Round, model_name: str) -> TrainedModel:
        """Record a model, once a round."""
        model = super().log_model(run_id, folder, best, model_name)
        self._keep()
        return model

    def close_run(self, run_id: str, *, is_success: bool) -> None:
        """End the run."""
        super().close_run(run_id, is_success=is_success)
        self._keep()

    def _keep(self) -> None:
        with self._lock:
            write_durably(self._path, _RUNS.dump_json(self.runs).decode())


def kept_runs(path: Path) -> dict[ProjectId, MemoryRun]:
    """The runs in a file of a `KeptTracker`; none when it is not there."""
    return _RUNS.validate_json(path.read_bytes()) if path.exists() else {}
