"""Fixtures of several modules: a training on its stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.testing.training_stage import TrainingStage


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[TrainingStage]:
    """One project's data, code, aggregator and learners."""
    stage = TrainingStage(tmp_path)
    yield stage
    stage.close()
