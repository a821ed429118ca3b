from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flops.cli.output import say
from flops.cli.project_commands import resolve_repository
from flops.core.cluster import ServiceState
from flops.core.ids import ProjectId, ServiceId
from flops.core.project import Stage
from flops.errors import CATALOGUE, ErrorCode, FlopsError
from flops.testing.projects import REPO_URL, raw_sla

from .conftest import Flops, Manager


def write_sla(folder: Path, **changes: Any) -> Path:
    path = folder / "sla.json"
    path.write_text(json.dumps({**raw_sla(), **changes}))
    return path


def submit(flops: Flops, folder: Path) -> ProjectId:
    return ProjectId(flops("project", "create", write_sla(folder)).out.strip())


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Do something on another thread, and fail with what it raised."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as exc:  # noqa: BLE001 (told to the test)
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(30)
    assert not raised, raised


def only_project(manager: Manager) -> ProjectId:
    for _ in range(2_000):
        projects = manager.cluster.engine.projects()
        if projects:
            return projects[0].id
        threading.Event().wait(0.005)
    raise AssertionError("nothing was submitted")


def test_create_prints_the_id_alone_and_says_what_comes_next(flops: Flops, tmp_path: Path) -> None:
    outcome = flops("project", "create", write_sla(tmp_path))
    assert outcome.exit_code == 0
    project_id = outcome.out.strip()
    assert len(project_id) == 12
    assert f"flops project watch {project_id}" in outcome.err


def test_create_in_json(flops: Flops, tmp_path: Path) -> None:
    outcome = flops("project", "create", write_sla(tmp_path), "--format", "json")
    assert len(outcome.data["project_id"]) == 12


def test_plan_shows_where_a_project_would_run_and_starts_nothing(
    flops: Flops, manager: Manager, tmp_path: Path
) -> None:
    outcome = flops("project", "plan", write_sla(tmp_path))
    assert outcome.exit_code == 0, outcome.err
    alpha, beta = outcome.out.splitlines()[1:3]
    assert alpha.split() == ["alpha", "100", "learner,", "aggregator,", "builder,", "inference", "service"]
    assert beta.split()[:3] == ["beta", "100", "learner"]
    assert "builder: addon image-builder is off" in beta
    assert "The project can be placed" in outcome.err
    assert flops("project", "plan", write_sla(tmp_path), "--format", "json").data["problems"] == []
    assert manager.cluster.engine.projects() == []
    assert manager.cluster.orchestrator.services() == []


def test_plan_of_an_impossible_project_shows_every_reason(flops: Flops, tmp_path: Path) -> None:
    training = {"data_tags": ["nobody"], "min_available_clients": 3}
    sla = write_sla(tmp_path, training_configuration=training)
    outcome = flops("project", "plan", sla)
    assert outcome.exit_code == CATALOGUE[ErrorCode.PLACEMENT_IMPOSSIBLE].exit_code
    assert outcome.out.count("learner: no rows for the data tag 'nobody'") == 2
    assert "3 learners asked (min_available_clients), but no node can take it" in outcome.err
    error = flops("project", "plan", sla, "--format", "json").error
    assert error["code"] == "placement_impossible"
    assert [node["name"] for node in error["details"]["plan"]["nodes"]] == ["alpha", "beta"]
    broken = flops("project", "plan", write_sla(tmp_path, training_configuration={"data_tags": []}))
    assert broken.exit_code == CATALOGUE[ErrorCode.SLA_INVALID].exit_code


def test_watch_follows_a_project_to_its_end(flops: Flops, manager: Manager, tmp_path: Path) -> None:
    with meanwhile(lambda: manager.cluster.play_to_the_end(only_project(manager))):
        outcome = flops("project", "create", write_sla(tmp_path), "--watch")
    assert outcome.exit_code == 0, outcome.err
    assert len(outcome.out.split()) == 1
    lines = outcome.err.splitlines()
    assert [line for line in lines if "Round 2 of 3: 0.7200 accuracy, 0.5000 loss" in line]
    assert any("A learner on alpha has joined with 50 rows" in line for line in lines)
    assert "Best model:  round 3, accuracy 0.7300, loss 0.3300" in lines
    assert "Inference:   http://127.0.0.1:8080/invocations" in lines
    seqs = [line for line in lines if "begins with" in line]
    assert len(seqs) == 3, "no event is told twice"


def test_ctrl_c_ends_the_watching_only(
    flops: Flops, manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project_id = submit(flops, tmp_path)

    def say_and_interrupt(text: str) -> None:
        say(text)
        if "was accepted" in text:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr("flops.cli.project_watch.say", say_and_interrupt)
    outcome = flops("project", "watch", project_id, "--format", "json")
    assert outcome.exit_code == 130
    assert outcome.out == ""
    assert f"The project goes on. Watch it again with `flops project watch {project_id}`." in outcome.err
    assert not manager.cluster.engine.get(project_id).stage.is_final


def test_watch_draws_a_live_view_on_a_terminal(
    flops: Flops, manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    project_id = submit(flops, tmp_path)
    with meanwhile(lambda: manager.cluster.play_to_the_end(project_id)):
        monkeypatch.setattr("flops.cli.project_watch._is_terminal", lambda: True)
        monkeypatch.setenv("FORCE_COLOR", "1")
        outcome = flops("project", "watch", project_id)
    assert outcome.exit_code == 0, outcome.err
    assert "3 of 3 rounds" in outcome.err
    assert "accuracy 0.7300, loss 0.3333" in outcome.err
    assert "\x1b[" in outcome.err
    assert outcome.err.count("Round 2 of 3: ") == 1
    assert "Best model:  round 3" in outcome.err
    assert outcome.out == ""


def test_watch_in_json_is_one_envelope_with_the_project(
    flops: Flops, manager: Manager, tmp_path: Path
) -> None:
    project_id = submit(flops, tmp_path)
    with meanwhile(lambda: manager.cluster.play_to_the_end(project_id)):
        outcome = flops("project", "watch", project_id, "--format", "json")
    assert outcome.data["project_id"] == project_id
    assert outcome.data["project"]["stage"] == "completed"


def test_watch_goes_on_when_the_manager_comes_back(
    flops: Flops, manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project_id = submit(flops, tmp_path)
    cluster = manager.cluster
    is_round_seen, is_gap_seen = threading.Event(), threading.Event()

    def say_and_signal(text: str) -> None:
        say(text)
        if "Round 1 of 1: " in text:
            is_round_seen.set()
        if "waiting for the manager" in text:
            is_gap_seen.set()

    monkeypatch.setattr("flops.cli.project_watch.say", say_and_signal)

    def play() -> None:
        cluster.wait(project_id, lambda p: p.placement is not None)
        cluster.build(project_id)
        cluster.listen(project_id)
        cluster.join_learners(project_id)
        cluster.train(project_id, rounds=1)
        assert is_round_seen.wait(20)
        cluster.engine.close()
        manager.stop()
        assert is_gap_seen.wait(20)
        cluster.restart()
        manager.start()
        cluster.train(project_id, first=2)
        cluster.finish_training(project_id)
        cluster.serve(project_id)

    with meanwhile(play):
        outcome = flops("project", "watch", project_id)
    assert outcome.exit_code == 0, outcome.err
    for line in (
        "waiting for the manager",
        "The manager answers again.",
        "Round 1 of 1: ",
        "Round 2 of 3: ",
        "Round 3 of 3: ",
    ):
        assert outcome.err.count(line) == 1


def test_a_failure_ends_with_its_code_sentence_hint_and_traceback(
    flops: Flops, manager: Manager, tmp_path: Path
) -> None:
    project_id = submit(flops, tmp_path)
    cluster = manager.cluster

    def play() -> None:
        cluster.wait(project_id, lambda p: p.placement is not None)
        cluster.build(project_id)
        aggregator = cluster.listen(project_id)
        error = FlopsError(
            ErrorCode.USER_CODE_FAILED,
            "fit_model raised ValueError on alpha.",
            details={
                "traceback": 'File "model_manager.py", line 12\nValueError: no',
                "node": "alpha",
                "round": 2,
            },
        )
        cluster.orchestrator.tell(aggregator, "failed", error=error.to_dict())
        cluster.orchestrator.report(aggregator, ServiceState.FAILED, exit_code=40)

    with meanwhile(play):
        outcome = flops("project", "watch", project_id)
    assert outcome.exit_code == CATALOGUE[ErrorCode.USER_CODE_FAILED].exit_code
    assert "Error: fit_model raised ValueError on alpha. [user_code_failed]" in outcome.err
    assert 'File "model_manager.py", line 12' in outcome.err
    assert "round: 2" in outcome.err
    assert f"Hint: {CATALOGUE[ErrorCode.USER_CODE_FAILED].hint}" in outcome.err
    again = flops("project", "watch", project_id, "--format", "json")
    assert again.error["code"] == "user_code_failed"
    assert again.error["details"]["project_id"] == project_id
    shown = flops("project", "show", project_id)
    assert shown.exit_code == 0
    assert "Where" in shown.out
    assert 'File "model_manager.py", line 12' in shown.out


def test_a_stopped_project_is_no_success(flops: Flops, manager: Manager, tmp_path: Path) -> None:
    project_id = submit(flops, tmp_path)
    with meanwhile(lambda: manager.cluster.engine.stop(project_id)):
        outcome = flops("project", "watch", project_id)
    assert outcome.exit_code == CATALOGUE[ErrorCode.CONFLICT].exit_code
    assert "was stopped before it was completed" in outcome.err


def test_show_and_list(flops: Flops, manager: Manager, tmp_path: Path) -> None:
    project_id = submit(flops, tmp_path)
    manager.cluster.play_to_the_end(project_id)
    manager.cluster.wait(project_id, lambda p: p.stage is Stage.COMPLETED)
    shown = flops("project", "show", project_id)
    for text in ("completed since", "3 *", "0.7300", "alpha (50 rows)", f"inference-{project_id}"):
        assert text in shown.out
    data = flops("project", "show", project_id, "--format", "json").data
    assert set(data) == {"project", "learners", "services", "history"}
    assert {(learner["state"], learner["rows"]) for learner in data["learners"]} == {("ended", 50)}
    assert data["history"][0]["seq"] == 1
    listed = flops("project", "list")
    assert listed.out.splitlines()[0].split() == [
        "project", "stage", "round", "accuracy", "created", "doing"
    ]  # fmt: skip
    assert flops("p", "list", "--format", "json").data[0]["id"] == project_id
    models = flops("model", "list", "--format", "json").data
    assert models[0]["project_id"] == project_id
    assert project_id in flops("model", "list").out


def test_show_says_since_when_and_why_a_learner_restarts(
    flops: Flops, manager: Manager, tmp_path: Path
) -> None:
    project_id = submit(flops, tmp_path)
    cluster = manager.cluster
    cluster.wait(project_id, lambda p: p.placement is not None)
    cluster.build(project_id)
    cluster.listen(project_id)
    learner = cluster.join_learners(project_id)[0]
    cluster.wait(project_id, lambda p: p.training is not None and len(p.training.learners) == 2)
    error = FlopsError(ErrorCode.SERVICE_FAILED, "It crashed.", details={"output": "loads data\nSegfault!"})
    cluster.orchestrator.report(learner, ServiceState.RESTARTING, exit_code=-11, error=error.to_dict())
    cluster.wait(
        project_id, lambda p: any("exit code -11" in e.message for e in cluster.engine.history(p.id))
    )
    data = flops("project", "show", project_id, "--format", "json").data
    assert [item["state"] for item in data["learners"]] == ["restarting", "joined"]
    assert data["learners"][0]["reason"] == "It crashed. Its last line: Segfault!"
    assert data["project"]["doing_since_s"] > 0
    restarting = next(event for event in data["history"] if event["kind"] == "service_restarting")
    assert restarting["data"]["failure"]["details"]["output"] == "loads data\nSegfault!"
    shown = flops("project", "show", project_id).out
    for text in ("Doing since", "Learners", f"Last output of {learner}", "  loads data\n  Segfault!"):
        assert text in shown


def test_a_learners_traceback_is_shown_while_its_project_goes_on(
    flops: Flops, manager: Manager, tmp_path: Path
) -> None:
    project_id = submit(flops, tmp_path)
    cluster = manager.cluster
    cluster.wait(project_id, lambda p: p.placement is not None)
    cluster.build(project_id)
    aggregator = cluster.listen(project_id)
    learner = cluster.join_learners(project_id)[1]
    traceback = 'File "model_manager.py", line 12, in fit_model\nValueError: no'
    error = FlopsError(ErrorCode.USER_CODE_FAILED, "It failed to train.", details={"traceback": traceback})
    cluster.orchestrator.tell(
        aggregator,
        "learner_failed",
        learner=learner,
        node="beta",
        round=1,
        phase="train",
        error=error.to_dict(),
    )
    cluster.wait(project_id, lambda p: any(e.kind == "learner_failed" for e in cluster.engine.history(p.id)))
    shown = flops("project", "show", project_id)
    assert f"Traceback of {learner} in round 1\n{traceback}\n" in shown.out
    with meanwhile(lambda: cluster.play_to_the_end(project_id)):
        watched = flops("project", "watch", project_id)
    assert watched.exit_code == 0
    story = "Round 1, train: the learner on beta failed: It failed to train."
    assert f'{story}\n    File "model_manager.py", line 12, in fit_model\n    ValueError: no\n' in watched.err


def test_logs_of_all_services_of_a_kind_and_of_one(flops: Flops, manager: Manager, tmp_path: Path) -> None:
    project_id = submit(flops, tmp_path)
    manager.cluster.wait(project_id, lambda p: p.placement is not None)
    builder = ServiceId(f"builder-{project_id}")
    manager.cluster.wait_for_service(builder)
    manager.cluster.orchestrator.logs[builder] = "resolving\nbuilding\n"
    assert "resolving\nbuilding" in flops("project", "logs", project_id).out
    assert flops("project", "logs", project_id, "--service", "learner").out == ""
    assert "building" in flops("project", "logs", project_id, "--service", "builder").out
    data = flops("project", "logs", project_id, "--service", builder, "--format", "json").data
    assert [log["service_id"] for log in data] == [builder]
    unknown = flops("project", "logs", project_id, "--service", "nothing")
    assert unknown.exit_code == CATALOGUE[ErrorCode.SERVICE_NOT_FOUND].exit_code
    assert f"Hint: Its services are: {builder}." in unknown.err
    manager.cluster.engine.stop(project_id)
    followed = flops("project", "logs", project_id, "--follow")
    assert followed.out.count("building") == 1


def test_stop_and_delete(flops: Flops, manager: Manager, tmp_path: Path) -> None:
    project_id = submit(flops, tmp_path)
    assert flops("project", "stop", project_id).exit_code == 0
    manager.cluster.wait(project_id, lambda p: p.stage.is_final)
    deleted = flops("project", "delete", project_id, "--format", "json")
    assert "being deleted" in deleted.data["message"]
    for _ in range(1_000):
        if not manager.cluster.engine.projects():
            break
        threading.Event().wait(0.005)
    gone = flops("project", "watch", project_id)
    assert gone.exit_code == CATALOGUE[ErrorCode.PROJECT_NOT_FOUND].exit_code


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        ("{", "sla_unreadable", "is not JSON"),
        ("[]", "sla_unreadable", "no JSON object"),
        ('{"a": NaN}', "sla_unreadable", "NaN is no number"),
        ("[" * 100_000, "sla_unreadable", "nested too deeply"),
        ("\xff", "sla_unreadable", "is not JSON"),
        ("{}", "sla_invalid", "ml_repo_url: required key is missing"),
        (json.dumps({**raw_sla(), "rounds": 3}), "sla_invalid", "rounds: unknown key"),
    ],
)
def test_a_wrong_sla_is_refused_at_once(
    command: Flops, tmp_path: Path, content: str, code: str, text: str
) -> None:
    path = tmp_path / "sla.json"
    path.write_bytes(content.encode("latin-1"))
    outcome = command("project", "create", path, "--format", "json")
    assert outcome.error["code"] == code
    assert text in outcome.error["message"]
    assert outcome.exit_code == CATALOGUE[ErrorCode(code)].exit_code


def test_a_missing_sla_is_named(command: Flops, tmp_path: Path) -> None:
    outcome = command("project", "create", tmp_path / "no.json")
    assert f"{tmp_path / 'no.json'} cannot be read: No such file" in outcome.err


def test_paths_become_urls_and_urls_stay(tmp_path: Path) -> None:
    repository = tmp_path / "my repo"
    repository.mkdir()
    assert resolve_repository("my repo", tmp_path) == repository.as_uri()
    assert resolve_repository(str(repository), Path("/elsewhere")) == repository.as_uri()
    for url in (REPO_URL, "git@host:me/repo.git", "file:///srv/repo", "ssh://host/repo"):
        assert resolve_repository(url, tmp_path) == url
    with pytest.raises(FlopsError, match="there is no folder") as raised:
        resolve_repository("./nothing", tmp_path)
    assert raised.value.code is ErrorCode.REPO_UNREACHABLE
