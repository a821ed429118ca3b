"""Handwritten digits as rows of 784 pixels, 80 % for training and 20 % held out."""

from typing import Any

import numpy as np

from flops_utils.ml_repo_building_blocks import load_dataset
from flops_utils.ml_repo_templates import DataManagerTemplate

TRAINING_SHARE = 0.8


class DataManager(DataManagerTemplate):
    def __init__(self) -> None:
        self.training, self.held_out = self._prepare_data()

    def _prepare_data(self) -> Any:
        digits = load_dataset().with_format("numpy")
        rows = digits[:]  # images are decoded here
        pixels = np.asarray(rows["image"]).reshape(len(digits), -1)
        labels = np.asarray(rows["label"])
        cut = int(TRAINING_SHARE * len(digits))
        return (pixels[:cut], labels[:cut]), (pixels[cut:], labels[cut:])

    def get_data(self) -> tuple[Any, Any]:
        return self.training, self.held_out
