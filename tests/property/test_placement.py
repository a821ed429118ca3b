"""What holds for every placement, whatever the nodes and the SLA."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from flops.core.cluster import IMAGE_BUILDER_ADDON, LEARNER_ADDON, Node
from flops.core.placement import BASE_MEMORY_MB, place_project
from flops.core.sla import ProjectSla
from flops.errors import ErrorCode, FlopsError
from flops.testing.projects import node_with, sla_with

ADDONS = st.sets(st.sampled_from([LEARNER_ADDON, IMAGE_BUILDER_ADDON])).map(lambda s: tuple(sorted(s)))
NODES = st.lists(
    st.builds(
        node_with,
        st.sampled_from([f"n{number}" for number in range(6)]),
        rows=st.sampled_from([0, 1, 2, 100]),
        tag=st.sampled_from(["mnist", "other"]),
        addons=ADDONS,
        cores=st.integers(1, 4),
        memory_mb=st.sampled_from([500, 1_000, 4_000, 16_000]),
        is_connected=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda node: node.id,
)
SLAS = st.builds(
    lambda clients: sla_with(min_available_clients=clients, min_fit_clients=1, min_evaluate_clients=1),
    st.integers(1, 5),
)


def is_capable(node: Node) -> bool:
    return (
        node.is_connected
        and node.has_addon(LEARNER_ADDON)
        and node.rows_of(("mnist",)) > 0
        and node.facts.memory_mb >= 100 + BASE_MEMORY_MB
    )


@given(sla=SLAS, nodes=NODES, needs_build=st.booleans(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_placement_is_sound_or_refused_with_reasons(
    sla: ProjectSla, nodes: list[Node], needs_build: bool, data: st.DataObject
) -> None:
    known = {node.id: node for node in nodes}
    try:
        placement = place_project(sla, nodes, needs_build)
    except FlopsError as exc:
        if exc.code is not ErrorCode.PLACEMENT_IMPOSSIBLE or (nodes and not exc.details["problems"]):
            raise
        return
    counts = Counter(placement.learners)
    assert sum(counts.values()) == sla.training_configuration.min_available_clients
    for node_id, count in counts.items():
        node = known[node_id]
        assert is_capable(node)
        assert count <= node.rows_of(("mnist",))
        assert count * (100 + BASE_MEMORY_MB) <= node.facts.memory_mb
    if max(counts.values()) > 1:
        assert all(node.id in counts for node in nodes if is_capable(node))
    assert known[placement.aggregator].is_connected
    assert (placement.builder is not None) == needs_build
    if placement.builder is not None:
        assert known[placement.builder].has_addon(IMAGE_BUILDER_ADDON)
    assert place_project(sla, data.draw(st.permutations(nodes)), needs_build) == placement
