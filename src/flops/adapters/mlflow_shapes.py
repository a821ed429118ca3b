"""How rounds and models look in MLflow. Pure, but for reading a model's folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from flops.adapters.mlflow_rest import key_of
from flops.core.project import Participant, Round

TRAINING_MARK = "round_duration_s"  # metrics that every round of a run has: they tell which rounds are there
LEARNER_MARK = "rows"
CLUSTER_MARK = f"cluster_{TRAINING_MARK}"  # of a cluster's own rounds, counted over all cycles
PURGE_TAG = "flops.purge"  # on a deleted experiment: it is not to be restored, and removed for good


def metrics_of(record: Round) -> dict[str, float]:
    """The metrics of a round's global model."""
    parts = record.participants
    metrics = {key_of(key): value for key, value in record.metrics.items()}
    metrics |= {
        "learners": len(parts),
        "learners_left_out": len(record.left_out),
        "rows": sum(part.rows for part in parts),
        TRAINING_MARK: record.duration_s,
        "slowest_fit_s": max((part.fit_s for part in parts), default=0.0),
        "slowest_evaluate_s": max((part.evaluate_s for part in parts), default=0.0),
    }
    return metrics | _known({"accuracy": record.accuracy, "loss": record.loss})


def metrics_of_part(part: Participant) -> dict[str, float]:
    """The metrics of a learner in a round."""
    metrics = {LEARNER_MARK: float(part.rows), "fit_s": part.fit_s, "evaluate_s": part.evaluate_s}
    return metrics | _known({"accuracy": part.accuracy, "loss": part.loss})


def metrics_in_cluster(record: Round) -> dict[str, float]:
    """The metrics of a cluster's own model in one of its rounds, in the run that has its part in cycles."""
    return {f"cluster_{key}": value for key, value in metrics_of(record).items()}


def _known(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if value is not None}


def model_name_of(name: str) -> str:
    """A name as MLflow takes it for models: without slash, colon, dot, percent sign and quotes."""
    return re.sub(r"[/:.%\"'`]", "_", name).strip() or "model"


def digest_of(folder: Path) -> str:
    """A digest of a folder's names and contents."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()
