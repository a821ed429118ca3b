"""The shipped hierarchical SLA on one cluster, by the product's commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from flops.testing.example import example_deployment, sla_file, submit

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_cycles_of_rounds_in_one_cluster(tmp_path: Path) -> None:
    two = {"min_available_clients": 2, "min_fit_clients": 2, "min_evaluate_clients": 2}
    cycles = {"mode": "hierarchical", "training_cycles": 2, "training_rounds": 3}
    with example_deployment(tmp_path) as deployment:
        project_id = submit(
            deployment, sla_file(deployment, "tree", training_configuration={**two, **cycles})
        )
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
