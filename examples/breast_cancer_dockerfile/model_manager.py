"""A logistic regression that goes on from the parameters it is given."""

from typing import Any

import numpy as np
from data_manager import DataManager
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from flops_utils.ml_repo_templates import ModelManagerTemplate

COLUMNS, ITERATIONS = 30, 100


class ModelManager(ModelManagerTemplate):
    def __init__(self) -> None:
        self.model = LogisticRegression(warm_start=True, max_iter=ITERATIONS)
        self.model.classes_ = np.array([0, 1])
        self.set_model_parameters([np.zeros((1, COLUMNS)), np.zeros(1)])

    def set_model_data(self) -> None:
        self.training, self.held_out = DataManager().get_data()

    def get_model(self) -> Any:
        return self.model

    def get_model_parameters(self) -> Any:
        return [self.model.coef_, self.model.intercept_]

    def set_model_parameters(self, parameters: Any) -> None:
        self.model.coef_, self.model.intercept_ = parameters

    def fit_model(self) -> int:
        x, y = self.training
        self.model.fit(x, y)
        return len(y)

    def evaluate_model(self) -> tuple[Any, Any, int]:
        x, y = self.held_out
        return log_loss(y, self.model.predict_proba(x), labels=[0, 1]), self.model.score(x, y), len(y)
