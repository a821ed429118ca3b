"""A small convolutional network. One call of `fit_model` is two passes over the data."""

from typing import Any

import numpy as np
import torch
from data_manager import DataManager
from network import SIDE, Network

from flops_utils.ml_repo_templates import ModelManagerTemplate

EPOCHS, BATCH, LEARNING_RATE, MOMENTUM = 2, 32, 0.05, 0.9


class ModelManager(ModelManagerTemplate):
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = Network()
        self.loss = torch.nn.CrossEntropyLoss()

    def set_model_data(self) -> None:
        training, held_out = DataManager().get_data()
        self.x_train, self.y_train = map(torch.from_numpy, training)
        self.x_test, self.y_test = map(torch.from_numpy, held_out)

    def get_model(self) -> Any:
        return self.network

    def get_input_example(self) -> Any:
        return np.zeros((1, SIDE * SIDE), np.float32)

    def get_model_parameters(self) -> Any:
        return [value.numpy() for value in self.network.state_dict().values()]

    def set_model_parameters(self, parameters: Any) -> None:
        names = self.network.state_dict()
        self.network.load_state_dict(
            {name: torch.from_numpy(np.array(value)) for name, value in zip(names, parameters, strict=True)}
        )

    def fit_model(self) -> int:
        optimizer = torch.optim.SGD(self.network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        self.network.train()
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(self.x_train)).split(BATCH):
                optimizer.zero_grad()
                self.loss(self.network(self.x_train[batch]), self.y_train[batch]).backward()
                optimizer.step()
        return len(self.x_train)

    def evaluate_model(self) -> tuple[Any, Any, int]:
        self.network.eval()
        with torch.no_grad():
            scores = self.network(self.x_test)
        accuracy = (scores.argmax(dim=1) == self.y_test).float().mean()
        return self.loss(scores, self.y_test).item(), accuracy.item(), len(self.x_test)
