"""Whole lives of projects on a cluster that the test plays."""

from __future__ import annotations

from flops.core.project import Stage
from flops.testing.projects import played_cluster, sla_with


def test_a_project_goes_from_submission_to_a_served_model() -> None:
    with played_cluster() as cluster:
        project = cluster.engine.submit(sla_with())
        assert project.stage is Stage.RESOLVING
        cluster.play_to_the_end(project.id)
        done = cluster.wait(project.id, lambda p: p.stage is Stage.COMPLETED and len(p.services) == 1)
        assert done.inference_url == "http://127.0.0.1:8080"
