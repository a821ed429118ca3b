"""The example that deployments are tested with: two nodes with tabular data, and code that learns from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flops.testing.deployment import Deployment, deployed, make_repository

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
REPOSITORY = "repository"  # its folder in the deployment's home
FIT = "def fit_model(self) -> int:"


@contextmanager
def example_deployment(home: Path, *, container_socket: Path | None = None) -> Iterator[Deployment]:
    """A control plane, two learner nodes with data, of which one builds, and the example's repository.

    Args:
        home: of the deployment.
        container_socket: of the engine in whose containers the nodes run services; None for processes.
    """
    with deployed(home, container_socket=container_socket) as deployment:
        deployment.up()
        for name, addons in (("node-1", ("FLOps-learner", "imageBuilder")), ("node-2", ("FLOps-learner",))):
            if container_socket is not None:
                deployment.node(name, "config", "virtualization", "container", "on")
            deployment.start_node(name, *addons)
        deployment.wait_for_nodes(2)
        deployment.flops("mock-data", "create", str(EXAMPLES / "slas/mocks/breast_cancer.json"), "--watch")
        make_example(deployment, REPOSITORY)
        yield deployment


def make_example(deployment: Deployment, name: str) -> Path:
    """Make another repository of the example's code in the deployment's home; returns its path."""
    return make_repository(EXAMPLES / "breast_cancer_sklearn", deployment.home / name)


def begin_fit_with(repository: Path, statement: str) -> None:
    """Have the code run a statement first whenever it trains; nothing is committed."""
    manager = repository / "model_manager.py"
    source = manager.read_text()
    assert FIT in source
    manager.write_text(source.replace(FIT, f"{FIT}\n        {statement}", 1))


def example_sla(deployment: Deployment, repository: str = REPOSITORY, **changes: Any) -> dict[str, Any]:
    """The example's SLA for a repository in the deployment's home; objects in it are changed by key."""
    sla: dict[str, Any] = json.loads((EXAMPLES / "slas/projects/breast_cancer_sklearn.json").read_text())
    sla["ml_repo_url"] = (deployment.home / repository).as_uri()
    for key, value in changes.items():
        sla[key] = {**sla[key], **value} if isinstance(value, dict) else value
    return sla


def sla_file(deployment: Deployment, name: str = "sla", repository: str = REPOSITORY, **changes: Any) -> Path:
    """Write the SLA of `example_sla` into the deployment's home; returns the file."""
    path = deployment.home / f"{name}.json"
    path.write_text(json.dumps(example_sla(deployment, repository, **changes)))
    return path


def submit(deployment: Deployment, sla: Path) -> str:
    """Submit a project; returns its id."""
    return deployment.flops("project", "create", str(sla)).stdout.split()[0]
