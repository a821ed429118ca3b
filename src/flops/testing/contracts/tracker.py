"""What every `flops.tracker_port.Tracker` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flops.core.ids import ProjectId
from flops.core.project import Participant, Round
from flops.core.run_end import RunEnd, RunStatus
from flops.errors import ErrorCode, FlopsError
from flops.tracker_port import Tracker

PARAMS = {"strategy": "FedAvg", "rounds": "3", "min_available_clients": "2"}
TAGS = {"commit": "0123abcd", "data_tags": "mnist"}


@dataclass
class RecordedRun:
    """A run as it is read back by other means than the tracker."""

    params: dict[str, str]
    tags: dict[str, str]
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    accuracy: list[tuple[int, float]] = field(default_factory=list)  # (round, value), as recorded
    loss: list[tuple[int, float]] = field(default_factory=list)
    learner_accuracy: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # by service id
    models: list[tuple[int, float | None, float | None]] = field(default_factory=list)  # round, its numbers


def round_of(number: int, *, learners: int = 2) -> Round:
    """A round for tests."""
    return Round(
        number=number,
        accuracy=0.5 + number / 100,
        loss=1 / number,
        metrics={"f1": 0.25},
        participants=tuple(
            Participant(
                learner=f"learner-p-{index}",
                node=f"edge-{index}",
                rows=10,
                fit_s=0.5,
                evaluate_s=0.25,
                accuracy=0.5 + number / 100 + index / 1000,
                loss=1 / number,
            )
            for index in range(learners)
        ),
        left_out=("learner-p-9",),
        duration_s=0.75,
    )


def accuracies(*numbers: int, index: int = 0) -> list[tuple[int, float]]:
    """The accuracies of `round_of`, of a learner when `index` is above 0."""
    return [(number, 0.5 + number / 100 + index / 1000) for number in numbers]


class TrackerContract:
    """Subclass it, and provide the fixtures `tracker`, `read`, `project_id`."""

    @pytest.fixture
    def tracker(self) -> Tracker:
        raise NotImplementedError

    @pytest.fixture
    def read(self) -> Callable[[str], RecordedRun]:
        """Reads a run back by its id."""
        raise NotImplementedError

    @pytest.fixture
    def project_id(self) -> ProjectId:
        """A project that the tracker has not seen."""
        raise NotImplementedError

    @pytest.fixture
    def model_folder(self, tmp_path: Path) -> Path:
        """A folder of an MLflow model, as far as a tracker looks at it."""
        folder = tmp_path / "model"
        (folder / "data").mkdir(parents=True)
        (folder / "MLmodel").write_text("flavors: {}\nutc_time_created: '2026-01-01 00:00:00.0'\n")
        (folder / "data" / "weights").write_bytes(bytes(range(256)))
        return folder

    def test_a_run_is_opened_once(
        self, tracker: Tracker, read: Callable[[str], RecordedRun], project_id: ProjectId
    ) -> None:
        ids = tracker.open_run(project_id, PARAMS, TAGS)
        assert tracker.open_run(project_id, PARAMS | {"rounds": "4", "new": "1"}, TAGS | {"late": "x"}) == ids
        run = read(ids[1])
        assert PARAMS.items() <= run.params.items()
        assert (run.params["new"], run.tags["late"], run.status) == ("1", "x", "RUNNING")
        assert TAGS.items() <= run.tags.items()
        assert ids[1] in tracker.url_of(*ids)

    def test_rounds_are_recorded_once_whatever_is_repeated(
        self, tracker: Tracker, read: Callable[[str], RecordedRun], project_id: ProjectId
    ) -> None:
        _, run_id = tracker.open_run(project_id, PARAMS, TAGS)
        for number in (1, 2, 2, 1, 3, 2):
            tracker.log_round(run_id, round_of(number))
        tracker.close_run(run_id, is_success=True)
        run = read(run_id)
        assert run.accuracy == accuracies(1, 2, 3)
        assert run.loss == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
        assert run.learner_accuracy == {
            "learner-p-0": accuracies(1, 2, 3),
            "learner-p-1": accuracies(1, 2, 3, index=1),
        }

    def test_a_round_may_lack_numbers_and_participants(
        self, tracker: Tracker, read: Callable[[str], RecordedRun], project_id: ProjectId
    ) -> None:
        _, run_id = tracker.open_run(project_id, {}, {})
        tracker.log_round(run_id, Round(number=1))
        tracker.log_round(run_id, round_of(2, learners=1).model_copy(update={"accuracy": None}))
        tracker.close_run(run_id, is_success=True)
        run = read(run_id)
        assert (run.accuracy, run.loss) == ([], [(2, 0.5)])

    @pytest.mark.parametrize(("is_success", "status"), [(True, "FINISHED"), (False, "FAILED")])
    def test_a_closed_run_can_be_opened_again(
        self,
        tracker: Tracker,
        read: Callable[[str], RecordedRun],
        project_id: ProjectId,
        is_success: bool,
        status: str,
    ) -> None:
        ids = tracker.open_run(project_id, PARAMS, TAGS)
        for _ in range(2):
            tracker.close_run(ids[1], is_success=is_success)
            assert read(ids[1]).status == status
        assert tracker.open_run(project_id, PARAMS, TAGS) == ids
        assert read(ids[1]).status == "RUNNING"

    def test_the_model_has_the_numbers_of_its_round(
        self,
        tracker: Tracker,
        read: Callable[[str], RecordedRun],
        project_id: ProjectId,
        model_folder: Path,
    ) -> None:
        experiment_id, run_id = tracker.open_run(project_id, PARAMS, TAGS)
        for number in (1, 2, 3):
            tracker.log_round(run_id, round_of(number))
        name = f"model {project_id}"
        model = tracker.log_model(run_id, model_folder, round_of(2), name)
        assert tracker.log_model(run_id, model_folder, round_of(2), name) == model
        assert (model.experiment_id, model.run_id, model.name) == (experiment_id, run_id, name)
        assert (model.version, model.round, model.accuracy, model.loss) == ("1", 2, 0.52, 0.5)
        assert model.bundle is None
        run = read(run_id)
        assert run.models == [(2, 0.52, 0.5)]
        assert run.accuracy == accuracies(1, 2, 3)

    def test_another_project_s_model_is_another_version(
        self, tracker: Tracker, project_id: ProjectId, model_folder: Path
    ) -> None:
        name = f"model {project_id}"
        for number, project in enumerate((project_id, ProjectId(f"{project_id}b")), start=1):
            _, run_id = tracker.open_run(project, PARAMS, TAGS)
            tracker.log_round(run_id, round_of(1))
            assert tracker.log_model(run_id, model_folder, round_of(1), name).version == str(number)

    def test_a_folder_without_a_model_is_refused(
        self, tracker: Tracker, project_id: ProjectId, tmp_path: Path
    ) -> None:
        _, run_id = tracker.open_run(project_id, PARAMS, TAGS)
        with pytest.raises(FlopsError) as caught:
            tracker.log_model(run_id, tmp_path, round_of(1), "m")
        assert caught.value.code is ErrorCode.MODEL_EXPORT_FAILED

    def test_an_unknown_run_is_told(self, tracker: Tracker) -> None:
        with pytest.raises(FlopsError) as caught:
            tracker.log_round("0" * 32, round_of(1))
        assert caught.value.code is ErrorCode.TRACKING_FAILED

    def test_a_deleted_project_starts_anew(
        self,
        tracker: Tracker,
        read: Callable[[str], RecordedRun],
        project_id: ProjectId,
        model_folder: Path,
    ) -> None:
        _, run_id = tracker.open_run(project_id, PARAMS, TAGS)
        tracker.log_round(run_id, round_of(1))
        tracker.log_model(run_id, model_folder, round_of(1), f"model {project_id}")
        for _ in range(2):
            tracker.delete(project_id)
        _, run_id = tracker.open_run(project_id, {}, {})
        run = read(run_id)
        assert (run.accuracy, run.models, run.params) == ([], [], {})

    def test_no_run_goes_on_after_its_project(
        self, tracker: Tracker, read: Callable[[str], RecordedRun], project_id: ProjectId
    ) -> None:
        _, run_id = tracker.open_run(project_id, PARAMS, TAGS)
        tracker.log_round(run_id, round_of(1))
        failed = RunEnd(
            status=RunStatus.FAILED,
            summary="It failed.",
            tags={"flops.failure.code": "internal"},
            failure="Traceback\n",
        )
        for _ in range(2):
            tracker.end_runs(project_id, failed)
        assert (read(run_id).status, read(run_id).tags["flops.failure.code"]) == ("FAILED", "internal")
        # An aggregator that is still there, or was started once more, changes nothing of that.
        tracker.log_round(run_id, round_of(2))
        tracker.close_run(run_id, is_success=True)
        assert read(run_id).status == "FAILED"
        assert tracker.open_run(project_id, PARAMS, TAGS)[1] == run_id
        assert read(run_id).status == "FAILED"

    def test_a_stop_is_told_from_a_failure_in_whatever_order_it_comes(
        self, tracker: Tracker, read: Callable[[str], RecordedRun], project_id: ProjectId
    ) -> None:
        _, run_id = tracker.open_run(project_id, PARAMS, TAGS)
        tracker.close_run(run_id, is_success=False)
        tracker.end_runs(project_id, RunEnd(status=RunStatus.KILLED, summary="It was stopped."))
        assert read(run_id).status == "KILLED"

    def test_a_project_without_runs_ends_without_one(self, tracker: Tracker, project_id: ProjectId) -> None:
        tracker.end_runs(project_id, RunEnd(status=RunStatus.KILLED, summary="It was stopped."))
