"""Experiments, rounds and models in MLflow, through its REST API (docs/adr/0003-mlflow-server-process.md)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flops.adapters.mlflow_ends import mark_ended, set_status, status_of_ended, tell_end
from flops.adapters.mlflow_rest import MlflowRest, RefusedError, items, json_number, key_of, now_ms
from flops.adapters.mlflow_series import MlflowRuns, RoundSeries
from flops.adapters.mlflow_shapes import (
    PURGE_TAG,
    digest_of,
    model_name_of,
)
from flops.core.ids import ProjectId
from flops.core.project import Round, TrainedModel
from flops.core.run_end import RunEnd
from flops.errors import ErrorCode, FlopsError

MODEL_ALIAS = "champion"  # of the newest version in the registry
ATTEMPT_TAG = "flops.attempt"  # give it to `open_run` when a training starts from the beginning once more

_TRAINING_TAG = "flops.training"  # on the run of a training: the project's id, and the attempt if any
_PROJECT_TAG = "flops.project_id"
_DIGEST_TAG = "flops.digest"  # of the exported folder
_ROUND_TAG = "flops.round"
_BATCH_ITEMS = 100  # MLflow's limit of one call
_PARAM_CHARACTERS = 6000
_PAGE = 1000


class MlflowTracker:
    """Implements `flops.tracker_port.Tracker`.

    An experiment is a project; it has one run, its training, whose metrics are the aggregated model's by
    round. Up to fifty learners, or clusters with their learners below them, have child runs, so that the GUI
    draws their curves beside each other. What is logged of the learners may lag some seconds behind: it is
    sent together.

    After a restart of the caller, give `log_round` the earlier rounds again: only what is missing is sent.

    Args:
        tracking_uri: ``http://host:port`` of the MLflow server.
        public_uri: the address in links for people; `tracking_uri` when empty.
        timeout_s: longest wait for one answer; a server that is being restarted answers after about 4 s.
        options: of the HTTP client, such as `verify`: how to encrypt.
    """

    def __init__(
        self, tracking_uri: str, *, public_uri: str = "", timeout_s: float = 15.0, **options: Any
    ) -> None:
        self._uri = tracking_uri.rstrip("/")
        self._public_uri = (public_uri or tracking_uri).rstrip("/")
        self._api = MlflowRest(self._uri, timeout_s, **options)
        self._lock = threading.RLock()
        self._runs = MlflowRuns(self._api)
        self._rounds = RoundSeries(self._api, self._runs)

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def open_run(
        self, project_id: ProjectId, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> tuple[str, str]:
        """Find or create the project's experiment and its training run; returns their ids.

        Parameters that the run has already keep their values: MLflow does not change them.

        Raises:
            FlopsError: ``unreachable``, ``timeout``, ``tracking_failed``; so do all methods.
        """
        with self._lock:
            experiment_id = self._experiment(project_id)
            attempt = tags.get(ATTEMPT_TAG, "")
            training = f"{project_id}/{attempt}" if attempt else str(project_id)
            run = self._runs.find_run(experiment_id, _TRAINING_TAG, training)
            if run is None:
                run = self._runs.create_run(
                    experiment_id,
                    "FLOps training",
                    {
                        _TRAINING_TAG: training,
                        _PROJECT_TAG: project_id,
                        "mlflow.source.name": "FLOps",
                        "mlflow.note.content": _note(project_id),
                    },
                )
            run_id = str(run["info"]["run_id"])
            present = {item["key"] for item in run["data"].get("params", [])}
            self._log_params(run_id, {k: v for k, v in params.items() if key_of(k) not in present}, tags)
            if run["info"]["status"] != "RUNNING" and status_of_ended(self._api, experiment_id) is None:
                self._api.call("POST", "runs/update", {"run_id": run_id, "status": "RUNNING"})
            if (ended := status_of_ended(self._api, experiment_id)) is not None:
                set_status(self._api, [self._runs.get(run_id)], ended)
            return experiment_id, run_id

    def log_round(self, run_id: str, record: Round) -> None:
        """Record a round's metrics with the round as step."""
        with self._lock:
            self._rounds.log(run_id, record)

    def log_model(self, run_id: str, folder: Path, best: Round, model_name: str) -> TrainedModel:
        """Record an MLflow model folder with the best round's numbers, and register it.

        Repeated for the same run and round, it records nothing new. Characters that MLflow does not take in
        names become ``_`` in `model_name`.

        Raises:
            FlopsError: ``model_export_failed`` when `folder` is no MLflow model; and as `open_run`.
        """
        if not (folder / "MLmodel").is_file():
            raise FlopsError(ErrorCode.MODEL_EXPORT_FAILED, f"{folder} is not a folder of an MLflow model.")
        model_name = model_name_of(model_name)
        with self._lock:
            self._rounds.flush(run_id)
            run = self._runs.get(run_id)
            digest = digest_of(folder)
            model = self._logged_model(run, digest, best, model_name)
            model_id = str(model["info"]["model_id"])
            if model["info"]["status"] != "LOGGED_MODEL_READY":
                self._upload_model(folder, run_id, model)
                self._api.call(
                    "PATCH",
                    f"logged-models/{model_id}",
                    {"model_id": model_id, "status": "LOGGED_MODEL_READY"},
                )
            outputs = run.get("outputs", {}).get("model_outputs", [])
            if all(output["model_id"] != model_id for output in outputs):
                link = {"model_id": model_id, "step": best.number}
                self._api.call(
                    "POST", "runs/outputs", {"run_id": run_id, "models": [link]}, is_repeatable=False
                )
            self._log_model_numbers(run_id, model, best)
            version = self._register(run_id, model_id, digest, best, model_name)
            return TrainedModel(
                experiment_id=str(run["info"]["experiment_id"]),
                run_id=run_id,
                model_uri=f"models:/{model_id}",
                name=model_name,
                version=version,
                round=best.number,
                accuracy=best.accuracy,
                loss=best.loss,
            )

    def close_run(self, run_id: str, *, is_success: bool) -> None:
        """End the run and those of its learners; one whose project has ended keeps its end."""
        with self._lock:
            self._rounds.flush(run_id)
            run = self._runs.get(run_id)
            experiment_id = run["info"]["experiment_id"]
            status = status_of_ended(self._api, experiment_id) or ("FINISHED" if is_success else "FAILED")
            children = self._runs.below(experiment_id, run_id)
            set_status(self._api, [*children, run], status)
            if (ended := status_of_ended(self._api, experiment_id)) not in {None, status}:
                set_status(
                    self._api, [self._runs.get(r["info"]["run_id"]) for r in (*children, run)], str(ended)
                )
            self._rounds.forget(run_id)

    def end_runs(self, project_id: ProjectId, end: RunEnd) -> None:
        """End all runs of a project for good, and write on its training's run why it ended.

        An unknown project is no error, nor is one whose experiment somebody has deleted.
        """
        with self._lock:
            experiment = self._find_experiment(_experiment_name(project_id))
            if experiment is None or experiment["lifecycle_stage"] == "deleted":
                return
            experiment_id = str(experiment["experiment_id"])
            mark_ended(self._api, experiment_id, end.status)
            runs = self._runs.search_runs(experiment_id, "")
            set_status(self._api, runs, end.status)
            for run in runs:
                if any(tag["key"] == _TRAINING_TAG for tag in run["data"].get("tags", [])):
                    tell_end(self._api, run, end, _note(project_id))

    def url_of(self, experiment_id: str, run_id: str) -> str:
        """Where people see the run; without the last part the GUI opens in its mode for language models."""
        return f"{self._public_uri}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"

    def delete(self, project_id: ProjectId) -> None:
        """Remove the project's experiment and its versions in the registry; an unknown one is no error.

        It is gone from sight at once, and for good within seconds, with its runs and artifacts.
        """
        with self._lock:
            condition = f"tags.`{_PROJECT_TAG}` = '{project_id}'"
            body = {"max_results": _PAGE, "filter": condition, "view_type": "ALL"}
            for experiment in self._api.call("POST", "experiments/search", body).get("experiments", []):
                experiment_id = experiment["experiment_id"]
                if experiment["lifecycle_stage"] == "deleted":
                    if any(tag["key"] == PURGE_TAG for tag in experiment["tags"]):
                        continue
                    # By somebody in the GUI: what is deleted cannot be marked.
                    self._api.call("POST", "experiments/restore", {"experiment_id": experiment_id})
                for run in self._runs.search_runs(experiment_id, condition):
                    self._unregister(run["info"]["run_id"], project_id)
                # A deleted experiment would keep its name taken.
                new_name = f"{experiment['name'].partition(' (deleted')[0]} (deleted {experiment_id})"
                body = {"experiment_id": experiment_id, "new_name": new_name}
                self._api.call("POST", "experiments/update", body)
                mark = {"experiment_id": experiment_id, "key": PURGE_TAG, "value": "true"}
                self._api.call("POST", "experiments/set-experiment-tag", mark)
                self._api.call("POST", "experiments/delete", {"experiment_id": experiment_id})

    # Experiments and runs

    def _experiment(self, project_id: ProjectId) -> str:
        name = _experiment_name(project_id)
        experiment = self._find_experiment(name)
        if experiment is None:
            tags = {
                _PROJECT_TAG: project_id,
                "mlflow.experimentKind": "custom_model_development",
                "mlflow.note.content": f"Federated learning with FLOps, project {project_id}.",
            }
            try:
                body = {"name": name, "tags": items(tags)}
                return str(self._api.call("POST", "experiments/create", body)["experiment_id"])
            except RefusedError as exc:
                experiment = self._find_experiment(name)
                if exc.mlflow_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                    raise
        if experiment["lifecycle_stage"] == "deleted":  # by somebody in the GUI
            self._api.call("POST", "experiments/restore", {"experiment_id": experiment["experiment_id"]})
        return str(experiment["experiment_id"])

    def _find_experiment(self, name: str) -> dict[str, Any] | None:
        answer = self._api.find("experiments/get-by-name", {"experiment_name": name})
        return dict(answer["experiment"]) if answer is not None else None

    def _log_params(self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        values = [{"key": key_of(k), "value": str(v)[:_PARAM_CHARACTERS]} for k, v in params.items()]
        for start in range(0, max(len(values), len(tags)), _BATCH_ITEMS):
            part = slice(start, start + _BATCH_ITEMS)
            body = {"run_id": run_id, "params": values[part], "tags": items(tags)[part]}
            self._api.call("POST", "runs/log-batch", body)

    # Models

    def _logged_model(self, run: Mapping[str, Any], digest: str, best: Round, name: str) -> dict[str, Any]:
        """The run's model of this round, or a new one that is not ready yet.

        The round decides, not the content: a model that is exported once more is the same in other bytes.
        """
        experiment_id, run_id = run["info"]["experiment_id"], run["info"]["run_id"]
        condition = f"source_run_id = '{run_id}' AND tags.`{_ROUND_TAG}` = '{best.number}'"
        body: dict[str, Any] = {"experiment_ids": [experiment_id], "filter": condition, "max_results": 1}
        found = self._api.call("POST", "logged-models/search", body).get("models", [])
        if found:
            return dict(found[0])
        body = {
            "experiment_id": experiment_id,
            "name": name,
            "source_run_id": run_id,
            "params": run["data"].get("params", []),
            "tags": items({_DIGEST_TAG: digest, _ROUND_TAG: str(best.number)}),
        }
        return dict(self._api.call("POST", "logged-models", body, is_repeatable=False)["model"])

    def _upload_model(self, folder: Path, run_id: str, model: Mapping[str, Any]) -> None:
        model_id, root = model["info"]["model_id"], model["info"]["artifact_uri"]
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            content = path.read_bytes()
            if name == "MLmodel":
                description = yaml.safe_load(content)
                description |= {
                    "artifact_path": root,
                    "model_id": model_id,
                    "model_uuid": model_id,
                    "run_id": run_id,
                }
                content = yaml.safe_dump(description, allow_unicode=True).encode()
            self._api.upload(f"{root}/{name}", content)

    def _log_model_numbers(self, run_id: str, model: Mapping[str, Any], best: Round) -> None:
        """Put the best round's numbers on the model, as the run has them, without doubling the run's."""
        model_id = model["info"]["model_id"]
        has = {metric["key"] for metric in model.get("data", {}).get("metrics", [])}
        metrics = []
        for key, value in (("accuracy", best.accuracy), ("loss", best.loss)):
            if value is None or key in has:
                continue
            times = [p["timestamp"] for p in self._runs.history(run_id, key) if int(p["step"]) == best.number]
            metrics.append(
                {
                    "key": key,
                    "value": json_number(value),
                    "timestamp": int(times[0]) if times else now_ms(),
                    "step": best.number,
                    "model_id": model_id,
                }
            )
        if metrics:
            self._api.call("POST", "runs/log-batch", {"run_id": run_id, "metrics": metrics})

    def _register(self, run_id: str, model_id: str, digest: str, best: Round, name: str) -> str:
        try:
            body: dict[str, Any] = {"name": name, "tags": items({"flops": "true"})}
            self._api.call("POST", "registered-models/create", body)
        except RefusedError as exc:
            if exc.mlflow_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"models:/{model_id}"
        same = [v for v in self._versions(run_id) if (v["name"], v["source"]) == (name, source)]
        if same:
            version = same[0]["version"]
        else:
            numbers = {"accuracy": best.accuracy, "loss": best.loss, _ROUND_TAG: best.number}
            body = {
                "name": name,
                "source": source,
                "run_id": run_id,
                "model_id": model_id,
                "tags": items(
                    {_DIGEST_TAG: digest} | {k: str(v) for k, v in numbers.items() if v is not None}
                ),
                "description": f"Best round of the training: {best.number}.",
            }
            answer = self._api.call("POST", "model-versions/create", body, is_repeatable=False)
            version = answer["model_version"]["version"]
        alias = {"name": name, "alias": MODEL_ALIAS, "version": str(version)}
        self._api.call("POST", "registered-models/alias", alias)
        return str(version)

    def _versions(self, run_id: str) -> list[dict[str, Any]]:
        query = {"filter": f"run_id = '{run_id}'", "max_results": str(_PAGE)}
        return list(self._api.call("GET", "model-versions/search", query).get("model_versions", []))

    def _unregister(self, run_id: str, project_id: ProjectId) -> None:
        """Remove a run's versions, and the model if it is the project's own.

        One that several projects may share stays, even when it is empty: another one may be registering a
        version right now, and numbers of versions are not used twice.
        """
        versions = self._versions(run_id)
        for version in versions:
            body = {"name": version["name"], "version": str(version["version"])}
            self._api.call("DELETE", "model-versions/delete", body)
        for name in {version["name"] for version in versions if project_id in version["name"]}:
            answer = self._api.find("registered-models/get", {"name": name})
            model = answer["registered_model"] if answer is not None else {}
            is_ours = any(tag["key"] == "flops" for tag in model.get("tags", []))
            if is_ours and not model.get("latest_versions"):
                self._api.call("DELETE", "registered-models/delete", {"name": name})


def _experiment_name(project_id: ProjectId) -> str:
    return f"FLOps Project {project_id}"


def _note(project_id: ProjectId) -> str:
    return f"Federated training of project {project_id}. Steps are rounds. Learners are child runs."
