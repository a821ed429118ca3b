"""Nodes that come, or come by data, while a training runs: which are taken in, and how.

Each gets one learner, which takes part from the next round on; in a hierarchical training it learns in its
node's own cluster. Nodes are looked for from the first round to the last but one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flops.core.change import Change
from flops.core.cluster import Node, ServiceKind
from flops.core.data_schemas import common_schema, schema_obstacle
from flops.core.effects import EffectKind
from flops.core.events import LateNode, NodesTakenIn
from flops.core.ids import NodeId, ServiceId, make_service_id
from flops.core.placement import fast_first, learner_obstacle
from flops.core.project import Placement, Project, Stage
from flops.core.service_moves import learner_ids, with_cluster


@dataclass(frozen=True)
class _Group:
    """The learners of one aggregator, and how many more it may have."""

    cluster: str  # "" when the training is not hierarchical
    generation: int
    room: int


def takes_in_nodes(project: Project) -> bool:
    """Whether it makes sense to go on looking for nodes: room comes and goes, rounds only go."""
    training = project.training
    if training is None or project.sla.training_configuration.max_clients is None:
        return False
    return project.stage is Stage.TRAINING and len(training.history) < training.rounds_total


def late_nodes(project: Project, nodes: Sequence[Node], paces: Mapping[str, float]) -> tuple[LateNode, ...]:
    """The nodes that the training takes in now; the same arguments give the same answer.

    Args:
        project: the project.
        nodes: all nodes of the cluster.
        paces: of nodes by name.
    """
    if project.placement is None or not takes_in_nodes(project):
        return ()
    placed = set(project.placement.learners)
    tags = project.sla.training_configuration.data_tags
    schema = common_schema((node for node in nodes if node.id in placed), tags)
    obstacle = learner_obstacle(project.sla, ())
    fitting = [
        node
        for node in fast_first(nodes, paces)
        if node.id not in placed and not obstacle(node) and not schema_obstacle(node, tags, schema)
    ]
    found: list[LateNode] = []
    for group in _groups(project):
        own = [node for node in fitting if group.cluster in {"", node.cluster}]
        found += [LateNode(id=n.id, name=n.name, cluster=group.cluster) for n in own[: group.room]]
    return tuple(found)


def take_in(change: Change, event: NodesTakenIn) -> None:
    """Give nodes a learner, as far as there is room for them still."""
    for late in event.nodes:
        project = change.project
        group = next((group for group in _groups(project) if group.cluster == late.cluster), None)
        if project.placement is None or late.id in project.placement.learners:
            continue
        if group is None or group.room < 1:
            continue
        number = len(project.placement.learners) + 1
        learner = make_service_id(ServiceKind.LEARNER.value, project.id, number, group.generation)
        _add(change, project.placement, late, learner)
        change.note(
            f"{late.name} is taken in. Its learner takes part in the rounds that begin after it has joined.",
            kind="node_taken_in",
            node=late.name,
            learner=learner,
            **({"cluster": late.cluster} if late.cluster else {}),
        )
        change.request(EffectKind.ADD_LEARNER, learner=learner, node=late.name)


def _add(change: Change, placement: Placement, late: LateNode, learner: ServiceId) -> None:
    project = change.project
    learners: tuple[NodeId, ...] = (*placement.learners, late.id)
    clusters = tuple(
        cluster.model_copy(update={"learners": (*cluster.learners, late.id)})
        if cluster.name == late.cluster
        else cluster
        for cluster in placement.clusters
    )
    if clusters:
        learners = tuple(node for cluster in clusters for node in cluster.learners)
    change.set(
        placement=placement.model_copy(update={"learners": learners, "clusters": clusters}),
        services=(*project.services, learner),
    )
    training = project.training
    cluster = next((c for c in training.clusters if c.name == late.cluster), None) if training else None
    if training is not None and cluster is not None:
        change.set(training=with_cluster(training, cluster, learners=(*cluster.learners, learner)))


def _groups(project: Project) -> Iterator[_Group]:
    """The aggregators that go on training after the round they are in."""
    configuration, training = project.sla.training_configuration, project.training
    if training is None or configuration.max_clients is None:
        return
    failed = set(project.failed_learners)
    if not training.clusters:
        room = configuration.max_clients - len(set(learner_ids(project)) - failed)
        if 0 < training.round_now < training.rounds_total:
            yield _Group("", project.learner_generation, room)
        return
    rounds = training.rounds_total * configuration.training_rounds
    for cluster in training.clusters:
        room = configuration.max_clients - len(set(cluster.learners) - failed)
        if cluster.address and not cluster.is_given_up and 0 < cluster.round_now < rounds:
            yield _Group(cluster.name, cluster.generation, room)
