"""Whole lives of projects on a cluster that the test plays."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from flops.adapters.memory_store import MemoryProjectStore
from flops.adapters.memory_tracker import MemoryTracker
from flops.adapters.sql_store import SqlProjectStore
from flops.core.cluster import IMAGE_BUILDER_ADDON, LEARNER_ADDON, AddonState, ServiceKind, ServiceState
from flops.core.effects import Effect, EffectKind
from flops.core.ids import NodeId, ProjectId, ServiceId
from flops.core.project import Participant, Project, ProjectEvent, Round, Stage
from flops.core.sla import MockDataSla, ResourceConstraints, parse_mock_data_sla
from flops.errors import ErrorCode, FlopsError
from flops.testing.projects import REPO_URL, PlayedCluster, node_with, played_cluster, raw_sla, sla_with
from flops.testing.waiting import until


def mock_sla(**configuration: Any) -> MockDataSla:
    return parse_mock_data_sla({"mock_data_configuration": {"data_tag": "mnist", **configuration}})


def is_ended(project: Project) -> bool:
    return project.stage.is_final and not project.services


class DyingStore(MemoryProjectStore):
    """Everything fails from its n-th write on until `revive`: what a kill at that moment leaves behind."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self.died = threading.Event()
        self._left = writes
        self._is_mortal = True

    def revive(self) -> None:
        self._is_mortal = False
        self.died.clear()

    def _write(self) -> None:
        self._left -= 1
        if self._is_mortal and self._left <= 0:
            self.died.set()
            raise FlopsError(ErrorCode.DISK_FULL, "killed")

    def add(self, project: Project, events: Any, effects: Any) -> None:
        self._write()
        super().add(project, events, effects)

    def save(self, project: Project, events: Any, effects: Any, *, cursor: int | None = None) -> None:
        self._write()
        super().save(project, events, effects, cursor=cursor)

    def finish_effect(self, key: str) -> None:
        self._write()
        super().finish_effect(key)

    def move_cursor(self, seq: int) -> None:
        self._write()
        super().move_cursor(seq)

    def put_environment(self, environment: Any) -> None:
        self._write()
        super().put_environment(environment)


def assert_sound(cluster: PlayedCluster, project_id: ProjectId) -> None:
    history = cluster.engine.history(project_id)
    assert [line.seq for line in history] == list(range(1, len(history) + 1))
    services = [service.spec.id for service in cluster.orchestrator.services(project_id)]
    assert len(services) == len(set(services))
    kinds = [line.kind for line in history if line.kind != "service_progressed"]
    for once in ("submitted", "environment_locked", "training_completed", "project_completed"):
        assert kinds.count(once) <= 1
    assert cluster.store.pending_effects() == []


def test_a_project_goes_from_submission_to_a_served_model() -> None:
    with played_cluster() as cluster:
        project = cluster.engine.submit(sla_with())
        assert project.stage is Stage.RESOLVING
        cluster.play_to_the_end(project.id)
        done = cluster.wait(project.id, lambda p: p.stage is Stage.COMPLETED and len(p.services) == 1)
        assert done.inference_url == "http://127.0.0.1:8080"
        assert done.training is not None
        assert (len(done.training.history), done.training.best_round) == (3, 3)
        states = {s.spec.kind: s.status.state for s in cluster.orchestrator.services(project.id)}
        assert states[ServiceKind.INFERENCE] is ServiceState.RUNNING
        assert states[ServiceKind.LEARNER] is ServiceState.STOPPED
        assert_sound(cluster, project.id)


def test_nodes_that_trained_faster_come_first_also_after_a_restart() -> None:
    with played_cluster() as cluster:
        single = sla_with(min_available_clients=1, min_fit_clients=1, min_evaluate_clients=1)
        assert cluster.engine.plan(single).nodes[0].runs["learner"] == 1  # alpha, with more cores
        project = cluster.engine.submit(sla_with())
        cluster.build(project.id)
        aggregator = cluster.listen(project.id)
        cluster.join_learners(project.id)
        parts = [
            Participant(learner=name, node=name, rows=100, fit_s=fit_s)
            for name, fit_s in (("alpha", 8.0), ("beta", 2.0))
        ]
        record = Round(number=1, accuracy=0.5, participants=tuple(parts)).model_dump(mode="json")
        cluster.orchestrator.tell(aggregator, "round_completed", rounds=3, record=record)
        cluster.wait(project.id, lambda p: p.training is not None and len(p.training.history) == 1)
        for _ in range(2):
            assert cluster.engine.node_paces() == pytest.approx({"alpha": 1.6, "beta": 0.4})
            alpha, beta = cluster.engine.plan(single).nodes
            assert "learner" not in alpha.runs
            assert (beta.runs["learner"], beta.pace) == (1, pytest.approx(0.4))
            cluster.restart()
        other = cluster.engine.submit(single)
        placed = cluster.wait(other.id, lambda p: p.placement is not None).placement
        assert placed is not None
        assert placed.learners == ("id-beta",)


def test_the_services_get_what_they_need() -> None:
    with played_cluster(inference_port=9001) as cluster:
        project = cluster.engine.submit(sla_with(seed=7, strategy={"name": "FedAvgM"}))
        cluster.play_to_the_end(project.id)
        cluster.wait(project.id, lambda p: p.stage is Stage.COMPLETED)
        specs = {s.spec.id: s.spec for s in cluster.orchestrator.services(project.id)}
        environment = cluster.environment(project.id)
        aggregator = specs[ServiceId(f"aggregator-{project.id}")]
        assert (aggregator.environment, aggregator.model_environment) == (
            environment.lock,
            environment.model_lock,
        )
        assert aggregator.config["strategy"]["name"] == "FedAvgM"
        assert aggregator.config["tracking_uri"] == "http://mlflow.example"
        assert aggregator.resources.memory_mb == 100 + 1536
        learners = [specs[ServiceId(f"learner-{project.id}-{n}")] for n in (1, 2)]
        assert {spec.config["aggregator"] for spec in learners} == {"127.0.0.1:5000"}
        assert {spec.config["learner_token"] for spec in learners} == {aggregator.config["learner_token"]}
        assert [(s.config["part"], s.config["parts"]) for s in learners] == [(0, 1), (0, 1)]
        inference = specs[ServiceId(f"inference-{project.id}")]
        assert inference.config["port"] == 9001
        assert inference.bundle == cluster.blobs.put(b"model")
        assert inference.model_environment == environment.model_lock
        assert specs[ServiceId(f"builder-{project.id}")].node_id == "id-alpha"


def test_asking_for_gpus_asks_for_another_environment() -> None:
    with played_cluster() as cluster:
        cluster.orchestrator.join(
            node_with("gpu", addons=(LEARNER_ADDON, IMAGE_BUILDER_ADDON), gpus=("T4", "T4"))
        )
        keys = {}
        for vgpus in (0, 1):
            resources = ResourceConstraints(vgpus=vgpus)
            project = cluster.engine.submit(sla_with().model_copy(update={"resource_constraints": resources}))
            builder = cluster.wait_for_service(f"builder-{project.id}")
            (spec,) = [s.spec for s in cluster.orchestrator.services(project.id) if s.spec.id == builder]
            assert spec.config["needs_gpu"] == (vgpus > 0)
            keys[vgpus] = spec.config["environment_key"]
        assert keys[0] != keys[1]


def test_learners_on_one_node_share_its_data() -> None:
    with played_cluster() as cluster:
        project = cluster.engine.submit(sla_with(min_available_clients=4))
        cluster.build(project.id)
        cluster.listen(project.id)
        cluster.wait_for_service(f"learner-{project.id}-4")
        parts = sorted(
            (s.spec.node_id, s.spec.config["part"], s.spec.config["parts"])
            for s in cluster.orchestrator.services(project.id)
            if s.spec.kind is ServiceKind.LEARNER
        )
        assert parts == [("id-alpha", 0, 2), ("id-alpha", 1, 2), ("id-beta", 0, 2), ("id-beta", 1, 2)]


def test_an_impossible_project_is_refused_before_anything_is_built() -> None:
    with played_cluster() as cluster:
        project = cluster.engine.submit(sla_with(data_tags=["nothing"]))
        failed = cluster.wait(project.id, lambda p: p.stage.is_final)
        assert failed.failure is not None
        assert failed.failure.code == ErrorCode.PLACEMENT_IMPOSSIBLE.value
        assert "alpha: no rows for the data tag 'nothing'" in failed.failure.message
        assert cluster.orchestrator.services() == []


def test_an_unreachable_repository_fails_the_project_with_a_hint() -> None:
    with played_cluster() as cluster:
        raw = {**raw_sla(), "ml_repo_url": "https://git.example/nothing"}
        project = cluster.engine.submit(type(sla_with()).model_validate(raw))
        failed = cluster.wait(project.id, lambda p: p.stage.is_final)
        assert failed.failure is not None
        assert failed.failure.code == ErrorCode.REPO_UNREACHABLE.value
        assert "git ls-remote" in failed.failure.hint


def test_a_known_environment_is_used_again_unless_its_locks_are_gone() -> None:
    with played_cluster() as cluster:
        first = cluster.engine.submit(sla_with())
        cluster.build(first.id)
        cluster.wait(first.id, lambda p: p.stage is Stage.PLACING)
        second = cluster.engine.submit(sla_with())
        assert cluster.wait(second.id, lambda p: p.stage is Stage.PLACING).environment is not None
        cluster.blobs._blobs.clear()
        third = cluster.engine.submit(sla_with())
        cluster.wait(third.id, lambda p: p.stage is Stage.BUILDING)


def test_what_may_pass_is_tried_again() -> None:
    with played_cluster() as cluster:
        cluster.repos.fail(REPO_URL, FlopsError(ErrorCode.TIMEOUT, "slow"))
        project = cluster.engine.submit(sla_with())
        cluster.repos.fail(REPO_URL, None)
        cluster.wait(project.id, lambda p: p.stage is Stage.BUILDING)


def test_what_does_not_pass_fails_the_project() -> None:
    with played_cluster(retry_for_s=0.3) as cluster:
        cluster.repos.fail(REPO_URL, FlopsError(ErrorCode.TIMEOUT, "slow"))
        project = cluster.engine.submit(sla_with())
        failed = cluster.wait(project.id, lambda p: p.stage.is_final)
        assert failed.failure is not None
        assert failed.failure.code == "timeout"


def test_placement_waits_for_nodes_that_are_only_about_to_reconnect() -> None:
    with played_cluster() as cluster:
        project = cluster.engine.submit(sla_with())
        cluster.wait_for_service(f"builder-{project.id}")
        for node in cluster.orchestrator.nodes():
            cluster.orchestrator.leave(node.id)
        cluster.build(project.id)
        cluster.wait(project.id, lambda p: p.stage is Stage.PLACING)
        cluster.join_two()
        cluster.wait_for_service(f"aggregator-{project.id}")


@pytest.mark.parametrize("state", [AddonState.STARTING, AddonState.UNHEALTHY])
def test_placement_waits_for_addons_that_are_about_to_be_healthy(state: AddonState) -> None:
    with played_cluster() as cluster:
        for node in cluster.orchestrator.nodes():
            addons = tuple(a.model_copy(update={"state": state}) for a in node.addons)
            cluster.orchestrator.join(node.model_copy(update={"addons": addons}))
        project = cluster.engine.submit(sla_with())
        cluster.wait(project.id, lambda p: p.repository is not None)
        cluster.join_two()
        cluster.wait_for_service(f"builder-{project.id}")


def test_placement_gives_up_on_nodes_that_do_not_come_back() -> None:
    with played_cluster(reconnect_grace_s=0.3) as cluster:
        project = cluster.engine.submit(sla_with())
        cluster.wait_for_service(f"builder-{project.id}")
        cluster.orchestrator.leave(NodeId("id-beta"))
        cluster.orchestrator.leave(NodeId("id-alpha"))
        cluster.build(project.id)
        failed = cluster.wait(project.id, lambda p: p.stage.is_final)
        assert failed.failure is not None
        assert "alpha: not connected" in failed.failure.message


def test_a_defect_in_one_project_ends_it_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    with played_cluster() as cluster:
        broken, sound = cluster.engine.submit(sla_with()), cluster.engine.submit(sla_with())
        builder = cluster.wait_for_service(f"builder-{broken.id}")
        with caplog.at_level(logging.ERROR):
            cluster.orchestrator.tell(builder, "round_started", round=1, rounds=3)
            failed = cluster.wait(broken.id, is_ended)
        assert failed.failure is not None
        assert failed.failure.code == "internal"
        assert "cannot happen" in failed.failure.message
        assert "it came so far" in caplog.text
        cluster.play_to_the_end(sound.id)
        cluster.wait(sound.id, lambda p: p.stage is Stage.COMPLETED)


def test_malformed_events_are_left_out() -> None:
    with played_cluster() as cluster:
        project = cluster.engine.submit(sla_with())
        builder = cluster.wait_for_service(f"builder-{project.id}")
        cluster.orchestrator.tell(builder, "no_such_event")
        cluster.orchestrator.tell(builder, "environment_locked", environment="nonsense")
        cluster.build(project.id)
        cluster.wait(project.id, lambda p: p.stage is Stage.PLACING)


def test_an_effect_that_raises_ends_its_project_with_an_internal_error() -> None:
    with played_cluster() as cluster:
        cluster.repos.fail(REPO_URL, RuntimeError("a defect"))  # type: ignore[arg-type]
        project = cluster.engine.submit(sla_with())
        failed = cluster.wait(project.id, lambda p: p.stage.is_final)
        assert failed.failure is not None
        assert failed.failure.code == "internal"
        assert "RuntimeError: a defect" in failed.failure.message


def test_a_failed_project_stops_everything_it_started() -> None:
    with played_cluster() as cluster:
        project = cluster.engine.submit(sla_with())
        cluster.build(project.id)
        aggregator = cluster.listen(project.id)
        cluster.join_learners(project.id)
        cluster.orchestrator.report(aggregator, ServiceState.FAILED, exit_code=-9)
        failed = cluster.wait(project.id, is_ended)
        assert failed.stage is Stage.FAILED
        assert all(s.status.state.is_final for s in cluster.orchestrator.services(project.id))


@pytest.mark.parametrize("nodes_obey", [True, False])
def test_a_running_project_is_stopped(nodes_obey: bool) -> None:
    with played_cluster(nodes_obey=nodes_obey) as cluster:
        project = cluster.engine.submit(sla_with())
        cluster.build(project.id)
        cluster.listen(project.id)
        learners = cluster.join_learners(project.id)
        cluster.wait(project.id, lambda p: p.training is not None and len(p.training.learners) == 2)
        assert cluster.engine.stop(project.id).stage is Stage.STOPPING
        if not nodes_obey:
            cluster.orchestrator.leave(NodeId("id-beta"))
            for service in (*learners, ServiceId(f"aggregator-{project.id}")):
                cluster.orchestrator.report(service, ServiceState.STOPPED)
        assert cluster.wait(project.id, is_ended).stage is Stage.STOPPED
        assert cluster.engine.stop(project.id).stage is Stage.STOPPED


def test_a_stop_before_the_repository_is_found_ends_at_once() -> None:
    gate = threading.Event()
    with played_cluster() as cluster:
        resolve = cluster.repos.resolve

        def slow(url: str, ref: str | None, flavor: str) -> Any:
            gate.wait(10)
            return resolve(url, ref, flavor)

        cluster.repos.resolve = slow  # type: ignore[method-assign]
        project = cluster.engine.submit(sla_with())
        assert cluster.engine.stop(project.id).stage is Stage.STOPPED
        gate.set()
        cluster.engine.close()
        assert cluster.engine.get(project.id).stage is Stage.STOPPED


def is_quiet(cluster: PlayedCluster) -> bool:
    """Whether nothing is left to do."""
    return cluster.store.pending_effects() == []


@pytest.mark.parametrize("played", ["nothing", "build", "train", "all"])
def test_a_project_is_deleted_at_any_stage_with_all_that_belongs_to_it(played: str) -> None:
    tracker = MemoryTracker()
    with played_cluster(tracker=tracker) as cluster:
        project = cluster.engine.submit(sla_with())
        if played in {"build", "train"}:
            cluster.build(project.id)
        if played == "train":
            cluster.listen(project.id)
            cluster.join_learners(project.id)
        if played == "all":
            cluster.play_to_the_end(project.id)
            cluster.wait(project.id, lambda p: p.stage is Stage.COMPLETED)
        tracker.open_run(project.id, {}, {})
        cluster.engine.delete(project.id)
        until(lambda: not cluster.engine.projects() and is_quiet(cluster), "the deletion")
        assert cluster.orchestrator.services() == []
        assert tracker.runs == {}
        with pytest.raises(FlopsError, match=project.id):
            cluster.engine.delete(project.id)


@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_tracking_server_that_is_away_does_not_hold_up_a_deletion(is_restarted: bool) -> None:
    tracker = MemoryTracker()
    with played_cluster(tracker=tracker) as cluster:
        project = cluster.engine.submit(sla_with())
        tracker.open_run(project.id, {}, {})
        tracker.problem = FlopsError(ErrorCode.UNREACHABLE, "MLflow is away.")
        cluster.engine.delete(project.id)
        until(lambda: not cluster.engine.projects(), "the deletion")
        assert [effect.kind for effect in cluster.store.pending_effects()] == [EffectKind.DELETE_TRACKING]
        if is_restarted:
            cluster.restart()
        tracker.problem = None
        until(lambda: is_quiet(cluster), "the end of the experiment")
        assert tracker.runs == {}


def play_a_training(cluster: PlayedCluster, tracker: MemoryTracker) -> tuple[ProjectId, ServiceId]:
    """Play a project until its learners have joined, with its run open; returns it and its aggregator."""
    project = cluster.engine.submit(sla_with())
    cluster.build(project.id)
    aggregator = cluster.listen(project.id)
    cluster.join_learners(project.id)
    tracker.open_run(project.id, {}, {})
    cluster.wait(project.id, lambda p: p.training is not None and len(p.training.learners) == 2)
    return project.id, aggregator


def test_the_run_of_a_failed_project_tells_why() -> None:
    tracker = MemoryTracker()
    with played_cluster(tracker=tracker) as cluster:
        project_id, aggregator = play_a_training(cluster, tracker)
        details = {
            "node": "beta",
            "round": 2,
            "traceback": "Traceback:\n  File 'm.py', line 3\nValueError: no",
        }
        error = FlopsError(ErrorCode.USER_CODE_FAILED, "ValueError: no", details=details)
        cluster.orchestrator.tell(aggregator, "failed", error=error.to_dict())
        until(lambda: tracker.runs[project_id].status == "FAILED", "the run's end")
        tags = tracker.runs[project_id].tags
        assert tags["flops.failure.code"] == "user_code_failed"
        assert (tags["flops.failure.node"], tags["flops.failure.round"]) == ("beta", "2")
        assert "File 'm.py', line 3" in tracker.ends[project_id].failure
        assert "on beta in round 2: ValueError: no" in tracker.ends[project_id].summary
        tracker.open_run(project_id, {}, {})  # by the aggregator, which was started once more
        assert tracker.runs[project_id].status == "FAILED"


def test_a_run_that_was_opened_after_the_failure_is_ended_with_its_aggregator() -> None:
    tracker = MemoryTracker()
    with played_cluster(tracker=tracker, nodes_obey=False) as cluster:
        project = cluster.engine.submit(sla_with())
        cluster.build(project.id)
        aggregator = cluster.listen(project.id)
        cluster.orchestrator.tell(
            aggregator, "failed", error=FlopsError(ErrorCode.AGGREGATION_FAILED, "NaN.").to_dict()
        )
        cluster.wait(project.id, lambda p: p.stage is Stage.FAILED)
        until(lambda: not tracking_effects(cluster), "the first look")
        tracker.open_run(project.id, {}, {})
        cluster.orchestrator.report(aggregator, ServiceState.STOPPED)
        until(lambda: tracker.runs[project.id].status == "FAILED", "the run's end")


def tracking_effects(cluster: PlayedCluster) -> list[Effect]:
    return [effect for effect in cluster.store.pending_effects() if effect.kind is EffectKind.END_TRACKING]


def test_the_run_of_a_stopped_project_is_killed_also_when_the_tracking_server_was_away() -> None:
    tracker = MemoryTracker()
    with played_cluster(tracker=tracker) as cluster:
        project_id, _ = play_a_training(cluster, tracker)
        tracker.problem = FlopsError(ErrorCode.UNREACHABLE, "MLflow is away.")
        cluster.engine.stop(project_id)
        cluster.wait(project_id, is_ended)
        cluster.restart()
        tracker.problem = None
        until(lambda: is_quiet(cluster), "the run's end")
        assert tracker.runs[project_id].status == "KILLED"


def test_a_completed_training_stays_so_when_its_deployment_fails() -> None:
    tracker = MemoryTracker()
    with played_cluster(tracker=tracker) as cluster:
        project_id, _ = play_a_training(cluster, tracker)
        cluster.train(project_id)
        cluster.finish_training(project_id)
        inference = cluster.wait_for_service(f"inference-{project_id}")
        cluster.orchestrator.report(inference, ServiceState.FAILED, exit_code=1)
        until(lambda: tracker.runs[project_id].status == "FINISHED", "the run's end")
        assert tracker.runs[project_id].tags["flops.failure.code"] == "service_failed"


def test_learners_follow_an_aggregator_to_another_address() -> None:
    with played_cluster() as cluster:
        project = cluster.engine.submit(sla_with())
        cluster.build(project.id)
        aggregator = cluster.listen(project.id)
        cluster.join_learners(project.id)
        cluster.train(project.id, rounds=1)
        cluster.orchestrator.report(aggregator, ServiceState.RESTARTING, exit_code=-9)
        cluster.orchestrator.tell(aggregator, "listening", address="127.0.0.1:6000")
        cluster.join_learners(project.id, suffix="-r2")
        states = {s.spec.id: s.status.state for s in cluster.orchestrator.services(project.id)}
        assert states[ServiceId(f"learner-{project.id}-1")] is ServiceState.STOPPED
        cluster.train(project.id, first=2)
        cluster.finish_training(project.id)
        cluster.serve(project.id)
        done = cluster.wait(project.id, lambda p: p.stage is Stage.COMPLETED)
        assert done.training is not None
        assert [record.number for record in done.training.history] == [1, 2, 3]


def test_the_inference_service_goes_elsewhere_when_its_node_is_gone() -> None:
    with played_cluster() as cluster:
        project = cluster.engine.submit(sla_with())
        cluster.build(project.id)
        cluster.listen(project.id)
        cluster.join_learners(project.id)
        cluster.train(project.id)
        cluster.wait(project.id, lambda p: p.training is not None and len(p.training.history) == 3)
        cluster.orchestrator.leave(NodeId("id-alpha"))
        cluster.finish_training(project.id)
        inference = cluster.serve(project.id)
        node = next(s.spec.node_id for s in cluster.orchestrator.services() if s.spec.id == inference)
        assert node == "id-beta"


@pytest.mark.parametrize("writes", range(2, 38))
def test_a_kill_between_any_two_writes_loses_and_repeats_nothing(writes: int) -> None:
    store = DyingStore(writes + 1)  # the first write stores the project
    with played_cluster(store=store) as cluster:
        project = cluster.engine.submit(sla_with())
        player = threading.Thread(target=cluster.play_to_the_end, args=(project.id,))
        player.start()
        while player.is_alive() and not store.died.wait(0.01):
            pass
        cluster.engine.close()
        store.revive()
        cluster.restart()
        player.join()
        cluster.wait(project.id, lambda p: p.stage is Stage.COMPLETED and len(p.services) == 1)
        cluster.engine.close()
        assert_sound(cluster, project.id)
        done = cluster.engine.get(project.id)
        assert done.training is not None
        assert [record.number for record in done.training.history] == [1, 2, 3]


def test_a_restarted_manager_goes_on_with_the_database(tmp_path: Path) -> None:
    store = SqlProjectStore(tmp_path / "projects.sqlite")
    with played_cluster(store=store) as cluster:
        project = cluster.engine.submit(sla_with())
        cluster.build(project.id)
        cluster.restart()
        cluster.listen(project.id)
        cluster.engine.close()
        cluster.orchestrator.tell(
            ServiceId(f"aggregator-{project.id}"), "training_started", experiment_id="1", run_id="r"
        )
        cluster.restart()
        cluster.join_learners(project.id)
        cluster.train(project.id)
        cluster.finish_training(project.id)
        cluster.restart()
        cluster.serve(project.id)
        cluster.wait(project.id, lambda p: p.stage is Stage.COMPLETED and len(p.services) == 1)
        cluster.engine.close()
        assert_sound(cluster, project.id)
    store.close()


def test_services_of_nobody_are_removed_at_the_start() -> None:
    with played_cluster() as cluster:
        project = cluster.engine.submit(sla_with())
        cluster.wait_for_service(f"builder-{project.id}")
        cluster.engine.close()
        cluster.store.delete(project.id)
        cluster.restart()
        assert cluster.orchestrator.services() == []


def test_a_full_disk_pauses_the_engine_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class FullStore(MemoryProjectStore):
        is_full = False

        def save(
            self,
            project: Project,
            events: Any,
            effects: Any,
            *,
            cursor: int | None = None,
        ) -> None:
            if self.is_full:
                raise FlopsError(ErrorCode.DISK_FULL, "The disk is full.")
            super().save(project, events, effects, cursor=cursor)

    store = FullStore()
    with played_cluster(store=store) as cluster:
        project = cluster.engine.submit(sla_with())
        builder = cluster.wait_for_service(f"builder-{project.id}")
        store.is_full = True
        cluster.orchestrator.tell(builder, "progress", message="Resolves.")
        cluster.build(project.id)
        with caplog.at_level(logging.ERROR):
            while "cannot be taken in now" not in caplog.text:
                threading.Event().wait(0.02)
        store.is_full = False
        cluster.wait(project.id, lambda p: p.stage is Stage.PLACING)
        assert_history_is_gapless(cluster.engine.history(project.id))


def assert_history_is_gapless(history: list[ProjectEvent]) -> None:
    assert [line.seq for line in history] == list(range(1, len(history) + 1))


# Mock data


def test_mock_data_is_pushed_and_counted_once() -> None:
    with played_cluster() as cluster:
        record = cluster.engine.create_mock_data(mock_sla(number_of_partitions=3))
        services = cluster.orchestrator.services(record.id)
        assert [s.spec.config["partitions"] for s in services] == [[0, 2], [1]]
        for service in services:
            for partition in service.spec.config["partitions"]:
                cluster.orchestrator.tell(
                    service.spec.id, "data_pushed", data_tag="mnist", partition=partition, rows=10
                )
        cluster.restart()
        cluster.store.move_cursor(0)  # as if the kill had come before the cursor was moved
        cluster.restart()
        for service in services:
            cluster.orchestrator.report(service.spec.id, ServiceState.COMPLETED, exit_code=0)
        wait_for_mock(cluster, "completed")
        assert cluster.engine.mock_data()[0].rows == 30


def test_a_provider_that_fails_is_told() -> None:
    with played_cluster() as cluster:
        record = cluster.engine.create_mock_data(mock_sla(number_of_nodes=1))
        error = FlopsError(ErrorCode.DATASET_UNKNOWN, "No dataset x.").to_dict()
        cluster.orchestrator.tell(record.services[0], "failed", error=error)
        cluster.orchestrator.report(record.services[0], ServiceState.FAILED, exit_code=69)
        wait_for_mock(cluster, "failed")
        failure = cluster.engine.mock_data()[0].failure
        assert failure is not None
        assert failure.code == ErrorCode.DATASET_UNKNOWN.value


def test_mock_data_without_a_learner_node_is_refused() -> None:
    with played_cluster() as cluster:
        for node in cluster.orchestrator.nodes():
            cluster.orchestrator.leave(node.id)
        with pytest.raises(FlopsError, match="alpha: not connected") as caught:
            cluster.engine.create_mock_data(mock_sla())
        assert caught.value.code is ErrorCode.PLACEMENT_IMPOSSIBLE
        assert cluster.engine.mock_data() == []


def test_a_manager_killed_before_the_providers_started_starts_them() -> None:
    with played_cluster() as cluster:
        record = cluster.engine.create_mock_data(mock_sla())
        cluster.engine.close()
        for service in record.services:
            cluster.orchestrator.remove_service(service)
        cluster.restart()
        assert [s.spec.id for s in cluster.orchestrator.services()] == list(record.services)


def wait_for_mock(cluster: PlayedCluster, state: str) -> None:
    for _ in range(1_000):
        if cluster.engine.mock_data()[0].state == state:
            return
        threading.Event().wait(0.01)
    raise AssertionError(cluster.engine.mock_data())


def test_a_reset_stops_mock_data_too_when_forced() -> None:
    with played_cluster() as cluster:
        cluster.engine.create_mock_data(mock_sla())
        with pytest.raises(FlopsError, match="mock data"):
            cluster.engine.reset()
        cluster.engine.reset(is_forced=True)
        assert (cluster.engine.mock_data(), cluster.orchestrator.services()) == ([], [])


def test_effects_of_a_deleted_project_do_nothing() -> None:
    with played_cluster() as cluster:
        project = cluster.engine.submit(sla_with())
        cluster.wait_for_service(f"builder-{project.id}")
        cluster.engine.reset(is_forced=True)
        late = Effect(key="late", project_id=project.id, kind="start_builder")  # type: ignore[arg-type]
        cluster.engine._executor.submit([late])
        cluster.engine.close()
        assert cluster.orchestrator.services() == []
