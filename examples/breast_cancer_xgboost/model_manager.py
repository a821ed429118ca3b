"""Boosted trees. One call of `fit_model` grows two more on top of those that were set."""

from typing import Any

import numpy as np
import xgboost
from data_manager import DataManager

from flops_utils.ml_repo_templates import ModelManagerTemplate

FEATURES, TREES = 30, 2
SETTINGS = {
    "objective": "binary:logistic",
    "base_score": 0.5,  # where all learners begin; XGBoost would take the mean of each one's labels
    "max_depth": 3,
    "eta": 0.5,
    "nthread": 1,
}


class ModelManager(ModelManagerTemplate):
    def __init__(self) -> None:
        nothing = xgboost.DMatrix(np.zeros((1, FEATURES)), label=[0])
        self.booster = xgboost.train(SETTINGS, nothing, num_boost_round=0)

    def set_model_data(self) -> None:
        (x_train, y_train), (x_test, self.y_test) = DataManager().get_data()
        self.train, self.test = xgboost.DMatrix(x_train, label=y_train), xgboost.DMatrix(x_test)

    def get_model(self) -> Any:
        return self.booster

    def get_input_example(self) -> Any:
        return np.ones((1, FEATURES))

    def get_model_parameters(self) -> Any:
        return [np.frombuffer(self.booster.save_raw("json"), np.uint8)]

    def set_model_parameters(self, parameters: Any) -> None:
        (model,) = parameters
        self.booster = xgboost.Booster(SETTINGS, model_file=bytearray(model.tobytes()))

    def fit_model(self) -> int:
        self.booster = xgboost.train(SETTINGS, self.train, num_boost_round=TREES, xgb_model=self.booster)
        return int(self.train.num_row())

    def evaluate_model(self) -> tuple[Any, Any, int]:
        probabilities = np.clip(self.booster.predict(self.test), 1e-7, 1 - 1e-7)
        likelihoods = np.where(self.y_test == 1, probabilities, 1 - probabilities)
        return -np.log(likelihoods).mean(), np.mean(likelihoods > 0.5), len(self.y_test)
