"""Projects from submission to a served model, and those that fail, on real processes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from flops.errors import CATALOGUE, ErrorCode
from flops.testing.deployment import Deployment, commit_all
from flops.testing.example import (
    begin_fit_with,
    example_deployment,
    make_example,
    sla_file,
    submit,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROWS = 569  # of the breast cancer data; the last tenth is not handed out


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The example, on a control plane that all tests here share."""
    with example_deployment(tmp_path_factory.mktemp("deployment")) as deployment:
        yield deployment


def test_two_projects_at_once_serve_their_models(deployment: Deployment) -> None:
    two = {"min_available_clients": 2, "min_fit_clients": 2, "min_evaluate_clients": 2}
    sla = sla_file(
        deployment,
        "good",
        training_configuration=two,
        post_training_steps=["build_image_for_trained_model", "deploy_trained_model_image"],
    )
    ids = [submit(deployment, sla), submit(deployment, sla)]
    for project_id in ids:
        deployment.flops("project", "watch", project_id)
    shown = [deployment.ask("project", "show", project_id)["project"] for project_id in ids]
    for project in shown:
        assert project["stage"] == "completed"
        rounds = project["training"]["history"]
        assert [r["number"] for r in rounds] == list(range(1, project["training"]["rounds_total"] + 1))
        assert all(len(r["participants"]) == 2 for r in rounds)
        best = max(r["accuracy"] for r in rounds)
        assert project["model"]["accuracy"] == best
    assert shown[0]["inference_url"] != shown[1]["inference_url"]
    models = deployment.ask("model", "list")
    assert {model["project_id"] for model in models} >= set(ids)

    for project_id in ids:
        deployment.flops("project", "delete", project_id)
    deployment.wait_for(
        lambda: not {p["id"] for p in deployment.ask("project", "list")} & set(ids), "the deletion"
    )


def test_cycles_of_rounds_in_one_cluster(deployment: Deployment) -> None:
    """The shipped hierarchical mode, by the product's commands."""
    two = {"min_available_clients": 2, "min_fit_clients": 2, "min_evaluate_clients": 2}
    cycles = {"mode": "hierarchical", "training_cycles": 2, "training_rounds": 3}
    project_id = submit(deployment, sla_file(deployment, "tree", training_configuration={**two, **cycles}))
    watched = deployment.flops("project", "watch", project_id).stderr
    assert "There is one cluster only, default" in watched
    assert "The cluster default has joined the root aggregator" in watched
    assert "Cycle 1 of 2 begins with 1 cluster." in watched
    assert "Cycle 2, default: round 3 of 3: " in watched
    project = deployment.ask("project", "show", project_id)["project"]
    assert project["stage"] == "completed"
    history = project["training"]["history"]
    assert [cycle["number"] for cycle in history] == [1, 2]
    (part,) = history[1]["participants"]
    assert [own["number"] for own in part["rounds"]] == [4, 5, 6]
    assert all(len(own["participants"]) == 2 for own in part["rounds"])
    assert project["model"]["accuracy"] == max(cycle["accuracy"] for cycle in history)
    # One cluster's only update is the model of the root: both have evaluated the same.
    assert history[1]["accuracy"] == pytest.approx(part["rounds"][-1]["accuracy"])
    shown = deployment.flops("project", "show", project_id).stdout
    assert "Clusters" in shown
    assert "cycle 2, round 3 of 3" in shown


def test_a_node_that_comes_by_data_while_a_project_trains_is_taken_in(deployment: Deployment) -> None:
    """The third node joins with no data, in round 1; it gets data, and trains in a later round."""
    repository = make_example(deployment, "slow")
    begin_fit_with(repository, "import time; time.sleep(0.2)")
    commit_all(repository, "Take time")
    sla = sla_file(
        deployment,
        "late",
        "slow",
        training_configuration={"min_available_clients": 2, "max_clients": 3, "training_rounds": 200},
    )
    planned = deployment.ask("project", "plan", str(sla))
    assert [node["runs"].get("learner") for node in planned["nodes"]] == [1, 1]
    project_id = submit(deployment, sla)
    try:
        deployment.start_node("node-3", "FLOps-learner")
        deployment.wait_for(lambda: rounds_of(deployment, project_id) > 0, "the first round", 120)
        rows = deployment.home / "rows.parquet"
        homes = [str(deployment.home / name) for name in ("node-2", "node-3")]
        deployment.flops("data", "read", "breast_cancer", "--home", homes[0], "--output", str(rows))
        deployment.flops("data", "push", str(rows), "--home", homes[1], "--tag", "breast_cancer")
        deployment.wait_for(lambda: len(trained_last(deployment, project_id)) == 3, "node-3 to train", 120)
        told = [
            e for e in deployment.ask("project", "show", project_id)["history"] if "taken in" in e["message"]
        ]
        assert [event["data"]["node"].endswith("node-3") for event in told] == [True]
    finally:
        deployment.flops("project", "stop", project_id)
        deployment.node("node-3", "stop", exit_code=None)


def rounds_of(deployment: Deployment, project_id: str) -> int:
    return len(
        (deployment.ask("project", "show", project_id)["project"]["training"] or {}).get("history", ())
    )


def trained_last(deployment: Deployment, project_id: str) -> set[str]:
    last = deployment.ask("project", "show", project_id)["project"]["training"]["history"][-1]
    return {part["node"] for part in last["participants"] if part["rows"]}


def test_the_users_own_traceback_comes_back(deployment: Deployment) -> None:
    repository = make_example(deployment, "raises")
    begin_fit_with(repository, "1 / 0  # noqa")
    commit_all(repository, "Break it")
    sla = sla_file(deployment, "raises", ml_repo_url=repository.as_uri())
    failed = deployment.flops(
        "project", "create", str(sla), "--watch", exit_code=CATALOGUE[ErrorCode.USER_CODE_FAILED].exit_code
    )
    assert "ZeroDivisionError" in failed.stderr
    assert "model_manager.py" in failed.stderr
    assert "1 / 0" in failed.stderr


def test_a_tag_nobody_has_is_refused_before_anything_is_built(deployment: Deployment) -> None:
    sla = sla_file(deployment, "tag", training_configuration={"data_tags": ["nobody"]})
    refused = deployment.flops(
        "project", "create", str(sla), "--watch",
        exit_code=CATALOGUE[ErrorCode.PLACEMENT_IMPOSSIBLE].exit_code,
    )  # fmt: skip
    assert "no rows for the data tag 'nobody'" in refused.stderr


def test_a_repository_without_its_contract_is_refused(deployment: Deployment) -> None:
    repository = make_example(deployment, "incomplete")
    subprocess.run(["git", "-C", str(repository), "rm", "--quiet", "model_manager.py"], check=True)
    commit_all(repository, "Lose the model manager")
    sla = sla_file(deployment, "incomplete", ml_repo_url=repository.as_uri())
    refused = deployment.flops(
        "project", "create", str(sla), "--watch",
        exit_code=CATALOGUE[ErrorCode.REPO_CONTRACT_BROKEN].exit_code,
    )  # fmt: skip
    assert "model_manager.py" in refused.stderr
