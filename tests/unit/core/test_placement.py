"""Which node runs what, and why not."""

from __future__ import annotations

from collections import Counter

import pytest

from flops.core.cluster import IMAGE_BUILDER_ADDON, LEARNER_ADDON, Addon, AddonState, Node, NodeLoad
from flops.core.placement import (
    AGGREGATOR_BASE_MEMORY_MB,
    BASE_MEMORY_MB,
    aggregator_resources,
    learner_resources,
    place_inference,
    place_mock_providers,
    place_project,
)
from flops.core.sla import Packaging, ResourceConstraints
from flops.errors import ErrorCode, FlopsError
from flops.testing.projects import node_with, sla_with, with_columns

BOTH = (LEARNER_ADDON, IMAGE_BUILDER_ADDON)


def refusal(*arguments: object, **options: object) -> FlopsError:
    with pytest.raises(FlopsError) as caught:
        place_project(*arguments, **options)  # type: ignore[arg-type]
    assert caught.value.code is ErrorCode.PLACEMENT_IMPOSSIBLE
    return caught.value


def test_images_are_placed_on_nodes_that_run_containers() -> None:
    sla = sla_with().model_copy(update={"packaging": Packaging.IMAGE})
    node = node_with("a")
    error = refusal(sla, [node], needs_build=False)
    assert "a: runs no containers (`NodeEngine config virtualization container on`)" in error.message
    facts = node.facts.model_copy(update={"runtimes": ("container", "process")})
    placement = place_project(sla, [node.model_copy(update={"facts": facts})], needs_build=False)
    assert set(placement.learners) == {node.id}


def test_learners_are_spread_and_powerful_nodes_come_first() -> None:
    nodes = [
        node_with("small", cores=2),
        node_with("large", cores=32, addons=BOTH),
        node_with("gpu", cores=4, gpus=("T4",)),
    ]
    placement = place_project(sla_with(min_available_clients=2), nodes, needs_build=True)
    assert placement.learners == ("id-gpu", "id-large")
    assert placement.aggregator == "id-gpu"
    assert placement.builder == "id-large"
    assert placement.inference == "id-gpu"
    assert place_project(sla_with(), list(reversed(nodes)), needs_build=True) == placement


def test_the_aggregator_is_where_others_reach_it() -> None:
    def node(name: str, address: str, cluster: str, cores: int) -> Node:
        found = node_with(name, cores=cores).model_copy(update={"cluster": cluster})
        return found.model_copy(update={"facts": found.facts.model_copy(update={"address": address})})

    nodes = [
        node("far", "10.1.0.2", "edge-a", 64),
        node("hidden", "127.0.0.1", "default", 32),
        node("near", "10.0.0.2", "default", 2),
    ]
    assert place_project(sla_with(), nodes, needs_build=False).aggregator == "id-near"
    assert place_project(sla_with(), nodes[:2], needs_build=False).aggregator == "id-far"
    assert place_project(sla_with(), nodes[1:2], needs_build=False).aggregator == "id-hidden"


def test_nodes_are_doubled_up_evenly_only_when_there_are_too_few() -> None:
    nodes = [node_with("a"), node_with("b")]
    placement = place_project(sla_with(min_available_clients=5), nodes, needs_build=False)
    assert sorted(Counter(placement.learners).values()) == [2, 3]
    assert placement.builder is None


def test_a_node_takes_no_more_learners_than_it_has_rows_or_memory_for() -> None:
    sla = sla_with(min_available_clients=4)
    error = refusal(sla, [node_with("a", rows=1), node_with("b", memory_mb=2_000)], needs_build=False)
    assert "4 learners asked (min_available_clients), but the nodes can take only 3" in error.message
    assert "a: takes 1 learner," in error.message
    assert "b: takes 2 learners" in error.message
    placement = place_project(sla, [node_with("a", rows=1), node_with("b")], needs_build=False)
    assert Counter(placement.learners) == {"id-b": 3, "id-a": 1}


def test_storage_is_kept_free_for_each_learner() -> None:
    sla = sla_with(min_available_clients=3)
    sla = sla.model_copy(update={"resource_constraints": ResourceConstraints(storage=400)})
    nodes = [
        node_with(name).model_copy(update={"load": NodeLoad(disk_free_mb=free_mb)})
        for name, free_mb in (("large", 1_000), ("small", 399))
    ]
    error = refusal(sla, nodes, needs_build=False)
    assert "large: takes 2 learners" in error.message
    assert "small: 399 MB of free disk, storage asks for 400 MB" in error.message
    assert learner_resources(sla.resource_constraints).storage_mb == 400
    assert aggregator_resources(ResourceConstraints()).storage_mb is None


def test_gpus_are_for_learners_and_are_not_shared() -> None:
    sla = sla_with(min_available_clients=2)
    sla = sla.model_copy(update={"resource_constraints": ResourceConstraints(vgpus=1)})
    nodes = [node_with("none"), node_with("two", gpus=("T4", "T4")), node_with("one", gpus=("T4",))]
    placement = place_project(sla, nodes, needs_build=False)
    assert placement.learners == ("id-two", "id-one")
    assert place_project(sla, nodes[:2], needs_build=False).learners == ("id-two", "id-two")
    error = refusal(sla, [nodes[0], nodes[2]], needs_build=False)
    assert "none: no GPUs, vgpus asks for 1" in error.message
    assert "one: takes 1 learner" in error.message


def test_the_refusal_says_which_condition_failed_on_which_node() -> None:
    unhealthy = node_with("sick").model_copy(
        update={
            "addons": (Addon(name=LEARNER_ADDON, state=AddonState.UNHEALTHY, detail="Port 11027 is taken."),)
        }
    )
    busy = node_with("full-disk").model_copy(update={"load": NodeLoad(disk_free_mb=10)})
    nodes = [
        node_with("away", is_connected=False),
        node_with("plain", addons=()),
        unhealthy,
        node_with("other", tag="cifar"),
        node_with("tiny", memory_mb=512),
        node_with("arm", architecture="aarch64"),
        node_with("one-core", cores=1),
        busy,
    ]
    sla = sla_with()
    constraints = ResourceConstraints(memory=100, vcpus=2, storage=100)
    error = refusal(sla.model_copy(update={"resource_constraints": constraints}), nodes, needs_build=False)
    for part in (
        "2 learners asked (min_available_clients), but no node can take it",
        "away: not connected",
        "plain: addon FLOps-learner is off",
        "sick: addon FLOps-learner is unhealthy (Port 11027 is taken)",
        "other: no rows for the data tag 'mnist'",
        "tiny: 512 MB of memory, 868 MB are needed (memory 100 MB and 768 MB for the libraries)",
        "arm: its platform linux/arm64 is not among supported_platforms",
        "one-core: 1 CPU cores, vcpus asks for 2",
        "full-disk: 10 MB of free disk, storage asks for 100 MB",
    ):
        assert part in error.message
    assert {problem["node"] for problem in error.details["problems"]} == {node.name for node in nodes}


def test_a_cluster_without_nodes_is_said() -> None:
    assert "no node has joined the cluster" in refusal(sla_with(), [], needs_build=False).message


def test_rows_count_under_any_of_the_tags() -> None:
    sla = sla_with(data_tags=["a", "b"], min_available_clients=2)
    nodes = [node_with("x", tag="a"), node_with("y", tag="b")]
    assert set(place_project(sla, nodes, needs_build=False).learners) == {"id-x", "id-y"}
    error = refusal(sla, [node_with("z", tag="c")], needs_build=False)
    assert "no rows for the data tags 'a', 'b'" in error.message


def test_a_build_needs_a_node_with_the_builder_addon() -> None:
    error = refusal(sla_with(), [node_with("a"), node_with("b")], needs_build=True)
    assert "A node is needed for the image builder, but no node can take it" in error.message
    assert "a: addon image-builder is off" in error.message


def test_the_aggregator_needs_no_addon_and_no_data() -> None:
    nodes = [node_with("data", cores=1), node_with("compute", rows=0, addons=(), cores=64)]
    placement = place_project(
        sla_with(min_available_clients=1, min_fit_clients=1, min_evaluate_clients=1), nodes, False
    )
    assert (placement.aggregator, placement.learners) == ("id-compute", ("id-data",))


def test_the_aggregator_has_its_own_memory_check() -> None:
    nodes = [node_with("a", memory_mb=1_000), node_with("b", memory_mb=1_000)]
    error = refusal(sla_with(), nodes, needs_build=False)
    assert "the aggregator" in error.message
    assert f"1000 MB of memory, {100 + AGGREGATOR_BASE_MEMORY_MB} MB are needed" in error.message


def test_memory_limits_are_the_slas_on_top_of_a_base() -> None:
    constraints = ResourceConstraints(memory=200, vcpus=0.5)
    assert learner_resources(constraints).memory_mb == 200 + BASE_MEMORY_MB
    assert aggregator_resources(constraints).memory_mb == 200 + AGGREGATOR_BASE_MEMORY_MB
    assert learner_resources(constraints).vcpus == 0.5


def test_unknown_memory_is_no_obstacle() -> None:
    nodes = [node_with("a", memory_mb=0)]
    assert place_project(sla_with(), nodes, needs_build=False).learners == ("id-a", "id-a")


def test_the_inference_service_stays_where_it_was_planned_while_it_can() -> None:
    nodes = [node_with("strong", cores=64), node_with("planned")]
    assert place_inference(sla_with(), nodes, preferred=nodes[1].id) == "id-planned"
    gone = [nodes[0], nodes[1].model_copy(update={"is_connected": False})]
    assert place_inference(sla_with(), gone, preferred=nodes[1].id) == "id-strong"


def test_nodes_whose_columns_differ_from_those_of_most_are_passed_over() -> None:
    columns = {"image": "binary", "label": "int64"}
    nodes = [
        with_columns(
            node_with("strong", cores=64, rows=10_000), {"image": "binary", "label": "string", "x": "int8"}
        ),
        with_columns(node_with("a"), columns),
        with_columns(node_with("b"), {"label": "int64", "image": "large_binary"}),
        node_with("untold"),
    ]
    placement = place_project(sla_with(min_available_clients=3), nodes, needs_build=False)
    assert set(placement.learners) == {"id-a", "id-b", "id-untold"}
    error = refusal(sla_with(min_available_clients=800), nodes, needs_build=False)
    told = "strong: its rows tagged 'mnist' differ from those of other nodes: "
    assert f"{told}column 'label' is string instead of int64, column 'x' is only here" in error.message
    fewer = [nodes[0], with_columns(node_with("c", rows=10), {"image": "binary"})]
    # Of as many nodes each, those with more rows decide.
    assert set(place_project(sla_with(), fewer, needs_build=False).learners) == {"id-strong"}


def test_a_node_that_cannot_take_a_learner_does_not_decide_about_columns() -> None:
    odd = {"x": "double"}
    away = [with_columns(node_with(name, is_connected=False), odd) for name in ("away", "gone")]
    nodes = [*away, with_columns(node_with("here"), {"y": "double"})]
    assert set(place_project(sla_with(), nodes, needs_build=False).learners) == {"id-here"}


def test_nodes_that_were_faster_in_earlier_rounds_come_first() -> None:
    nodes = [node_with("big", cores=64), node_with("quick"), node_with("new"), node_with("usual")]
    paces = {"big": 2.0, "quick": 0.5, "usual": 1.1}
    placement = place_project(sla_with(), nodes, False, paces)
    assert placement.learners == ("id-quick", "id-new")  # 1.1 is no difference that counts: the name decides
    assert placement.aggregator == "id-big"
    spread = place_project(sla_with(min_available_clients=5), nodes, False, paces).learners
    assert Counter(spread) == {"id-quick": 2, "id-new": 1, "id-usual": 1, "id-big": 1}


def test_mock_data_goes_to_all_or_some_learner_nodes() -> None:
    nodes = [node_with("a", rows=0), node_with("b", rows=0), node_with("c", addons=())]
    assert [node.name for node in place_mock_providers(nodes, None)] == ["a", "b"]
    assert [node.name for node in place_mock_providers(nodes, 1)] == ["a"]
    with pytest.raises(
        FlopsError, match=r"3 learner nodes asked \(number_of_nodes\).*c: addon FLOps-learner"
    ):
        place_mock_providers(nodes, 3)
    with pytest.raises(FlopsError, match="Mock data needs a learner node, but no node"):
        place_mock_providers(nodes[2:], None)


def in_cluster(name: str, *nodes: Node) -> list[Node]:
    return [node.model_copy(update={"cluster": name}) for node in nodes]


def test_a_hierarchical_project_has_an_aggregator_and_learners_in_each_cluster() -> None:
    nodes = [
        *in_cluster("west", node_with("w1", cores=2), node_with("w2", cores=16)),
        *in_cluster("east", node_with("e1"), node_with("e2", rows=0)),
    ]
    placement = place_project(sla_with(mode="hierarchical"), nodes, needs_build=False)
    east, west = placement.clusters
    assert (east.name, east.aggregator, east.learners) == ("east", "id-e1", ("id-e1", "id-e1"))
    assert (west.name, west.aggregator, west.learners) == ("west", "id-w2", ("id-w2", "id-w1"))
    assert placement.aggregator == "id-w2"
    assert placement.learners == (*east.learners, *west.learners)
    assert placement.left_out == {}


def test_a_cluster_without_data_is_left_out_while_enough_others_are_there() -> None:
    nodes = [
        *in_cluster("east", node_with("e1")),
        *in_cluster("south", node_with("s1", rows=0)),
        *in_cluster("west", node_with("w1")),
    ]
    placement = place_project(sla_with(mode="hierarchical", min_clusters=2), nodes, needs_build=False)
    assert [cluster.name for cluster in placement.clusters] == ["east", "west"]
    assert "no rows for the data tag 'mnist'" in placement.left_out["south"]
    with pytest.raises(FlopsError, match=r"3 clusters needed.*south: .*no rows") as caught:
        place_project(sla_with(mode="hierarchical", min_clusters=3), nodes, needs_build=False)
    assert caught.value.code is ErrorCode.PLACEMENT_IMPOSSIBLE


def test_the_only_cluster_is_refused_as_in_the_classic_mode() -> None:
    nodes = in_cluster("east", node_with("e1", rows=0))
    with pytest.raises(FlopsError, match="2 learners asked") as caught:
        place_project(sla_with(mode="hierarchical"), nodes, needs_build=False)
    assert caught.value.code is ErrorCode.PLACEMENT_IMPOSSIBLE
    with pytest.raises(FlopsError, match="no node has joined"):
        place_project(sla_with(mode="hierarchical"), [], needs_build=False)
