"""`flops model` against a manager whose nodes the test plays."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flops.core.deployment import Deployment
from flops.errors import CATALOGUE, ErrorCode
from flops.testing.played_models import MODEL, PlayedModels
from flops.testing.waiting import until

from .conftest import Flops, Manager

URL = "http://10.0.0.1:8080"


@pytest.fixture
def played(manager: Manager) -> PlayedModels:
    return PlayedModels(manager.cluster)


@contextmanager
def meanwhile(played: PlayedModels, play: Callable[[Deployment], object]) -> Iterator[None]:
    """Play something as soon as a version is being started, while a command waits for it."""

    def wait_and_play() -> None:
        deployments = played.cluster.engine.deployments
        until(lambda: any(record.starting for record in deployments.all()), "the start of a version")
        play(played.record)

    thread = threading.Thread(target=wait_and_play)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def code_of(code: ErrorCode) -> int:
    return CATALOGUE[code].exit_code


def test_a_version_is_deployed_swapped_rolled_back_and_undeployed(flops: Flops, played: PlayedModels) -> None:
    with meanwhile(played, played.answer):
        first = flops("model", "deploy", MODEL, "--version", "1", "--node", "beta", "--port", "8080")
    assert (first.exit_code, first.out) == (0, f"{URL}\n")
    assert "Version 1 of model digits answers on beta" in first.err
    with meanwhile(played, played.answer):
        assert flops("model", "deploy", MODEL).out == f"{URL}\n"
    assert flops("model", "deploy", MODEL).out == f"{URL}\n", "it is deployed already"
    with meanwhile(played, played.answer):
        back = flops("model", "rollback", MODEL, "--format", "json").data
    assert (back["state"], back["url"], back["serving"]["version"]) == ("serving", URL, "1")
    listed = flops("model", "list")
    assert re.search(rf"digits +1 .*{URL} \(beta\)", listed.out)
    assert not re.search(rf"digits +2 .*{URL}", listed.out)
    shown = flops("model", "show", MODEL)
    assert "rolled back from version 2" in shown.out
    assert flops("model", "undeploy", MODEL).exit_code == 0
    assert played.record.state == "stopped"
    again = flops("model", "undeploy", MODEL)
    assert again.exit_code == code_of(ErrorCode.NOT_DEPLOYED)


def test_a_version_that_does_not_come_up_is_the_commands_failure(flops: Flops, played: PlayedModels) -> None:
    played.answer(played.deploy(version="1"))

    def fail(record: Deployment) -> None:
        assert record.starting is not None
        played.fail(record.starting.service_id, ErrorCode.MODEL_UNLOADABLE, "No module named pandas.")

    with meanwhile(played, fail):
        failed = flops("model", "deploy", MODEL)
    assert (failed.exit_code, failed.out) == (code_of(ErrorCode.MODEL_UNLOADABLE), "")
    assert "No module named pandas" in failed.err
    assert "Version 1 goes on serving" in failed.err
    assert "No module named pandas" in flops("model", "show", MODEL).out


def test_something_else_that_is_wanted_meanwhile_ends_the_wait(flops: Flops, played: PlayedModels) -> None:
    with meanwhile(played, lambda _: played.cluster.engine.deployments.undeploy(MODEL)):
        ended = flops("model", "deploy", MODEL)
    assert ended.exit_code == code_of(ErrorCode.CONFLICT)


def test_waiting_goes_on_over_a_restart_of_the_manager(
    flops: Flops, played: PlayedModels, manager: Manager
) -> None:
    def restart_and_answer(record: Deployment) -> None:
        manager.stop()
        manager.cluster.restart()
        manager.start()
        played.answer(record)

    with meanwhile(played, restart_and_answer):
        assert flops("model", "deploy", MODEL).out == f"{URL}\n"


def test_without_waiting_the_record_is_there_at_once(flops: Flops, played: PlayedModels) -> None:
    begun = flops("model", "deploy", MODEL, "--no-wait", "--format", "json").data
    assert (begun["state"], begun["starting"]["version"]) == ("starting", "2")


def test_what_is_unknown_has_its_own_code(flops: Flops, played: PlayedModels, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    for arguments, code in (
        (("deploy", "nothing"), ErrorCode.MODEL_NOT_FOUND),
        (("deploy", "a b?c"), ErrorCode.MODEL_NOT_FOUND),
        (("show", "nothing"), ErrorCode.MODEL_NOT_FOUND),
        (("predict", "nothing", rows), ErrorCode.MODEL_NOT_FOUND),
        (("deploy", MODEL, "--version", "9"), ErrorCode.MODEL_NOT_FOUND),
        (("deploy", MODEL, "--node", "nowhere"), ErrorCode.NODE_NOT_FOUND),
        (("deploy", MODEL, "--port", "0"), ErrorCode.USAGE),
        (("rollback", MODEL), ErrorCode.NOT_DEPLOYED),
        (("undeploy", MODEL), ErrorCode.NOT_DEPLOYED),
        (("predict", MODEL, rows), ErrorCode.NOT_DEPLOYED),
    ):
        assert flops("model", *arguments).exit_code == code_of(code), arguments
    assert "never deployed" in flops("model", "show", MODEL).err


def test_a_project_whose_model_is_deployed_is_not_deleted(flops: Flops, played: PlayedModels) -> None:
    with meanwhile(played, played.answer):
        flops("model", "deploy", MODEL)
    refused = flops("project", "delete", played.projects[1])
    assert refused.exit_code == code_of(ErrorCode.MODEL_DEPLOYED)
    assert "flops model undeploy" in refused.err
    assert flops("project", "delete", played.projects[0]).exit_code == 0


def test_the_deployed_model_is_asked(flops: Flops, played: PlayedModels, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b\n1,2\n")
    deployed = played.answer(played.deploy())
    unused = "127.0.0.1:9"
    played.cluster.orchestrator.tell(deployed, "listening", address=unused)
    played.until(lambda d: d.url == f"http://{unused}")
    asked = flops("model", "predict", MODEL, rows)
    assert asked.exit_code == code_of(ErrorCode.UNREACHABLE)
    assert unused in asked.err
