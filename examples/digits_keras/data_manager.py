"""Handwritten digits of 8 × 8 pixels with 17 greys, 80 % for training and 20 % held out."""

from typing import Any

import numpy as np

from flops_utils.ml_repo_building_blocks import load_table
from flops_utils.ml_repo_templates import DataManagerTemplate

TRAINING_SHARE = 0.8


class DataManager(DataManagerTemplate):
    def __init__(self) -> None:
        self.training, self.held_out = self._prepare_data()

    def _prepare_data(self) -> Any:
        table = load_table().combine_chunks()
        pixels = np.stack(table.column("pixels").to_numpy()).astype(np.float32) / 16
        labels = table.column("label").to_numpy().astype(np.int64)
        cut = int(TRAINING_SHARE * len(labels))
        return (pixels[:cut], labels[:cut]), (pixels[cut:], labels[cut:])

    def get_data(self) -> tuple[Any, Any]:
        return self.training, self.held_out
