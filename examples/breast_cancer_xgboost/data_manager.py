"""A table of measurements with a `target` column, 80 % for training and 20 % held out."""

from typing import Any

import numpy as np

from flops_utils.ml_repo_building_blocks import load_table
from flops_utils.ml_repo_templates import DataManagerTemplate

TARGET = "target"
TRAINING_SHARE = 0.8


class DataManager(DataManagerTemplate):
    def __init__(self) -> None:
        self.training, self.held_out = self._prepare_data()

    def _prepare_data(self) -> Any:
        table = load_table()
        labels = table.column(TARGET).to_numpy()
        names = [name for name in table.column_names if name != TARGET]
        features = np.column_stack([table.column(name).to_numpy() for name in names])
        order = np.random.default_rng(0).permutation(len(labels))
        features, labels = features[order], labels[order]
        cut = int(TRAINING_SHARE * len(labels))
        return (features[:cut], labels[:cut]), (features[cut:], labels[cut:])

    def get_data(self) -> tuple[Any, Any]:
        return self.training, self.held_out
