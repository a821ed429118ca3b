"""Rounds in MLflow: of a training, its learners, and its clusters with theirs, each series without gaps.

Runs form the tree that people unfold: the training, below it its learners or clusters, below a cluster its
learners. A cluster's own rounds stand in its run, beside its part in the cycles.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flops.adapters.mlflow_rest import MlflowRest, items, json_number, now_ms
from flops.adapters.mlflow_shapes import (
    CLUSTER_MARK,
    LEARNER_MARK,
    TRAINING_MARK,
    metrics_in_cluster,
    metrics_of,
    metrics_of_part,
)
from flops.core.project import Participant, Round
from flops.errors import FlopsError

LEARNER_RUNS_MOST = 50  # above it a table per round, because a list of so many runs is unreadable

_LEARNER_TAG = "flops.learner"  # on a learner's or cluster's run: the service id
_CLUSTER_TAG = "flops.cluster"  # on a cluster's run: its name
_PARENT_TAG = "mlflow.parentRunId"
_FLUSH_AFTER_S = 2.0
_BATCH_METRICS = 1000  # MLflow's limit of one call
_PAGE = 1000


class MlflowRuns:
    """Finds, makes and reads runs."""

    def __init__(self, api: MlflowRest) -> None:
        self._api = api

    def search_runs(self, experiment_id: str, condition: str) -> list[dict[str, Any]]:
        """Runs of an experiment that meet a condition; all when it is empty."""
        body = {"experiment_ids": [experiment_id], "filter": condition, "max_results": _PAGE}
        return list(self._api.call("POST", "runs/search", body).get("runs", []))

    def find_run(self, experiment_id: str, tag: str, value: str) -> dict[str, Any] | None:
        """The first run with a tag."""
        runs = self.search_runs(experiment_id, f"tags.`{tag}` = '{value}'")
        return min(runs, key=lambda run: int(run["info"]["start_time"])) if runs else None

    def create_run(self, experiment_id: str, name: str, tags: Mapping[str, str]) -> dict[str, Any]:
        """Make a run."""
        body = {
            "experiment_id": experiment_id,
            "run_name": name,
            "start_time": now_ms(),
            "tags": items(tags),
        }
        return dict(self._api.call("POST", "runs/create", body, is_repeatable=False)["run"])

    def get(self, run_id: str) -> dict[str, Any]:
        """A run."""
        return dict(self._api.call("GET", "runs/get", {"run_id": run_id})["run"])

    def history(self, run_id: str, key: str) -> list[dict[str, Any]]:
        """All points of a run's metric."""
        points: list[dict[str, Any]] = []
        query = {"run_id": run_id, "metric_key": key, "max_results": "25000"}
        while True:
            answer = self._api.call("GET", "metrics/get-history", query)
            points += answer.get("metrics", [])
            if not answer.get("next_page_token"):
                return points
            query["page_token"] = answer["next_page_token"]

    def below(self, experiment_id: str, run_id: str) -> list[dict[str, Any]]:
        """All runs below one."""
        children = self.search_runs(experiment_id, f"tags.`{_PARENT_TAG}` = '{run_id}'")
        clusters = [
            run for run in children if any(tag["key"] == _CLUSTER_TAG for tag in run["data"].get("tags", []))
        ]
        inner = [run for one in clusters for run in self.below(experiment_id, one["info"]["run_id"])]
        return [*inner, *children]


@dataclass
class _Series:
    """A run that gets metrics by round, and the rounds it has."""

    run_id: str
    mark: str
    steps: set[int] = field(default_factory=set)


class RoundSeries:
    """Sends rounds; what is known of learners is sent together, some seconds later.

    Args:
        api: the server.
        runs: its runs.
    """

    def __init__(self, api: MlflowRest, runs: MlflowRuns) -> None:
        self._api = api
        self._runs = runs
        self._series: dict[str, _Series] = {}
        self._children: dict[str, dict[str, _Series]] = {}  # by training run, by service id
        self._unsent: dict[str, dict[int, Round]] = {}  # by training run, by round
        self._flushed_at: dict[str, float] = {}

    def log(self, run_id: str, record: Round) -> None:
        """Send a training's round, if its run lacks it."""
        series = self._series.get(run_id)
        if series is None:
            series = self._series[run_id] = self._read_series(run_id, TRAINING_MARK)
        self._log_steps(series, {record.number: metrics_of(record)})
        self._unsent.setdefault(run_id, {})[record.number] = record
        if time.monotonic() - self._flushed_at.get(run_id, 0.0) > _FLUSH_AFTER_S:
            self.flush(run_id)

    def flush(self, run_id: str) -> None:
        """Send what is known of a training's learners and not yet sent."""
        unsent = self._unsent.get(run_id, {})
        if not unsent:
            return
        self._log_parts(run_id, run_id, list(unsent.values()))
        unsent.clear()
        self._flushed_at[run_id] = time.monotonic()

    def forget(self, run_id: str) -> None:
        """Free what is remembered of an ended training's run."""
        for cache in (self._series, self._children, self._unsent, self._flushed_at):
            cache.pop(run_id, None)

    def _log_parts(self, training: str, parent: str, records: Iterable[Round]) -> None:
        """Send the parts that learners, or clusters with their own rounds and learners, had in rounds."""
        by_learner: dict[str, dict[int, Participant]] = {}
        for record in records:
            if len(record.participants) > LEARNER_RUNS_MOST:
                self._upload_table(parent, record)
                continue
            for part in record.participants:
                by_learner.setdefault(part.learner, {})[record.number] = part
        for parts in by_learner.values():
            series = self._child_series(training, parent, next(iter(parts.values())))
            self._log_steps(series, {number: metrics_of_part(part) for number, part in parts.items()})
            own = {record.number: record for part in parts.values() for record in part.rounds}
            if own:
                inner = self._cluster_series(training, series.run_id)
                self._log_steps(inner, {number: metrics_in_cluster(own[number]) for number in own})
                self._log_parts(training, series.run_id, own.values())

    def _child_series(self, training: str, parent: str, part: Participant) -> _Series:
        children = self._children.setdefault(training, {})
        if part.learner in children:
            return children[part.learner]
        experiment_id = self._runs.get(parent)["info"]["experiment_id"]
        child = self._runs.find_run(experiment_id, _LEARNER_TAG, part.learner)
        if child is None:
            tags = {_PARENT_TAG: parent, _LEARNER_TAG: part.learner, "flops.node": part.node}
            if part.cluster:
                tags[_CLUSTER_TAG] = part.cluster
            name = f"cluster {part.cluster}" if part.cluster else f"{part.node} · {part.learner}"
            child = self._runs.create_run(experiment_id, name, tags)
            series = _Series(str(child["info"]["run_id"]), LEARNER_MARK)
        else:
            series = self._read_series(str(child["info"]["run_id"]), LEARNER_MARK)
        children[part.learner] = series
        return series

    def _cluster_series(self, training: str, run_id: str) -> _Series:
        children = self._children.setdefault(training, {})
        key = f"rounds of {run_id}"
        if key not in children:
            children[key] = self._read_series(run_id, CLUSTER_MARK)
        return children[key]

    def _read_series(self, run_id: str, mark: str) -> _Series:
        return _Series(run_id, mark, {int(point["step"]) for point in self._runs.history(run_id, mark)})

    def _log_steps(self, series: _Series, rounds: Mapping[int, Mapping[str, float]]) -> None:
        """Send the rounds that the run lacks, as many in one call as MLflow takes.

        A call that is repeated at once does no harm: MLflow drops equal values of the same time.
        """
        sent_at_ms = now_ms()
        batch: list[dict[str, Any]] = []
        steps: set[int] = set()
        missing = {number: rounds[number] for number in sorted(rounds) if number not in series.steps}
        for number, metrics in missing.items():
            if len(batch) + len(metrics) > _BATCH_METRICS:
                self._send(series, batch, steps)
                batch, steps = [], set()
            batch += [
                {"key": key, "value": json_number(value), "timestamp": sent_at_ms, "step": number}
                for key, value in metrics.items()
            ][:_BATCH_METRICS]
            steps.add(number)
        if batch:
            self._send(series, batch, steps)

    def _send(self, series: _Series, batch: Sequence[Mapping[str, Any]], steps: set[int]) -> None:
        try:
            self._api.call("POST", "runs/log-batch", {"run_id": series.run_id, "metrics": batch})
        except FlopsError:
            # Whether it arrived is not known: what the run has is read again before the next call.
            self._series.pop(series.run_id, None)
            self._children = {
                parent: {k: s for k, s in children.items() if s is not series}
                for parent, children in self._children.items()
            }
            raise
        series.steps |= steps

    def _upload_table(self, run_id: str, record: Round) -> None:
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(("node", "learner", "accuracy", "loss", "rows", "fit_s", "evaluate_s"))
        for part in record.participants:
            numbers = (part.accuracy, part.loss, part.rows, part.fit_s, part.evaluate_s)
            writer.writerow((part.node, part.learner, *numbers))
        root = self._runs.get(run_id)["info"]["artifact_uri"]
        self._api.upload(
            f"{root}/learners/round-{record.number:05}.csv", table.getvalue().encode(), "text/csv"
        )
