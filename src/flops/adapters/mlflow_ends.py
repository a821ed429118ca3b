"""How runs end in MLflow, whoever ends them: the aggregator, or the manager when the project has ended.

The manager marks the experiment before it looks for runs, and an aggregator looks for the mark after it has
opened or ended one. So none runs on after its project, in whatever order both come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flops.adapters.mlflow_rest import MlflowRest, items, now_ms
from flops.core.run_end import RunEnd

_ENDED_TAG = "flops.ended"  # on the experiment of an ended project: the status of all its runs
_NOTE = "mlflow.note.content"
_MOST_TAGS = 100


def mark_ended(api: MlflowRest, experiment_id: str, status: str) -> None:
    """Have no run of an experiment go on from now on, also none that is opened later."""
    body = {"experiment_id": experiment_id, "key": _ENDED_TAG, "value": status}
    api.call("POST", "experiments/set-experiment-tag", body)


def status_of_ended(api: MlflowRest, experiment_id: str) -> str | None:
    """What the runs of an experiment have ended as; None while its project goes on."""
    experiment = api.call("GET", "experiments/get", {"experiment_id": experiment_id})["experiment"]
    return next((str(t["value"]) for t in experiment.get("tags", []) if t["key"] == _ENDED_TAG), None)


def set_status(api: MlflowRest, runs: Iterable[Mapping[str, Any]], status: str) -> None:
    """Give runs a status; one that had ended before keeps the time of its end."""
    for info in (run["info"] for run in runs):
        if info["status"] == status:
            continue
        body = {"run_id": info["run_id"], "status": status}
        if info["status"] == "RUNNING":
            body["end_time"] = now_ms()
        api.call("POST", "runs/update", body)


def tell_end(api: MlflowRest, run: Mapping[str, Any], end: RunEnd, note: str) -> None:
    """Write on a training's run why it ended: tags, its description, and the failure as an artifact."""
    tags = items({_NOTE: f"{note}\n\n{end.summary}", **end.tags})[:_MOST_TAGS]
    api.call("POST", "runs/log-batch", {"run_id": run["info"]["run_id"], "tags": tags})
    if end.failure:
        content = end.failure.encode(errors="replace")
        api.upload(f"{run['info']['artifact_uri']}/failure.txt", content, "text/plain")
