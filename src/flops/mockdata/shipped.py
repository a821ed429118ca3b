"""Data sets that come with FLOps or with a package it needs: no network is asked for them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

SHIPPED = ("mnist", "digits", "breast_cancer")
_FOLDER = Path(__file__).parent / "datasets"
_CANCER_MEASURES = (
    "radius", "texture", "perimeter", "area", "smoothness", "compactness", "concavity", "concave points",
    "symmetry", "fractal dimension",
)  # fmt: skip


def load_shipped(name: str) -> pa.Table:
    """All rows of a shipped data set.

    Args:
        name: one of `SHIPPED`.
    """
    if name == "mnist":
        return pq.read_table(_FOLDER / "mnist.parquet")
    if name == "digits":
        return _digits()
    return _breast_cancer()


def _digits() -> pa.Table:
    """1,797 digits of 8 × 8 pixels with 17 greys: `pixels` as lists of 64 numbers, `label`."""
    table = _read_csv("digits.csv.gz", [*(f"pixel_{index}" for index in range(64)), "label"])
    columns = [column.to_numpy() for column in table.columns[:-1]]
    pixels = np.stack(columns, axis=1).astype(np.uint8)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 64)
    return pa.table({"pixels": lists, "label": table["label"]})


def _breast_cancer() -> pa.Table:
    """569 tumours with 30 measured features each; `target` is 0 for malignant ones, 1 for benign ones."""
    features = [
        *(f"mean {measure}" for measure in _CANCER_MEASURES),
        *(f"{measure} error" for measure in _CANCER_MEASURES),
        *(f"worst {measure}" for measure in _CANCER_MEASURES),
    ]
    table = _read_csv("breast_cancer.csv", [*features, "target"], header_lines=1)
    floats = [(name, pa.float64()) for name in features]
    return table.cast(pa.schema([*floats, ("target", pa.int64())]))


def _read_csv(file_name: str, columns: list[str], *, header_lines: int = 0) -> pa.Table:
    # The package's data are read without importing the package, which takes seconds.
    package = importlib.util.find_spec("sklearn")
    (folder, *_) = package.submodule_search_locations or [""] if package is not None else [""]
    reading = pa_csv.ReadOptions(column_names=columns, skip_rows=header_lines)
    return pa_csv.read_csv(Path(folder) / "datasets" / "data" / file_name, read_options=reading)
