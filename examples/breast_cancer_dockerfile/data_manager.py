"""A table of measurements, whose outliers are cut by the library that the Dockerfile compiles."""

import ctypes
from typing import Any

import numpy as np

from flops_utils.ml_repo_building_blocks import load_table
from flops_utils.ml_repo_templates import DataManagerTemplate

LIBRARY = "/usr/local/lib/winsorize.so"
SHARE = 0.02  # of a column's values, at either end
HELD_OUT = 5  # every fifth row


def cut_outliers(column: Any) -> Any:
    values = np.ascontiguousarray(column, dtype=np.float64).copy()
    low, high = np.quantile(values, [SHARE, 1 - SHARE])
    winsorize = ctypes.CDLL(LIBRARY).winsorize
    winsorize.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_double]
    winsorize(values.ctypes.data, len(values), low, high)
    return values


class DataManager(DataManagerTemplate):
    def __init__(self) -> None:
        self.training, self.held_out = self._prepare_data()

    def _prepare_data(self) -> Any:
        table = load_table()
        features = [cut_outliers(table[name]) for name in table.column_names if name != "target"]
        x, y = np.column_stack(features), table["target"].to_numpy()
        is_held_out = np.arange(len(y)) % HELD_OUT == 0
        return (x[~is_held_out], y[~is_held_out]), (x[is_held_out], y[is_held_out])

    def get_data(self) -> tuple[Any, Any]:
        return self.training, self.held_out
