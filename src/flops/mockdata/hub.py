"""Data sets of the Hugging Face hub, by Flower Datasets."""

from __future__ import annotations

import re
from typing import Any

import datasets
import httpx
import pyarrow as pa
from flwr_datasets import FederatedDataset
from huggingface_hub import constants

from flops.errors import ErrorCode, FlopsError

HUB_TIMEOUT_S = 5.0
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_from_hub(name: str, split: str) -> pa.Table:
    """All rows of a split of a data set on the hub.

    Raises:
        FlopsError: ``dataset_unknown`` when there is none, or the hub cannot be reached.
    """
    if not _NAME.fullmatch(name):
        raise FlopsError(ErrorCode.DATASET_UNKNOWN, f"{name[:80]!r} does not name a data set.")
    check_hub(name)
    return load_split(name, split)


def check_hub(name: str) -> None:
    """Find out in seconds whether the hub answers; its own client would try for minutes.

    Raises:
        FlopsError: ``dataset_unknown``.
    """
    try:
        httpx.head(f"{constants.ENDPOINT}/api/datasets/{name}", timeout=HUB_TIMEOUT_S, follow_redirects=True)
    except httpx.HTTPError as exc:
        raise FlopsError(
            ErrorCode.DATASET_UNKNOWN,
            f"The data set {name} is not shipped, and the Hugging Face hub at {constants.ENDPOINT} cannot be "
            f"reached: {str(exc) or type(exc).__name__}.",
        ) from exc


def load_split(name: str, split: str, **arguments: Any) -> pa.Table:
    """Load a split as an Arrow table that keeps the features of Hugging Face in its metadata.

    Args:
        name: name of the data set, or of a reader such as ``parquet``.
        split: name of the split.
        arguments: what else ``datasets.load_dataset`` gets, such as ``data_files``.

    Raises:
        FlopsError: ``dataset_unknown``.
    """
    datasets.disable_progress_bars()
    try:
        # The provider shuffles by itself, in the way its partitioner needs.
        found = FederatedDataset(dataset=name, partitioners={}, shuffle=False, **arguments).load_split(split)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError) as exc:
        raise FlopsError(
            ErrorCode.DATASET_UNKNOWN, f"The data set {name}, split {split}, cannot be loaded: {exc}."
        ) from exc
    table = found.with_format("arrow")[:]
    return table.replace_schema_metadata(found.features.arrow_schema.metadata)
