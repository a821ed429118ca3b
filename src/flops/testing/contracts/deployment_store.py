"""What every `flops.deployment_ports.DeploymentStore` does."""

from __future__ import annotations

import pytest

from flops.core.deployment import Deployment, Launch, answered, begun, launch_id
from flops.core.ids import NodeId, ProjectId
from flops.deployment_ports import ManagerStore


def deployment(name: str = "digits", version: str = "1") -> Deployment:
    """A record for tests: this version serves, and another one is being started."""
    launch = Launch(
        service_id=launch_id(ProjectId("p1"), 1),
        version=version,
        project_id=ProjectId("p1"),
        node_id=NodeId("n1"),
        node="größe",
        port=8080,
        may_move=False,
        reason="deployed",
    )
    serving = answered(begun(Deployment(name=name), launch, 1.0), launch.service_id, "http://n1:8080", 2.0)
    second = launch.model_copy(update={"service_id": launch_id(ProjectId("p2"), 2), "version": "2"})
    return begun(serving, second, 3.0)


class DeploymentStoreContract:
    """Subclass it, and provide the fixture `store`."""

    @pytest.fixture
    def store(self) -> ManagerStore:
        raise NotImplementedError

    def test_a_record_comes_back_whole(self, store: ManagerStore) -> None:
        assert store.deployments() == []
        store.put_deployment(deployment())
        assert store.deployments() == [deployment()]

    def test_a_later_record_of_a_model_replaces_the_earlier_one(self, store: ManagerStore) -> None:
        store.put_deployment(deployment())
        store.put_deployment(deployment(version="7"))
        assert store.deployments() == [deployment(version="7")]

    def test_records_are_listed_by_name(self, store: ManagerStore) -> None:
        for name in ("b", "c", "a"):
            store.put_deployment(deployment(name))
        store.put_deployment(deployment("b", version="2"))
        assert [record.name for record in store.deployments()] == ["a", "b", "c"]

    def test_a_reset_forgets_them(self, store: ManagerStore) -> None:
        store.put_deployment(deployment())
        store.reset()
        assert store.deployments() == []
