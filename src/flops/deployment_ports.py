"""What remembers which model is deployed where; beside `flops.ports`."""

from __future__ import annotations

from typing import Protocol

from flops.core.deployment import Deployment
from flops.ports import ProjectStore


class DeploymentStore(Protocol):
    """Records of deployed models, by the model's name."""

    def put_deployment(self, deployment: Deployment) -> None:
        """Store a record durably, replacing an earlier one of the same model."""
        ...

    def deployments(self) -> list[Deployment]:
        """All records, by name."""
        ...


class ManagerStore(ProjectStore, DeploymentStore, Protocol):
    """All that the manager remembers; a reset forgets the records of deployed models, too."""
