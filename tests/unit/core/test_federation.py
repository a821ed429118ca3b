"""What clusters have, and what is wrong with one."""

from __future__ import annotations

import pytest

from flops.core.cluster import LEARNER_ADDON
from flops.core.clusters import Cluster, check_cluster_name, find_cluster
from flops.core.federation import cluster_findings, summarize
from flops.core.health import Severity
from flops.errors import ErrorCode, FlopsError
from flops.testing.projects import node_with

CLUSTERS = [
    Cluster(name="default", is_connected=True),
    Cluster(name="edge-a", address="10.1.0.4:10100", version="2", is_connected=True),
    Cluster(name="edge-b", address="10.2.0.4:10100", version="2", last_seen_s=100.0),
]


def test_clusters_are_summed_up_from_their_connected_nodes() -> None:
    nodes = [node_with(name).model_copy(update={"cluster": "edge-a"}) for name in ("a", "b", "c")]
    nodes[2] = nodes[2].model_copy(update={"is_connected": False})
    rows = sum(tag.rows for node in nodes[:2] for tag in node.data_tags)
    assert rows > 0
    default, edge_a, edge_b = summarize(CLUSTERS, nodes)
    assert (edge_a.nodes, edge_a.nodes_connected, edge_a.addons) == (3, 2, {LEARNER_ADDON: 2})
    assert sum(edge_a.data_tags.values()) == rows
    assert (default.nodes, edge_b.nodes, edge_b.data_tags) == (0, 0, {})


def test_a_cluster_that_is_away_or_has_another_version_is_a_finding() -> None:
    found = [(f.where, f.severity) for f in cluster_findings(CLUSTERS, 700.0, "2")]
    assert found == [("edge-a", Severity.OK), ("edge-b", Severity.PROBLEM)]
    away = list(cluster_findings(CLUSTERS, 700.0, "2"))[-1]
    assert "last heard 10 min ago" in away.what
    assert "10.2.0.4" in away.advice
    assert Severity.WARNING in {f.severity for f in cluster_findings(CLUSTERS, 700.0, "1")}


@pytest.mark.parametrize(
    "name", ["", "default", "Edge", "a_b", "a.b", "-a", "a-", "a b", "é", "x" * 41, "a/../b"]
)
def test_what_is_no_name_of_a_cluster_is_refused(name: str) -> None:
    with pytest.raises(FlopsError) as caught:
        check_cluster_name(name)
    assert caught.value.code is ErrorCode.USAGE
    assert check_cluster_name("x" * 40) == "x" * 40


def test_a_cluster_that_is_not_there_is_told_with_those_that_are() -> None:
    assert find_cluster(CLUSTERS, "edge-a") is CLUSTERS[1]
    with pytest.raises(FlopsError, match="there are: default, edge-a, edge-b") as caught:
        find_cluster(CLUSTERS, "edge-c")
    assert caught.value.code is ErrorCode.CLUSTER_NOT_FOUND
