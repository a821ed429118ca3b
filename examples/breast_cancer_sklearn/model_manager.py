"""A linear classifier trained by gradient descent, with a fixed scaling of the features inside the model."""

from typing import Any

import numpy as np
from data_manager import DataManager
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from flops_utils.ml_repo_templates import ModelManagerTemplate

FEATURES, EPOCHS = 30, 5
CLASSES = np.array([0, 1])


class ModelManager(ModelManagerTemplate):
    def __init__(self) -> None:
        self.classifier = SGDClassifier(loss="log_loss", random_state=0)
        self.classifier.classes_ = CLASSES
        self.classifier.coef_ = np.zeros((1, FEATURES))
        self.classifier.intercept_ = np.zeros(1)
        # Features differ in size by a factor of a million; a logarithm needs no statistics of anyone's data.
        self.model = make_pipeline(FunctionTransformer(np.log1p), self.classifier)

    def set_model_data(self) -> None:
        (self.x_train, self.y_train), (self.x_test, self.y_test) = DataManager().get_data()

    def get_model(self) -> Any:
        return self.model

    def get_input_example(self) -> Any:
        return np.ones((1, FEATURES))

    def get_model_parameters(self) -> Any:
        return [self.classifier.coef_, self.classifier.intercept_]

    def set_model_parameters(self, parameters: Any) -> None:
        self.classifier.coef_, self.classifier.intercept_ = parameters

    def fit_model(self) -> int:
        features = np.log1p(self.x_train)
        for _ in range(EPOCHS):
            self.classifier.partial_fit(features, self.y_train, classes=CLASSES)
        return len(self.x_train)

    def evaluate_model(self) -> tuple[Any, Any, int]:
        probabilities = self.model.predict_proba(self.x_test)
        loss = log_loss(self.y_test, probabilities, labels=CLASSES)
        accuracy = np.mean(probabilities.argmax(axis=1) == self.y_test)
        return loss, accuracy, len(self.x_test)
