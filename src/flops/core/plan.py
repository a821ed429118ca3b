"""What placement would decide about a project, and why, node by node; also when it is impossible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from pydantic import Field

from flops.core.cluster import Node
from flops.core.data_schemas import common_schema
from flops.core.ids import NodeId
from flops.core.model import Value
from flops.core.placement import (
    aggregator_obstacle,
    builder_obstacle,
    inference_obstacle,
    learner_obstacle,
    place_aggregator,
    place_builder,
    place_inference,
    place_training,
)
from flops.core.sla import Packaging, PostTrainingStep, ProjectSla
from flops.errors import ErrorCode, FlopsError

AGGREGATOR, ROOT, OF_CLUSTER = "aggregator", "root aggregator", "cluster's aggregator"
LEARNER, BUILDER, INFERENCE = "learner", "builder", "inference service"

T = TypeVar("T")


class NodePlan(Value):
    """A node's part in a plan."""

    id: NodeId
    name: str
    cluster: str
    rows: int  # with the project's data tags
    pace: float | None = None  # seconds a row beside other nodes, in earlier rounds: 2 is half as fast
    runs: dict[str, int] = Field(default_factory=dict)  # what it would run, and how many of it
    obstacles: dict[str, str] = Field(default_factory=dict)  # what it cannot run, and why


class ProjectPlan(Value):
    """What would become of a project that is submitted now. Nothing is started or kept for it."""

    nodes: tuple[NodePlan, ...]  # by name
    problems: tuple[str, ...] = ()  # why the project is impossible; none if it is possible
    left_out: dict[str, str] = Field(default_factory=dict)  # clusters that would take no part, and why
    columns: dict[str, str] = Field(default_factory=dict)  # of the learners' data; empty if not known
    notes: tuple[str, ...] = ()  # what is known only later

    @property
    def is_possible(self) -> bool:
        """Whether the project can be placed."""
        return not self.problems

    def check(self) -> None:
        """Refuse an impossible project.

        Raises:
            FlopsError: ``placement_impossible``, with the plan among its details.
        """
        if self.problems:
            details = {"plan": self.model_dump(mode="json")}
            raise FlopsError(ErrorCode.PLACEMENT_IMPOSSIBLE, " ".join(self.problems), details=details)


def plan_project(
    sla: ProjectSla, nodes: Sequence[Node], paces: Mapping[str, float], *, knows_environments: bool
) -> ProjectPlan:
    """Plan a project by the rules of `flops.core.placement.place_project`.

    Args:
        sla: what is asked for.
        nodes: all nodes of the cluster, connected or not.
        paces: of nodes by name.
        knows_environments: whether any environment is built already, so that this project's may be.
    """
    problems: list[str] = []
    notes = ["The repository is not looked at: whether its code fits the data shows when it runs."]
    training = _try(lambda: place_training(sla, nodes, paces), problems)
    clusters, left_out, learners = training or ((), {}, ())
    is_hierarchical = sla.training_configuration.is_hierarchical
    root = ROOT if is_hierarchical else AGGREGATOR
    chosen: list[tuple[str, NodeId | None]] = [(LEARNER, node) for node in learners]
    chosen += [(OF_CLUSTER, cluster.aggregator) for cluster in clusters]
    chosen += [(root, _try(lambda: place_aggregator(sla, nodes), problems))]
    is_build_sure = sla.packaging is Packaging.IMAGE or not knows_environments
    if not is_build_sure:
        notes.append("A builder is needed unless the environment is one that was built before.")
    chosen += [(BUILDER, _try(lambda: place_builder(nodes), problems if is_build_sure else notes))]
    obstacles = {
        LEARNER: learner_obstacle(sla, nodes),
        root: aggregator_obstacle(sla),
        BUILDER: builder_obstacle,
    }
    if PostTrainingStep.DEPLOY_IMAGE in sla.post_training_steps:
        chosen += [(INFERENCE, _try(lambda: place_inference(sla, nodes), problems))]
        obstacles[INFERENCE] = inference_obstacle(sla)
    tags = sla.training_configuration.data_tags
    capable = [node for node in nodes if not obstacles[LEARNER](node)]
    return ProjectPlan(
        nodes=tuple(
            NodePlan(
                id=node.id,
                name=node.name,
                cluster=node.cluster,
                rows=node.rows_of(tags),
                pace=paces.get(node.name),
                runs=Counter(what for what, node_id in chosen if node_id == node.id),
                obstacles={what: why for what, obstacle in obstacles.items() if (why := obstacle(node))},
            )
            for node in sorted(nodes, key=lambda node: (node.cluster, node.name, node.id))
        ),
        problems=tuple(problems),
        left_out=left_out,
        columns=dict(common_schema(capable, tags) or ()),
        notes=tuple(notes),
    )


def _try(place: Callable[[], T], problems: list[str]) -> T | None:
    try:
        return place()
    except FlopsError as exc:
        problems.append(exc.message)
        return None
