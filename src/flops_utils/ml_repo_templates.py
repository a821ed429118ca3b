"""What an ML repository's classes look like to FLOps; inherit from these, or provide the same methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class DataManagerTemplate(ABC):
    """Prepares this learner's data. Its constructor usually calls `_prepare_data`."""

    @abstractmethod
    def _prepare_data(self) -> Any:
        """Load the data with `flops_utils.ml_repo_building_blocks`, split it, and preprocess it."""

    @abstractmethod
    def get_data(self) -> tuple[Any, Any]:
        """Return the prepared data, as the repository's own `ModelManager` wants it."""


class ModelManagerTemplate(ABC):
    """Holds the model. Built without data by the aggregator, and once with data by each learner.

    A learner keeps its object over all rounds. Optional methods that FLOps calls when they exist:

    - ``set_training_config(config: dict)`` before each `fit_model`: ``server-round`` and what the strategy
      sends along, such as FedProx's ``proximal-mu``;
    - ``get_input_example()``: some rows as the model takes them, for the signature of the saved model.
    """

    @abstractmethod
    def set_model_data(self) -> None:
        """Get the data from the `DataManager`. Called once, by learners only: never in the constructor."""

    @abstractmethod
    def get_model(self) -> Any:
        """Return the model, an object of the project's ``ml_model_flavor``."""

    @abstractmethod
    def get_model_parameters(self) -> Any:
        """Return the parameters as a list of numpy arrays, always in the same order and shapes."""

    @abstractmethod
    def set_model_parameters(self, parameters: Any) -> None:
        """Take over parameters, as `get_model_parameters` returns them."""

    @abstractmethod
    def fit_model(self) -> int:
        """Train on this learner's training data; return the number of rows trained on."""

    @abstractmethod
    def evaluate_model(self) -> tuple[Any, Any, int]:
        """Evaluate on this learner's held-out data; return loss, accuracy and the number of rows.

        A fourth item, a dictionary of further numbers by name, may follow.
        """
