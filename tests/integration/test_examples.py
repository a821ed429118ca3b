"""The example repositories learn, and become models that predict."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flops.mockdata
from flops.testing.training_stage import AGGREGATOR, TrainingStage

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DIGITS = Path(flops.mockdata.__path__[0]) / "datasets"


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[TrainingStage]:
    stage = TrainingStage(tmp_path)
    stage.model_python = sys.executable
    yield stage
    stage.close()


def train(stage: TrainingStage, example: str, tag: str, rounds: int) -> dict[str, float]:
    """Train with two learners; returns the model as it was handed over."""
    config = stage.config(rounds=rounds)
    training = stage.train_in_thread(stage.aggregator_context(config, EXAMPLES / example), join_patience_s=50)
    learners = [stage.start_learner(number, EXAMPLES / example, data_tags=(tag,)) for number in range(2)]
    training.result(58)
    assert [learner.wait(10) for learner in learners] == [0, 0]
    return dict(stage.events(AGGREGATOR, "training_completed")[0]["model"])


def saved_model(stage: TrainingStage, best: int) -> object:
    import mlflow.sklearn

    return mlflow.sklearn.load_model(str(stage.root / AGGREGATOR / f"model-{best}"))


@pytest.mark.filterwarnings("ignore")  # MLflow's and scikit-learn's own, when a model is loaded
def test_digits_reach_an_accuracy_of_four_fifths_after_three_rounds(stage: TrainingStage) -> None:
    (file,) = DIGITS.glob("mnist*.parquet")
    stage.push("mnist", pq.read_table(file))
    model = train(stage, "mnist_sklearn", "mnist", 3)
    assert model["accuracy"] >= 0.80
    predictions = saved_model(stage, int(model["round"])).predict(np.zeros((2, 784)))  # type: ignore[attr-defined]
    assert predictions.shape == (2,)


@pytest.mark.filterwarnings("ignore")
def test_a_table_is_learned_without_datasets(stage: TrainingStage) -> None:
    from sklearn.datasets import load_breast_cancer

    raw = load_breast_cancer()
    columns = {name: raw.data[:, index] for index, name in enumerate(raw.feature_names)}
    stage.push("breast_cancer", pa.table({**columns, "target": raw.target}))
    model = train(stage, "breast_cancer_sklearn", "breast_cancer", 10)
    assert model["accuracy"] >= 0.85
    predictions = saved_model(stage, int(model["round"])).predict(raw.data)  # type: ignore[attr-defined]
    assert np.mean(predictions == raw.target) >= 0.8
