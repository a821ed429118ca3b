"""Logistic regression on digits. One call of `fit_model` is two steps of the solver."""

import warnings
from typing import Any

import numpy as np
from data_manager import DataManager
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from flops_utils.ml_repo_templates import ModelManagerTemplate

DIGITS, PIXELS = 10, 28 * 28


class ModelManager(ModelManagerTemplate):
    def __init__(self) -> None:
        # A warm start goes on from the parameters that were set.
        self.model = LogisticRegression(max_iter=2, warm_start=True)
        self.model.classes_ = np.arange(DIGITS)
        self.model.coef_ = np.zeros((DIGITS, PIXELS))
        self.model.intercept_ = np.zeros(DIGITS)

    def set_model_data(self) -> None:
        (self.x_train, self.y_train), (self.x_test, self.y_test) = DataManager().get_data()

    def get_model(self) -> Any:
        return self.model

    def get_model_parameters(self) -> Any:
        return [self.model.coef_, self.model.intercept_]

    def set_model_parameters(self, parameters: Any) -> None:
        self.model.coef_, self.model.intercept_ = parameters

    def fit_model(self) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # two steps do not converge, on purpose
            self.model.fit(self.x_train, self.y_train)
        return len(self.x_train)

    def evaluate_model(self) -> tuple[Any, Any, int]:
        probabilities = self.model.predict_proba(self.x_test)
        loss = log_loss(self.y_test, probabilities, labels=self.model.classes_)
        accuracy = np.mean(self.model.classes_[probabilities.argmax(axis=1)] == self.y_test)
        return loss, accuracy, len(self.x_test)
