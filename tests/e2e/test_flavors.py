"""Every flavor of model, from its example repository to predictions of what is served, on real processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from flops.mockdata.shipped import load_shipped
from flops.testing.deployment import Deployment, make_repository
from flops.testing.example import EXAMPLES, example_deployment, submit

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1_200)]

FINAL = {"completed", "failed", "stopped"}
PATIENCE_S = 1_000.0  # a cold cache of packages included

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two learner nodes with the table, of which one builds."""
    with pytest.MonkeyPatch.context() as patch:
        # Builds without CUDA may lie where pip finds them; uv does not read pip's settings.
        if "PIP_FIND_LINKS" in os.environ and "UV_FIND_LINKS" not in os.environ:
            patch.setenv("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])
        with example_deployment(tmp_path_factory.mktemp("deployment")) as deployment:
            yield deployment


@pytest.fixture(scope="module")
def digits(deployment: Deployment) -> tuple[Array, Array]:
    """Pixels and labels of the digits that both nodes have parts of."""
    deployment.flops("mock-data", "create", str(EXAMPLES / "slas/mocks/digits.json"), "--watch")
    table = load_shipped("digits")
    pixels = np.stack(table.column("pixels").to_numpy()).astype(np.float32) / 16
    return pixels, table.column("label").to_numpy()


def run_example(deployment: Deployment, name: str) -> dict[str, Any]:
    """Train an example by its SLA until its model is served; returns the project."""
    repository = make_repository(EXAMPLES / name, deployment.home / name)
    sla = json.loads((EXAMPLES / f"slas/projects/{name}.json").read_text())
    file = deployment.home / f"{name}.json"
    file.write_text(json.dumps({**sla, "ml_repo_url": repository.as_uri()}))
    project_id = submit(deployment, file)

    def project() -> dict[str, Any]:
        return dict(deployment.ask("project", "show", project_id)["project"])

    deployment.wait_for(lambda: project()["stage"] in FINAL, f"the end of {name}", PATIENCE_S)
    ended = project()
    message = (ended.get("failure") or {}).get("message", "")
    if "only as builds for GPUs" in message:
        pytest.skip(message)
    assert ended["stage"] == "completed", message
    rounds = [round(entry["accuracy"], 3) for entry in ended["training"]["history"]]
    sys.stdout.write(f"\n{name}: accuracy by round {rounds}\n")
    return ended


def predict(project: dict[str, Any], rows: Array) -> Array:
    """Predictions of the served model, over HTTP."""
    url = f"{project['inference_url'].rstrip('/')}/invocations"
    answer = httpx.post(url, json={"inputs": rows.tolist()}, timeout=60)
    assert answer.status_code == 200, answer.text
    return np.asarray(answer.json()["predictions"])


@pytest.mark.flavors
def test_boosted_trees_learn_and_are_served(deployment: Deployment) -> None:
    project = run_example(deployment, "breast_cancer_xgboost")
    assert project["model"]["accuracy"] >= 0.9  # untrained: 0.37
    table = load_shipped("breast_cancer")
    targets = table.column("target").to_numpy()
    rows = np.column_stack([column.to_numpy() for column in table.drop_columns("target").columns])
    assert np.mean((predict(project, rows) > 0.5) == targets) >= 0.9


@pytest.mark.flavors
@pytest.mark.parametrize("name", ["digits_pytorch", "digits_keras"])
def test_a_network_learns_and_is_served(
    deployment: Deployment, digits: tuple[Array, Array], name: str
) -> None:
    project = run_example(deployment, name)
    assert project["model"]["accuracy"] >= 0.85  # untrained: 0.1
    pixels, labels = digits
    scores = predict(project, pixels[:300])
    assert scores.shape == (300, 10)
    assert np.mean(scores.argmax(axis=1) == labels[:300]) >= 0.85
    output = deployment.flops("project", "logs", project["id"], "--service", "inference")
    assert "━" not in output.stdout + output.stderr  # Keras's progress bar, one for every request
