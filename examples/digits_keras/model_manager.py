"""A small convolutional network in Keras. One call of `fit_model` is two passes over the data."""

from typing import Any

import keras
import numpy as np
from data_manager import DataManager

from flops_utils.ml_repo_templates import ModelManagerTemplate

SIDE, DIGITS = 8, 10
EPOCHS, BATCH, LEARNING_RATE = 2, 32, 0.1


class ModelManager(ModelManagerTemplate):
    def __init__(self) -> None:
        keras.utils.set_random_seed(0)
        self.model = keras.Sequential(
            [
                keras.Input((SIDE * SIDE,)),
                keras.layers.Reshape((SIDE, SIDE, 1)),
                keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
                keras.layers.MaxPooling2D(2),
                keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
                keras.layers.Flatten(),
                keras.layers.Dense(DIGITS, activation="softmax"),
            ]
        )
        self.model.compile(
            optimizer=keras.optimizers.SGD(LEARNING_RATE),
            loss="sparse_categorical_crossentropy",
            metrics=["accuracy"],
        )

    def set_model_data(self) -> None:
        (self.x_train, self.y_train), (self.x_test, self.y_test) = DataManager().get_data()

    def get_model(self) -> Any:
        return self.model

    def get_input_example(self) -> Any:
        return np.zeros((1, SIDE * SIDE), np.float32)

    def get_model_parameters(self) -> Any:
        return self.model.get_weights()

    def set_model_parameters(self, parameters: Any) -> None:
        self.model.set_weights(parameters)

    def fit_model(self) -> int:
        self.model.fit(self.x_train, self.y_train, epochs=EPOCHS, batch_size=BATCH, verbose=0)
        return len(self.x_train)

    def evaluate_model(self) -> tuple[Any, Any, int]:
        loss, accuracy = self.model.evaluate(self.x_test, self.y_test, verbose=0)
        return loss, accuracy, len(self.x_test)
