"""Reading back from MLflow what a tracker recorded, by MLflow's own client."""

from __future__ import annotations

from mlflow import MlflowClient
from mlflow.entities import Run

from flops.testing.contracts.tracker import RecordedRun


def read_run(tracking_uri: str, run_id: str) -> RecordedRun:
    """Read a run with its learners and models."""
    client = MlflowClient(tracking_uri)
    run = client.get_run(run_id)
    learners = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'", max_results=1000
    )
    models = []
    for output in run.outputs.model_outputs if run.outputs else []:
        model = client.get_logged_model(output.model_id)
        numbers = {metric.key: metric.value for metric in model.metrics or []}
        models.append((output.step, numbers.get("accuracy"), numbers.get("loss")))
    return RecordedRun(
        params=run.data.params,
        tags=run.data.tags,
        status=run.info.status,
        accuracy=_history(client, run, "accuracy"),
        loss=_history(client, run, "loss"),
        learner_accuracy={
            learner.data.tags["flops.learner"]: _history(client, learner, "accuracy") for learner in learners
        },
        models=models,
    )


def _history(client: MlflowClient, run: Run, key: str) -> list[tuple[int, float]]:
    points = client.get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)
