"""Deployed models on a cluster that the test plays: swaps, failures, kills, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flops.adapters.memory_store import MemoryProjectStore
from flops.core.cluster import ServiceState
from flops.core.deployment import Deployment
from flops.core.ids import NodeId
from flops.errors import ErrorCode, FlopsError
from flops.testing.played_models import MODEL, PlayedModels
from flops.testing.projects import node_with, played_cluster
from flops.testing.waiting import until

ALPHA, BETA = NodeId("id-alpha"), NodeId("id-beta")
ENDED = ServiceState.STOPPED


@pytest.fixture
def played() -> Iterator[PlayedModels]:
    with played_cluster() as cluster:
        yield PlayedModels(cluster)


def refused(code: ErrorCode) -> Any:
    return pytest.raises(FlopsError, check=lambda exc: exc.code is code)


def test_the_newest_version_is_deployed_where_it_fits_and_tells_its_address(played: PlayedModels) -> None:
    begun = played.deploy()
    assert (begun.state, begun.url) == ("starting", "")
    service_id = played.answer(begun)
    record = played.record
    assert (record.state, record.node, record.port) == ("serving", "alpha", 8080)
    assert record.url == "http://10.0.0.1:8080"
    assert record.serving is not None
    assert (record.serving.version, record.serving.project_id) == ("2", played.projects[1])
    (service,) = [s for s in played.cluster.orchestrator.services() if s.spec.id == service_id]
    assert service.spec.config["model_version"] == "2"
    assert service.spec.config["is_port_fixed"] is True
    assert played.deploy() == record, "what is deployed already is left alone"
    assert played.running() == {service_id}


def test_another_version_takes_over_when_it_answers_and_keeps_the_address(played: PlayedModels) -> None:
    first = played.answer(played.deploy(version="1"))
    begun = played.deploy()
    assert (begun.state, begun.url) == ("swapping", "http://10.0.0.1:8080")
    assert begun.starting is not None
    assert (begun.starting.node, begun.starting.port) == ("alpha", 8080)
    assert played.state_of(first) is ServiceState.RUNNING
    second = played.answer(begun)
    assert played.record.url == "http://10.0.0.1:8080"
    until(lambda: played.running() == {second}, "the end of the first version")
    lines = played.record.history
    assert [(line.version, line.reason) for line in lines] == [("1", "deployed"), ("2", "deployed")]
    assert lines[0].until_s == lines[1].since_s
    assert lines[1].until_s is None


@pytest.mark.parametrize("code", [ErrorCode.MODEL_UNLOADABLE, ErrorCode.PORT_OCCUPIED])
def test_a_version_that_does_not_come_up_leaves_the_one_before_serving(
    played: PlayedModels, code: ErrorCode
) -> None:
    first = played.answer(played.deploy(version="1"))
    starting = played.deploy().starting
    assert starting is not None
    played.fail(starting.service_id, code)
    record = played.until(lambda d: d.starting is None)
    assert (record.state, record.url) == ("serving", "http://10.0.0.1:8080")
    assert record.failure is not None
    assert record.failure.code == code.value
    assert "Version 1 goes on serving" in record.doing
    until(lambda: played.running() == {first}, "the end of the second version")


def test_a_version_that_ends_again_and_again_is_given_up(played: PlayedModels) -> None:
    starting = played.deploy().starting
    assert starting is not None
    error = FlopsError(ErrorCode.OUT_OF_MEMORY, "It took too much.").to_dict()
    for restarts in (1, 2, 3):
        played.cluster.orchestrator.report(
            starting.service_id, ServiceState.RESTARTING, error=error, restarts=restarts
        )
    played.cluster.orchestrator.tell(starting.service_id, "progress", message="Loading the model.")
    assert played.until(lambda d: "Loading" in d.doing).state == "starting"
    played.cluster.orchestrator.report(starting.service_id, ServiceState.RESTARTING, error=error, restarts=4)
    record = played.until(lambda d: d.state == "failed")
    assert record.failure is not None
    assert record.failure.code == "out_of_memory"
    until(lambda: not played.running(), "the end of the service")


def test_a_taken_port_is_passed_over_unless_it_was_asked_for(played: PlayedModels) -> None:
    starting = played.deploy().starting
    assert starting is not None
    played.fail(starting.service_id, ErrorCode.PORT_OCCUPIED)
    record = played.until(lambda d: d.starting is not None and d.starting.port == 8081)
    played.answer(record)
    assert played.record.url == "http://10.0.0.1:8081"
    moving = played.deploy(port=9000).starting
    assert moving is not None
    played.fail(moving.service_id, ErrorCode.PORT_OCCUPIED)
    record = played.until(lambda d: d.starting is None)
    assert (record.url, record.failure is not None) == ("http://10.0.0.1:8081", True)


def test_a_rollback_goes_to_the_version_before_and_back_again(played: PlayedModels) -> None:
    with refused(ErrorCode.NOT_DEPLOYED):
        played.cluster.engine.deployments.rollback(MODEL)
    played.answer(played.deploy(version="1"))
    with refused(ErrorCode.ROLLBACK_IMPOSSIBLE):
        played.cluster.engine.deployments.rollback(MODEL)
    played.answer(played.deploy(version="2"))
    played.answer(played.cluster.engine.deployments.rollback(MODEL))
    assert played.record.history[-1].version == "1"
    assert played.record.history[-1].reason == "rolled back from version 2"
    played.answer(played.cluster.engine.deployments.rollback(MODEL))
    assert [line.version for line in played.record.history] == ["1", "2", "1", "2"]


def test_a_rollback_to_a_deleted_version_is_refused(played: PlayedModels) -> None:
    played.answer(played.deploy(version="1"))
    played.answer(played.deploy(version="2"))
    gone = played.projects[0]
    played.cluster.engine.delete(gone)
    until(lambda: gone not in {p.id for p in played.cluster.engine.projects()}, "the deletion")
    with refused(ErrorCode.ROLLBACK_IMPOSSIBLE):
        played.cluster.engine.deployments.rollback(MODEL)


def test_an_undeployed_model_keeps_its_address(played: PlayedModels) -> None:
    with refused(ErrorCode.NOT_DEPLOYED):
        played.cluster.engine.deployments.undeploy(MODEL)
    played.answer(played.deploy(node="beta", port=9000))
    record = played.cluster.engine.deployments.undeploy(MODEL)
    assert (record.state, record.url) == ("stopped", "")
    assert record.history[-1].until_s is not None
    until(lambda: not played.running(), "the end of the service")
    with refused(ErrorCode.NOT_DEPLOYED):
        played.cluster.engine.deployments.undeploy(MODEL)
    again = played.deploy().starting
    assert again is not None
    assert (again.node, again.port) == ("beta", 9000)


def test_the_address_of_an_undeployed_model_is_not_given_to_another(played: PlayedModels) -> None:
    played.answer(played.deploy(node="alpha"))
    played.cluster.engine.deployments.undeploy(MODEL)
    played.train("1", name="letters")
    other = played.cluster.engine.deployments.deploy("letters", node="alpha").starting
    assert other is not None
    assert other.port == 8081


def test_what_is_unknown_or_cannot_be_is_refused(played: PlayedModels) -> None:
    deployments = played.cluster.engine.deployments
    with refused(ErrorCode.MODEL_NOT_FOUND):
        deployments.deploy("nothing")
    with refused(ErrorCode.MODEL_NOT_FOUND):
        deployments.get("nothing")
    with refused(ErrorCode.MODEL_NOT_FOUND):
        played.deploy(version="9")
    with refused(ErrorCode.NODE_NOT_FOUND):
        played.deploy(node="nowhere")
    played.cluster.orchestrator.join(node_with("small", memory_mb=10))
    with refused(ErrorCode.PLACEMENT_IMPOSSIBLE):
        played.deploy(node="small")
    assert deployments.all() == []
    played.answer(played.deploy())
    other = played.train("1", name="letters")
    with refused(ErrorCode.PORT_OCCUPIED):
        deployments.deploy("letters", node="alpha", port=8080)
    assert deployments.deploy("letters", node="alpha").starting.port == 8081  # type: ignore[union-attr]
    with refused(ErrorCode.MODEL_DEPLOYED):
        played.cluster.engine.delete(other)


def test_a_model_stays_on_its_node_while_that_is_away_and_goes_on_when_it_is_back(
    played: PlayedModels,
) -> None:
    service_id = played.answer(played.deploy(version="1"))
    played.cluster.orchestrator.leave(ALPHA)
    assert played.until(lambda d: d.state == "lost").doing
    with refused(ErrorCode.PLACEMENT_IMPOSSIBLE):
        played.deploy(version="2")
    played.cluster.orchestrator.join(node_with("alpha"))
    for state in (ServiceState.PREPARING, ServiceState.RUNNING):
        played.cluster.orchestrator.report(service_id, state)
        assert played.until(lambda d: d.state != "lost").state == "restarting"
    played.tell_listening(service_id, 8080)
    assert played.until(lambda d: d.state == "serving").url == "http://10.0.0.1:8080"
    assert len(played.record.history) == 1


def test_a_model_that_was_only_out_of_sight_serves_as_soon_as_it_is_seen(played: PlayedModels) -> None:
    service_id = played.answer(played.deploy())
    played.cluster.orchestrator.leave(ALPHA)
    played.until(lambda d: d.state == "lost")
    played.cluster.orchestrator.join(node_with("alpha"))
    played.cluster.orchestrator.report(service_id, ServiceState.RUNNING)
    played.until(lambda d: d.state == "serving")


def test_a_model_whose_node_was_removed_goes_to_another_one(played: PlayedModels) -> None:
    played.answer(played.deploy(node="alpha"))
    played.cluster.orchestrator.leave(ALPHA)
    played.until(lambda d: d.state == "lost")
    played.cluster.engine.remove_node("alpha", is_forced=True)
    assert played.until(lambda d: d.state == "failed").failure is not None
    played.answer(played.deploy())
    assert (played.record.state, played.record.node) == ("serving", "beta")


def test_a_model_can_be_moved_to_another_node(played: PlayedModels) -> None:
    first = played.answer(played.deploy())
    second = played.answer(played.deploy(node=BETA))
    assert (played.record.node, played.record.port) == ("beta", 8080)
    until(lambda: played.running() == {second}, f"the end of {first}")


def test_a_version_that_is_not_wanted_any_more_never_takes_over(played: PlayedModels) -> None:
    first = played.answer(played.deploy(version="1"))
    given_up = played.deploy(version="2").starting
    assert given_up is not None
    assert played.deploy(version="1").starting is None
    until(lambda: played.running() == {first}, "the end of the second version")
    played.tell_listening(given_up.service_id, 8080)
    played.cluster.orchestrator.report(given_up.service_id, ENDED)
    assert played.answer(played.deploy(version="2")) != given_up.service_id


def test_a_deployed_version_holds_its_project_and_the_reset(played: PlayedModels) -> None:
    played.answer(played.deploy(version="1"))
    with refused(ErrorCode.MODEL_DEPLOYED):
        played.cluster.engine.delete(played.projects[0])
    with refused(ErrorCode.CONFLICT):
        played.cluster.engine.reset()
    played.cluster.engine.reset(is_forced=True)
    assert played.cluster.engine.deployments.all() == []
    until(lambda: not played.running(), "the end of the service")


def test_a_service_that_fails_for_good_is_told_and_can_be_rolled_back(played: PlayedModels) -> None:
    played.answer(played.deploy(version="1"))
    second = played.answer(played.deploy(version="2"))
    error = FlopsError(ErrorCode.DISK_FULL, "The disk is full.").to_dict()
    played.cluster.orchestrator.report(second, ServiceState.FAILED, error=error)
    record = played.until(lambda d: d.state == "failed")
    assert record.failure is not None
    assert record.failure.code == "disk_full"
    played.answer(played.cluster.engine.deployments.rollback(MODEL))
    assert (played.record.state, played.record.history[-1].version) == ("serving", "1")


class DyingStore(MemoryProjectStore):
    """Writes records of deployments only so often; then each write fails, as after a kill."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 1_000
        self.died = threading.Event()

    def put_deployment(self, deployment: Deployment) -> None:
        if self.left <= 0:
            self.died.set()
            raise FlopsError(ErrorCode.DISK_FULL, "killed")
        self.left -= 1
        super().put_deployment(deployment)


def test_a_kill_before_a_swap_is_stored_leaves_it_undone() -> None:
    store = DyingStore()
    with played_cluster(store=store) as cluster:
        played = PlayedModels(cluster)
        first = played.answer(played.deploy(version="1"))
        store.left = 0
        with refused(ErrorCode.DISK_FULL):
            played.deploy(version="2")
        cluster.restart()
        assert (played.record.state, played.running()) == ("serving", {first})


def test_a_kill_before_the_takeover_is_stored_leaves_it_to_the_next_start() -> None:
    store = DyingStore()
    with played_cluster(store=store) as cluster:
        played = PlayedModels(cluster)
        first = played.answer(played.deploy(version="1"))
        starting = played.deploy(version="2").starting
        assert starting is not None
        store.left = 0
        cluster.orchestrator.report(starting.service_id, ServiceState.RUNNING)
        played.tell_listening(starting.service_id, 8080)
        assert store.died.wait(20)
        cluster.engine.close()
        assert played.running() == {first, starting.service_id}
        store.left = 1_000
        cluster.restart()
        played.until(lambda d: d.starting is None)
        until(lambda: played.running() == {starting.service_id}, "the end of the first version")
        assert [line.version for line in played.record.history] == ["1", "2"]


def test_services_that_no_record_wants_are_stopped_at_the_start(played: PlayedModels) -> None:
    played.answer(played.deploy(version="1"))
    second = played.answer(played.deploy(version="2"))
    with_first = played.record.model_copy(update={"serving": None, "starting": None})
    played.cluster.engine.close()
    played.cluster.store.put_deployment(with_first)
    assert second in played.running()
    played.cluster.restart()
    until(lambda: not played.running(), "the end of the service")
