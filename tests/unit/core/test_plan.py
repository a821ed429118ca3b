"""What a plan tells of each node, and of a project that is impossible."""

from __future__ import annotations

import pytest

from flops.core.cluster import IMAGE_BUILDER_ADDON, LEARNER_ADDON, Node
from flops.core.placement import place_project
from flops.core.plan import ProjectPlan, plan_project
from flops.core.sla import Packaging, ProjectSla
from flops.errors import ErrorCode, FlopsError
from flops.testing.projects import node_with, sla_with, with_columns

BOTH = (LEARNER_ADDON, IMAGE_BUILDER_ADDON)


def plan(sla: ProjectSla, *nodes: Node, knows_environments: bool = False) -> ProjectPlan:
    return plan_project(sla, nodes, {"quick": 0.5}, knows_environments=knows_environments)


def runs(found: ProjectPlan) -> dict[str, dict[str, int]]:
    return {node.name: node.runs for node in found.nodes}


def test_a_plan_is_what_placement_decides() -> None:
    columns = {"x": "double"}
    nodes = [
        with_columns(node_with("big", addons=BOTH, cores=64), columns),
        with_columns(node_with("quick"), columns),
        with_columns(node_with("spare"), columns),
        node_with("other", tag="cifar"),
    ]
    found = plan(sla_with(), *nodes)
    assert found.is_possible
    assert runs(found) == {
        "big": {"learner": 1, "aggregator": 1, "builder": 1, "inference service": 1},
        "quick": {"learner": 1},
        "spare": {},
        "other": {},
    }
    placement = place_project(sla_with(), nodes, True, {"quick": 0.5})
    assert set(placement.learners) == {"id-big", "id-quick"}
    told = {node.name: node for node in found.nodes}
    assert told["other"].obstacles == {
        "learner": "no rows for the data tag 'mnist'",
        "builder": "addon image-builder is off",
    }
    assert (told["quick"].rows, told["quick"].pace, told["spare"].pace) == (100, 0.5, None)
    assert found.columns == columns
    found.check()


def test_an_impossible_project_is_planned_as_far_as_it_goes_with_every_reason() -> None:
    found = plan(sla_with(), node_with("a", rows=0, memory_mb=1_000), node_with("b", is_connected=False))
    assert not found.is_possible
    assert [problem.split(",")[0] for problem in found.problems] == [
        "2 learners asked (min_available_clients)",
        "A node is needed for the aggregator",
        "A node is needed for the image builder",
    ]
    a, b = found.nodes
    assert a.runs == {"inference service": 1}
    assert set(a.obstacles) == {"learner", "aggregator", "builder"}
    assert set(b.obstacles.values()) == {"not connected"}
    with pytest.raises(FlopsError) as refused:
        found.check()
    assert refused.value.code is ErrorCode.PLACEMENT_IMPOSSIBLE
    assert all(problem in refused.value.message for problem in found.problems)
    assert ProjectPlan.model_validate(refused.value.details["plan"]) == found


def test_whether_a_builder_is_needed_may_be_known_later_only() -> None:
    node = node_with("a")
    unsure = plan(sla_with(), node, knows_environments=True)
    assert unsure.is_possible
    assert any("addon image-builder is off" in note for note in unsure.notes)
    assert not plan(sla_with(), node).is_possible
    runs_containers = node.model_copy(
        update={"facts": node.facts.model_copy(update={"runtimes": ("process", "container")})}
    )
    images = sla_with().model_copy(update={"packaging": Packaging.IMAGE})
    assert not plan(images, runs_containers, knows_environments=True).is_possible


def test_clusters_have_aggregators_of_their_own_or_are_left_out() -> None:
    nodes = [node_with("e1", addons=BOTH), node_with("w1"), node_with("s1", rows=0)]
    placed = [
        node.model_copy(update={"cluster": name})
        for node, name in zip(nodes, ("east", "west", "south"), strict=True)
    ]
    found = plan(sla_with(mode="hierarchical"), *placed)
    assert found.is_possible
    assert set(found.left_out) == {"south"}
    assert runs(found)["w1"] == {"learner": 2, "cluster's aggregator": 1}
    assert runs(found)["e1"]["root aggregator"] == 1


def test_no_nodes_is_a_plan_as_well() -> None:
    found = plan(sla_with())
    assert found.nodes == ()
    assert "no node has joined the cluster" in found.problems[0]
