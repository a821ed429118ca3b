"""Every tracker keeps its contract; and what is MLflow's alone."""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from flops.adapters.memory_tracker import MemoryTracker
from flops.adapters.mlflow_series import LEARNER_RUNS_MOST
from flops.adapters.mlflow_server import DATABASE_FILE, MlflowServer
from flops.adapters.mlflow_tracker import ATTEMPT_TAG, MlflowTracker
from flops.core.ids import ProjectId
from flops.core.project import Participant, Round
from flops.core.run_end import RunEnd, RunStatus
from flops.errors import ErrorCode, FlopsError
from flops.testing.contracts.tracker import (
    PARAMS,
    TAGS,
    RecordedRun,
    TrackerContract,
    accuracies,
    round_of,
)
from flops.testing.tracking import read_run
from flops.testing.waiting import until

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(home, 0, dict(os.environ))
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def project_id() -> ProjectId:
    return ProjectId(f"{next(_numbers):012x}")


class TestMemoryTracker(TrackerContract):
    @pytest.fixture
    def tracker(self) -> MemoryTracker:
        return MemoryTracker()

    @pytest.fixture
    def project_id(self) -> ProjectId:
        return ProjectId("0123456789ab")

    @pytest.fixture
    def read(self, tracker: MemoryTracker) -> Callable[[str], RecordedRun]:
        def read(run_id: str) -> RecordedRun:
            run = next(run for run in tracker.runs.values() if run.run_id == run_id)
            rounds = sorted(run.rounds.values(), key=lambda record: record.number)
            recorded = RecordedRun(run.params, run.tags, run.status)
            for record in rounds:
                if record.accuracy is not None:
                    recorded.accuracy.append((record.number, record.accuracy))
                if record.loss is not None:
                    recorded.loss.append((record.number, record.loss))
                for part in record.participants:
                    if part.accuracy is not None:
                        points = recorded.learner_accuracy.setdefault(part.learner, [])
                        points.append((record.number, part.accuracy))
            recorded.models = [(m.round, m.accuracy, m.loss) for m in run.models.values()]
            return recorded

        return read


class TestMlflowTracker(TrackerContract):
    @pytest.fixture
    def tracker(self, server: MlflowServer) -> Iterator[MlflowTracker]:
        tracker = MlflowTracker(server.url)
        yield tracker
        tracker.close()

    @pytest.fixture
    def project_id(self) -> ProjectId:
        return ProjectId(f"{next(_numbers):012x}")

    @pytest.fixture
    def read(self, server: MlflowServer) -> Callable[[str], RecordedRun]:
        return lambda run_id: read_run(server.url, run_id)


@pytest.fixture
def make_tracker(server: MlflowServer) -> Iterator[Callable[[], MlflowTracker]]:
    trackers: list[MlflowTracker] = []

    def make() -> MlflowTracker:
        trackers.append(MlflowTracker(server.url))
        return trackers[-1]

    yield make
    for tracker in trackers:
        tracker.close()


MakeTracker = Callable[[], MlflowTracker]


def test_after_a_restart_what_was_sent_is_not_sent_again(
    server: MlflowServer, make_tracker: MakeTracker, project_id: ProjectId
) -> None:
    first = make_tracker()
    _, run_id = first.open_run(project_id, PARAMS, TAGS)
    for number in (1, 2, 3):
        first.log_round(run_id, round_of(number))  # the learners' rounds 2 and 3 may not be sent yet
    second = make_tracker()
    assert second.open_run(project_id, PARAMS, TAGS)[1] == run_id
    for number in (1, 2, 3, 4):
        second.log_round(run_id, round_of(number))
    second.close_run(run_id, is_success=True)
    run = read_run(server.url, run_id)
    assert run.accuracy == accuracies(1, 2, 3, 4)
    assert run.learner_accuracy["learner-p-0"] == accuracies(1, 2, 3, 4)
    assert run.learner_accuracy["learner-p-1"] == accuracies(1, 2, 3, 4, index=1)


def test_a_model_is_registered_once_by_many(
    make_tracker: MakeTracker, project_id: ProjectId, tmp_path: Path
) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    tracker = make_tracker()
    _, run_id = tracker.open_run(project_id, PARAMS, TAGS)
    tracker.log_round(run_id, round_of(1))
    models = [make_tracker().log_model(run_id, tmp_path, round_of(1), "a/b: c") for _ in range(3)]
    assert models[1:] == models[:-1]
    assert (models[0].name, models[0].version) == ("a_b_ c", "1")


def test_projects_with_one_model_name_register_its_versions_and_no_number_comes_twice(
    make_tracker: MakeTracker, project_id: ProjectId, tmp_path: Path
) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {}\n")

    def register(suffix: str) -> str:
        tracker = make_tracker()
        _, run_id = tracker.open_run(ProjectId(f"{project_id}{suffix}"), PARAMS, TAGS)
        tracker.log_round(run_id, round_of(1))
        versions = [tracker.log_model(run_id, tmp_path, round_of(1), "shared").version for _ in range(2)]
        assert versions[0] == versions[1]
        return versions[0]

    assert [register("a"), register("b")] == ["1", "2"]
    for suffix in "ab":
        make_tracker().delete(ProjectId(f"{project_id}{suffix}"))
    assert register("c") == "3"


def test_an_attempt_from_the_beginning_is_a_run_of_its_own(
    make_tracker: MakeTracker, project_id: ProjectId
) -> None:
    tracker = make_tracker()
    experiment, first = tracker.open_run(project_id, PARAMS, TAGS)
    assert tracker.open_run(project_id, PARAMS, TAGS | {ATTEMPT_TAG: "2"}) != (experiment, first)
    assert tracker.open_run(project_id, PARAMS, TAGS) == (experiment, first)


def test_many_learners_get_a_table(
    server: MlflowServer, make_tracker: MakeTracker, project_id: ProjectId
) -> None:
    tracker = make_tracker()
    experiment_id, run_id = tracker.open_run(project_id, {}, {})
    tracker.log_round(run_id, round_of(1, learners=LEARNER_RUNS_MOST + 1))
    tracker.close_run(run_id, is_success=True)
    path = f"{experiment_id}/{run_id}/artifacts/learners/round-00001.csv"
    table = httpx.get(f"{server.url}/api/2.0/mlflow-artifacts/artifacts/{path}").text.splitlines()
    assert table[0] == "node,learner,accuracy,loss,rows,fit_s,evaluate_s"
    assert table[1] == "edge-0,learner-p-0,0.51,1.0,10,0.5,0.25"
    assert len(table) == LEARNER_RUNS_MOST + 2
    assert read_run(server.url, run_id).learner_accuracy == {}


def test_clusters_have_their_rounds_and_learners_below_them(
    server: MlflowServer, make_tracker: MakeTracker, project_id: ProjectId
) -> None:
    """Cycles are steps of the training, rounds those of clusters and learners; a restart repeats nothing."""
    cycles = [cycle_of(number) for number in (1, 2)]
    _, run_id = make_tracker().open_run(project_id, {}, {})
    for count in (1, 2):  # the second time after a restart
        tracker = make_tracker()
        for cycle in cycles[:count]:
            tracker.log_round(run_id, cycle)
        tracker.close_run(run_id, is_success=count == 2)
    training = read_run(server.url, run_id)
    assert [step for step, _ in training.accuracy] == [1, 2]
    assert training.learner_accuracy == {f"aggregator-p-{n}": [(1, 0.6), (2, 0.6)] for n in (1, 2)}
    client = MlflowClient(server.url)
    experiment = client.get_run(run_id).info.experiment_id
    below = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert sorted(str(run.info.run_name) for run in below) == ["cluster east", "cluster west"]
    for cluster in below:
        points = client.get_metric_history(cluster.info.run_id, "cluster_accuracy")
        assert sorted((point.step, point.value) for point in points) == [
            (n, 0.5 + n / 100) for n in (1, 2, 3, 4)
        ]
        learners = read_run(server.url, cluster.info.run_id).learner_accuracy
        assert [[step for step, _ in values] for values in learners.values()] == [[1, 2, 3, 4]]
    runs = client.search_runs([experiment])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == 1 + 2 + 2


def cycle_of(number: int) -> Round:
    """A cycle of two clusters with one learner each, and two rounds."""
    parts = []
    for cluster, name in ((1, "east"), (2, "west")):
        own = [
            Round(
                number=n,
                accuracy=0.5 + n / 100,
                participants=(Participant(learner=f"learner-p-{cluster}", node=name, rows=5, accuracy=0.4),),
            )
            for n in (2 * number - 1, 2 * number)
        ]
        parts.append(
            Participant(
                learner=f"aggregator-p-{cluster}",
                node=name,
                rows=5,
                accuracy=0.6,
                cluster=name,
                rounds=tuple(own),
            )
        )
    return Round(number=number, accuracy=0.6, participants=tuple(parts))


def test_numbers_and_names_that_json_or_mlflow_do_not_take(
    server: MlflowServer, make_tracker: MakeTracker, project_id: ProjectId
) -> None:
    tracker = make_tracker()
    _, run_id = tracker.open_run(project_id, {"a b!": "x" * 10_000}, {"note*": "y" * 10_000})
    odd = {"f1 (macro)": float("nan"), "up": float("inf"), "down": float("-inf"), "größe": 1.0}
    tracker.log_round(run_id, round_of(1).model_copy(update={"metrics": odd}))
    run = read_run(server.url, run_id)
    assert run.params["a b_"] == "x" * 6000
    assert run.tags["note_"] == "y" * 5000
    assert run.accuracy == accuracies(1)


def test_a_run_with_more_parameters_than_one_call_takes(
    server: MlflowServer, make_tracker: MakeTracker, project_id: ProjectId
) -> None:
    params = {f"p{number}": str(number) for number in range(250)}
    _, run_id = make_tracker().open_run(project_id, params, {})
    assert read_run(server.url, run_id).params == params


def test_people_find_the_run(server: MlflowServer, make_tracker: MakeTracker, project_id: ProjectId) -> None:
    tracker = MlflowTracker(server.url, public_uri="http://gateway:1234/")
    ids = tracker.open_run(project_id, {}, {})
    tracker.close()
    experiment_id, run_id = ids
    assert tracker.url_of(*ids) == (
        f"http://gateway:1234/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
    )
    page = httpx.get(make_tracker().url_of(*ids))
    assert page.status_code == 200
    assert "<title>MLflow</title>" in page.text


def test_a_deleted_experiment_in_the_gui_comes_back(
    server: MlflowServer, make_tracker: MakeTracker, project_id: ProjectId
) -> None:
    tracker = make_tracker()
    experiment_id, run_id = tracker.open_run(project_id, {}, {})
    url = f"{server.url}/api/2.0/mlflow/experiments/delete"
    assert httpx.post(url, json={"experiment_id": experiment_id}).status_code == 200
    assert tracker.open_run(project_id, {}, {}) == (experiment_id, run_id)


def test_two_trackers_at_once_make_one_experiment(make_tracker: MakeTracker, project_id: ProjectId) -> None:
    found: list[tuple[str, str]] = []
    trackers = [make_tracker() for _ in range(4)]
    threads = [
        threading.Thread(target=lambda t=tracker: found.append(t.open_run(project_id, {}, {})))
        for tracker in trackers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({experiment_id for experiment_id, _ in found}) == 1


def test_a_server_that_is_away_is_unreachable() -> None:
    tracker = MlflowTracker("http://127.0.0.1:1", timeout_s=1.0)
    with pytest.raises(FlopsError) as caught:
        tracker.open_run(ProjectId("p"), {}, {})
    assert caught.value.code is ErrorCode.UNREACHABLE
    assert "http://127.0.0.1:1" in caught.value.message
    tracker.close()


def test_a_model_whose_recording_was_cut_off_is_completed(
    server: MlflowServer, make_tracker: MakeTracker, project_id: ProjectId, tmp_path: Path
) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    tracker = make_tracker()
    experiment_id, run_id = tracker.open_run(project_id, PARAMS, TAGS)
    tracker.log_round(run_id, round_of(1))
    begun = httpx.post(
        f"{server.url}/api/2.0/mlflow/logged-models",
        json={
            "experiment_id": experiment_id,
            "name": "m",
            "source_run_id": run_id,
            "tags": [{"key": "flops.round", "value": "1"}],
        },
    ).json()["model"]["info"]
    assert begun["status"] == "LOGGED_MODEL_PENDING"
    model = tracker.log_model(run_id, tmp_path, round_of(1), "m")
    assert model.model_uri == f"models:/{begun['model_id']}"
    assert read_run(server.url, run_id).models == [(1, 0.51, 1.0)]
    found = httpx.get(f"{server.url}/api/2.0/mlflow/logged-models/{begun['model_id']}").json()["model"]
    assert found["info"]["status"] == "LOGGED_MODEL_READY"


def test_the_end_of_a_run_is_there_to_be_read(
    server: MlflowServer, make_tracker: MakeTracker, project_id: ProjectId
) -> None:
    tracker = make_tracker()
    experiment_id, run_id = tracker.open_run(project_id, PARAMS, TAGS)
    tracker.log_round(run_id, round_of(1))
    late = make_tracker()
    end = RunEnd(status=RunStatus.KILLED, summary="**Stopped** by request.", failure="Traceback: größe\n")
    late.end_runs(project_id, end)
    client = MlflowClient(server.url)
    runs = client.search_runs([experiment_id])
    assert {run.info.status for run in runs} == {"KILLED"}
    assert all(run.info.end_time for run in runs)
    assert client.get_run(run_id).data.tags["mlflow.note.content"].endswith("**Stopped** by request.")
    path = f"{experiment_id}/{run_id}/artifacts/failure.txt"
    text = httpx.get(f"{server.url}/api/2.0/mlflow-artifacts/artifacts/{path}").content.decode()
    assert text == "Traceback: größe\n"
    ended_at = client.get_run(run_id).info.end_time
    late.end_runs(project_id, end.model_copy(update={"status": RunStatus.FAILED}))
    assert client.get_run(run_id).info.end_time == ended_at


def test_an_experiment_that_was_deleted_in_the_gui_is_left_alone(
    server: MlflowServer, make_tracker: MakeTracker, project_id: ProjectId
) -> None:
    tracker = make_tracker()
    experiment_id, _ = tracker.open_run(project_id, PARAMS, TAGS)
    MlflowClient(server.url).delete_experiment(experiment_id)
    tracker.end_runs(project_id, RunEnd(status=RunStatus.FAILED, summary="It failed."))
    assert MlflowClient(server.url).get_experiment(experiment_id).lifecycle_stage == "deleted"


def test_a_deleted_project_is_removed_for_good_and_nothing_else(
    server: MlflowServer, make_tracker: MakeTracker, project_id: ProjectId, tmp_path: Path, home: Path
) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    client, tracker = MlflowClient(server.url), make_tracker()
    experiment_id, run_id = tracker.open_run(project_id, PARAMS, TAGS)
    tracker.log_round(run_id, round_of(1))
    tracker.log_model(run_id, tmp_path, round_of(1), f"model {project_id}")
    tracker.close_run(run_id, is_success=True)
    other_id, other_run_id = tracker.open_run(ProjectId(f"{project_id}b"), PARAMS, TAGS)
    client.log_text(other_run_id, "text", "kept.txt")
    client.delete_experiment(other_id)  # by somebody in the GUI, who may want it back
    assert list((home / "artifacts" / experiment_id).rglob("MLmodel"))
    assert rows_with(home, run_id)

    tracker.delete(project_id)
    until(lambda: experiment_id not in experiments_of(client), "the removal")
    until(lambda: not (home / "artifacts" / experiment_id).exists(), "the removal of the artifacts")
    assert rows_with(home, run_id) == {}
    tracker.delete(project_id)
    client.restore_experiment(other_id)
    assert client.get_run(other_run_id).data.params == PARAMS
    assert (home / "artifacts" / other_id / other_run_id / "artifacts" / "kept.txt").exists()

    client.delete_experiment(other_id)
    tracker.delete(ProjectId(f"{project_id}b"))  # hidden before, now removed
    until(lambda: other_id not in experiments_of(client), "the removal")


def experiments_of(client: MlflowClient) -> set[str]:
    return {experiment.experiment_id for experiment in client.search_experiments(ViewType.ALL)}


def rows_with(home: Path, value: str) -> dict[str, int]:
    """In how many rows of which tables of MLflow's database a value stands."""
    found = {}
    with contextlib.closing(sqlite3.connect(home / DATABASE_FILE)) as database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            rows = database.execute(f'SELECT * FROM "{table}"').fetchall()  # noqa: S608 (names of tables)
            count = sum(value in map(str, row) for row in rows)
            if count:
                found[table] = count
    return found
