"""The network alone: a saved model takes this module along, and needs nothing of FLOps to be loaded."""

import torch

SIDE, DIGITS = 8, 10


class Network(torch.nn.Module):
    """Two convolutions and a linear layer; rows of 64 pixels in, a score for each digit out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Unflatten(1, (1, SIDE, SIDE)),
            torch.nn.Conv2d(1, 16, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(32 * (SIDE // 2) ** 2, DIGITS),
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)
