"""What the clusters of a federation have, told by their nodes, and what is wrong with one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from pydantic import Field

from flops.core.cluster import Node
from flops.core.clusters import DEFAULT_CLUSTER, Cluster
from flops.core.health import Finding, ago, fine, problem, version_findings


class ClusterSummary(Cluster):
    """A cluster with what its connected nodes have."""

    nodes: int = 0
    nodes_connected: int = 0
    addons: dict[str, int] = Field(default_factory=dict)  # on how many nodes an addon is healthy
    data_tags: dict[str, int] = Field(default_factory=dict)  # rows


def summarize(clusters: Sequence[Cluster], nodes: Sequence[Node]) -> list[ClusterSummary]:
    """All clusters, each with what its nodes have.

    Args:
        clusters: all clusters.
        nodes: the nodes of all of them.
    """
    summaries = []
    for cluster in clusters:
        own = [node for node in nodes if node.cluster == cluster.name]
        there = [node for node in own if node.is_connected]
        rows: Counter[str] = Counter()
        for tag in (tag for node in there for tag in node.data_tags):
            rows[tag.name] += tag.rows
        addons = Counter(a.name for node in there for a in node.addons if node.has_addon(a.name))
        summaries.append(
            ClusterSummary(
                **dict(cluster),
                nodes=len(own),
                nodes_connected=len(there),
                addons=dict(sorted(addons.items())),
                data_tags=dict(sorted(rows.items())),
            )
        )
    return summaries


def cluster_findings(clusters: Sequence[Cluster], now_s: float, version: str) -> Iterator[Finding]:
    """How the further clusters are; nothing of the manager's own.

    Args:
        clusters: all clusters.
        now_s: the time, in seconds since the epoch.
        version: of the control plane.
    """
    for cluster in clusters:
        if cluster.name == DEFAULT_CLUSTER:
            continue
        if cluster.is_connected:
            yield fine("clusters", cluster.name, f"It is connected; its nodes reach it at {cluster.address}.")
            yield from version_findings(cluster.version, version, cluster.name)
            continue
        since = f", and was last heard {ago(now_s - cluster.last_seen_s)} ago" if cluster.last_seen_s else ""
        advice = (
            f"Run `flops cluster up` on its machine ({cluster.address.rpartition(':')[0]}), and look at its "
            "way to this one; `flops cluster remove` forgets it."
        )
        yield problem("clusters", cluster.name, f"It is not connected{since}.", advice)
