"""Measures what updates in half precision (`update_precision: half`) do to a model's accuracy.

Run from the root of the repository: ``.venv/bin/python benchmarks/precision.py``, or ``make
bench-precision``. scikit-learn's digits, 8 x 8 pixels, are learned by five learners whose digits differ: each
has two of the ten, and a share of the rest. FedAvg combines what they train, once from updates in full and
once in half precision, from the same beginning and with the same order of the rows. The aggregation is
FLOps' own, in one process.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from harness import Figure, Report, arguments
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from flops.trainer.half_precision import changed, changes_between
from flops.trainer.weighted_mean import WeightedMean
from flops.wire.training import Array

LEARNERS = 5
DIGITS = np.arange(10)
SHARED = 0.2  # of a digit's rows are spread over all learners


class Mlp:
    """A network with a layer of 64."""

    name = "network, 4,810 parameters"

    def __init__(self, seed: int) -> None:
        self.model = MLPClassifier((64,), solver="sgd", learning_rate_init=0.05, random_state=seed)

    def get(self) -> list[Array]:
        """Its parameters."""
        return [*self.model.coefs_, *self.model.intercepts_]

    def set(self, arrays: list[Array]) -> None:
        """Take parameters."""
        cut = len(arrays) // 2
        self.model.coefs_ = [array.astype(np.float64) for array in arrays[:cut]]
        self.model.intercepts_ = [array.astype(np.float64) for array in arrays[cut:]]


class Linear:
    """A logistic regression."""

    name = "logistic regression, 650 parameters"

    def __init__(self, seed: int) -> None:
        self.model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.01, random_state=seed)

    def get(self) -> list[Array]:
        """Its parameters."""
        return [self.model.coef_, self.model.intercept_]

    def set(self, arrays: list[Array]) -> None:
        """Take parameters."""
        self.model.coef_, self.model.intercept_ = (array.astype(np.float64) for array in arrays)


def train(
    kind: type[Mlp] | type[Linear], seed: int, rounds: int, *, is_half: bool
) -> tuple[float, list[Array]]:
    """The accuracy on rows that nobody trained on, after the last round, and the parameters."""
    rows, digits = load_digits(return_X_y=True)
    data = train_test_split(rows / 16, digits, test_size=0.25, random_state=seed)
    training, test, training_digits, test_digits = data
    parts = _parts(training_digits, seed)
    learners = [kind(seed) for _ in range(LEARNERS)]
    for learner in learners:
        learner.model.partial_fit(training[:1], training_digits[:1], classes=DIGITS)
    current = [array.astype(np.float32) for array in learners[0].get()]
    for _ in range(rounds):
        mean = WeightedMean()
        for learner, part in zip(learners, parts, strict=True):
            learner.set(current)
            learner.model.partial_fit(training[part], training_digits[part])
            update = [array.astype(np.float32) for array in learner.get()]
            if is_half:
                update = changed(current, changes_between(current, update))
            mean.add(update, len(part))
        current = mean.result() or current
    learners[0].set(current)
    return float(learners[0].model.score(test, test_digits)), current


def _parts(digits: Array, seed: int) -> list[Array]:
    generator = np.random.default_rng(seed)
    owner = np.where(
        generator.random(len(digits)) < SHARED, generator.integers(LEARNERS, size=len(digits)), digits // 2
    )
    return [np.flatnonzero(owner == number) for number in range(LEARNERS)]


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    rounds, seeds = (3, range(1)) if options.smoke else (60, range(5))
    warnings.simplefilter("ignore", ConvergenceWarning)
    columns = ("model", "rounds", "accuracy, full", "accuracy, half", "largest difference", "of a parameter")
    report = Report("precision", columns)
    for kind in (Linear, Mlp):
        full = [train(kind, seed, rounds, is_half=False) for seed in seeds]
        half = [train(kind, seed, rounds, is_half=True) for seed in seeds]
        pairs = list(zip(full, half, strict=True))
        apart = max(abs(b - a) for (a, _), (b, _) in pairs)
        moved = max(
            float(abs(b - a).max()) for (_, one), (_, other) in pairs for a, b in zip(one, other, strict=True)
        )
        figures: dict[str, Any] = {
            name: Figure.of([accuracy for accuracy, _ in found])
            for name, found in (("full", full), ("half", half))
        }
        texts = [figure.text() for figure in figures.values()]
        report.add(
            [kind.name, str(rounds), *texts, f"{apart:.4f}", f"{moved:.1e}"],
            model=kind.name,
            rounds=rounds,
            accuracies_apart=apart,
            parameters_apart=moved,
            **figures,
        )
    report.print()


if __name__ == "__main__":
    main()
