"""Which node runs what of a project, decided from facts alone; and why it is impossible, node by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from flops.core.cluster import (
    CONTAINER_RUNTIME,
    IMAGE_BUILDER_ADDON,
    LEARNER_ADDON,
    AddonState,
    Node,
    Resources,
)
from flops.core.clusters import DEFAULT_CLUSTER
from flops.core.data_schemas import common_schema, schema_obstacle
from flops.core.health import is_loopback
from flops.core.ids import NodeId
from flops.core.node_paces import pace_step
from flops.core.platforms import Platform
from flops.core.project import ClusterPlacement, Placement
from flops.core.sla import Packaging, PostTrainingStep, ProjectSla, ResourceConstraints
from flops.errors import ErrorCode, FlopsError

# What an interpreter with the libraries of machine learning takes before the first row is loaded. The SLA's
# memory comes on top (docs/adr/0002-memory-limits.md).
BASE_MEMORY_MB = 768
# The aggregator has Flower and MLflow, and beside it the processes that make the first parameters and
# export the model.
AGGREGATOR_BASE_MEMORY_MB = 1536

_PLATFORMS = {name: p.value for p in Platform for name in (p.machine, p.architecture)}

NO_PACES: Mapping[str, float] = {}

Obstacle = Callable[[Node], str]  # why a node cannot take something, "" if it can


def learner_resources(constraints: ResourceConstraints) -> Resources:
    """The limits under which a learner or an inference service runs."""
    return _resources(constraints, BASE_MEMORY_MB)


def aggregator_resources(constraints: ResourceConstraints) -> Resources:
    """The limits under which the aggregator runs."""
    return _resources(constraints, AGGREGATOR_BASE_MEMORY_MB)


def _resources(constraints: ResourceConstraints, base_memory_mb: int) -> Resources:
    return Resources(
        memory_mb=constraints.memory + base_memory_mb,
        vcpus=constraints.vcpus,
        storage_mb=constraints.storage or None,
    )


def place_project(
    sla: ProjectSla, nodes: Sequence[Node], needs_build: bool, paces: Mapping[str, float] = NO_PACES
) -> Placement:
    """Choose the nodes of a project; the same arguments give the same answer.

    Learners are spread over capable nodes, fast and powerful ones first, and doubled up only when there are
    more learners than capable nodes (docs/adr/0005-learners-per-node.md).

    Args:
        sla: what is asked for.
        nodes: all nodes of the cluster, connected or not.
        needs_build: whether a builder is needed.
        paces: of nodes by name, as `flops.core.node_paces` measures them.

    Raises:
        FlopsError: ``placement_impossible``: which condition failed on which node.
    """
    clusters, left_out, learners = place_training(sla, nodes, paces)
    serves = PostTrainingStep.DEPLOY_IMAGE in sla.post_training_steps
    return Placement(
        aggregator=place_aggregator(sla, nodes),
        learners=learners,
        builder=place_builder(nodes) if needs_build else None,
        inference=place_inference(sla, nodes) if serves else None,
        clusters=clusters,
        left_out=left_out,
    )


def place_training(
    sla: ProjectSla, nodes: Sequence[Node], paces: Mapping[str, float] = NO_PACES
) -> tuple[tuple[ClusterPlacement, ...], dict[str, str], tuple[NodeId, ...]]:
    """Choose the nodes of the learners, in a hierarchical training those of clusters' aggregators, too.

    Returns:
        The clusters, none if it is not hierarchical; the clusters that are left out, and why; the learners.

    Raises:
        FlopsError: ``placement_impossible``.
    """
    ranked = fast_first(nodes, paces)
    if not sla.training_configuration.is_hierarchical:
        return (), {}, _place_learners(sla, ranked, learner_obstacle(sla, nodes))
    clusters, left_out = _place_clusters(sla, ranked)
    return clusters, left_out, tuple(node for cluster in clusters for node in cluster.learners)


def fast_first(nodes: Sequence[Node], paces: Mapping[str, float]) -> list[Node]:
    """The nodes in the order in which they get learners."""
    return sorted(nodes, key=lambda node: (pace_step(paces, node.name), _rank(node)))


def place_aggregator(sla: ProjectSla, nodes: Sequence[Node]) -> NodeId:
    """Choose the node of the aggregator, in a hierarchical training of the root.

    It is dialled from everywhere: one that is only reached on its own machine comes last, and other sites are
    likelier to reach the manager's own cluster than each other.

    Raises:
        FlopsError: ``placement_impossible``.
    """
    is_spread = not all(is_loopback(node.facts.address) for node in nodes)

    def reach(node: Node) -> tuple[bool, bool]:
        return is_spread and is_loopback(node.facts.address), node.cluster != DEFAULT_CLUSTER

    order = sorted(nodes, key=lambda node: (reach(node), _rank(node)))
    return _first_capable("the aggregator", order, aggregator_obstacle(sla))


def place_builder(nodes: Sequence[Node]) -> NodeId:
    """Choose the node of a builder.

    Raises:
        FlopsError: ``placement_impossible``.
    """
    return _first_capable("the image builder", sorted(nodes, key=_rank), builder_obstacle)


def place_inference(sla: ProjectSla, nodes: Sequence[Node], *, preferred: NodeId | None = None) -> NodeId:
    """Choose the node of an inference service: the preferred one while it can take it.

    Raises:
        FlopsError: ``placement_impossible``.
    """
    order = sorted(nodes, key=lambda node: (node.id != preferred, _rank(node)))
    return _first_capable("the inference service", order, inference_obstacle(sla))


def place_mock_providers(nodes: Sequence[Node], wanted: int | None) -> tuple[Node, ...]:
    """Choose the learner nodes that receive mock data: `wanted` of them, all when None.

    Raises:
        FlopsError: ``placement_impossible`` when there is none, or there are fewer than wanted.
    """
    ordered = sorted(nodes, key=_rank)
    capable = tuple(node for node in ordered if not _addon_obstacle(node, LEARNER_ADDON))
    asked = 1 if wanted is None else wanted
    if len(capable) < asked:
        what = (
            "Mock data needs a learner node"
            if wanted is None
            else f"{wanted} learner nodes asked (number_of_nodes)"
        )
        raise _impossible(what, ordered, lambda node: _addon_obstacle(node, LEARNER_ADDON), len(capable))
    return capable if wanted is None else capable[:wanted]


def _place_clusters(
    sla: ProjectSla, nodes: Sequence[Node]
) -> tuple[tuple[ClusterPlacement, ...], dict[str, str]]:
    """The clusters that can take part, by name; and why each other one can not."""
    host, learner = aggregator_obstacle(sla), learner_obstacle(sla, nodes)
    placed: list[ClusterPlacement] = []
    left_out: dict[str, str] = {}
    refusal: FlopsError | None = None
    for name in sorted({node.cluster for node in nodes}):
        own = [node for node in nodes if node.cluster == name]
        try:
            aggregator = _first_capable("a cluster's aggregator", sorted(own, key=_rank), host)
            learners = _place_learners(sla, own, learner)
            placed.append(ClusterPlacement(name=name, aggregator=aggregator, learners=learners))
        except FlopsError as exc:
            left_out[name], refusal = exc.message, exc
    needed = sla.training_configuration.min_clusters
    if len(placed) >= needed:
        return tuple(placed), left_out
    if refusal is not None and len(left_out) == 1 and needed == 1:
        raise refusal
    if not nodes:
        _place_learners(sla, nodes, learner)  # says that there is none
    problems = [{"cluster": name, "problem": why} for name, why in left_out.items()]
    reasons = "".join(f"; {name}: {why.rstrip('.')}" for name, why in left_out.items())
    raise FlopsError(
        ErrorCode.PLACEMENT_IMPOSSIBLE,
        f"{needed} cluster{'s' if needed > 1 else ''} needed (min_clusters), but {len(placed)} can take part"
        f"{reasons}.",
        details={"problems": problems},
    )


def _place_learners(sla: ProjectSla, nodes: Sequence[Node], obstacle: Obstacle) -> tuple[NodeId, ...]:
    wanted = sla.training_configuration.min_available_clients
    room = {node.id: _learner_room(sla, node) for node in nodes if not obstacle(node)}
    what = f"{wanted} learner{'s' if wanted > 1 else ''} asked (min_available_clients)"
    taken: Counter[NodeId] = Counter()
    chosen: list[NodeId] = []
    while len(chosen) < wanted:
        free = [node_id for node_id in room if taken[node_id] < room[node_id]]
        if not free:
            raise _impossible(what, nodes, lambda node: obstacle(node) or _full(room[node.id]), len(chosen))
        spread = min(free, key=lambda node_id: taken[node_id])  # of equal ones the first
        taken[spread] += 1
        chosen.append(spread)
    return tuple(chosen)


def _learner_room(sla: ProjectSla, node: Node) -> int:
    """How many learners fit on a capable node: each needs memory, GPUs, storage, and a row of its own."""
    asked = sla.resource_constraints
    room = [node.rows_of(sla.training_configuration.data_tags)]
    if asked.vgpus:
        room.append(len(node.facts.gpus) // asked.vgpus)
    if node.facts.memory_mb:
        room.append(node.facts.memory_mb // _memory_mb(learner_resources(asked)))
    if asked.storage and (free_mb := _free_mb(node)):
        room.append(free_mb // asked.storage)
    return min(room)


def _first_capable(what: str, nodes: Sequence[Node], obstacle: Obstacle) -> NodeId:
    for node in nodes:
        if not obstacle(node):
            return node.id
    raise _impossible(f"A node is needed for {what}", nodes, obstacle, 0)


def learner_obstacle(sla: ProjectSla, nodes: Sequence[Node]) -> Obstacle:
    """Why a node can take no learner.

    Args:
        sla: what is asked for.
        nodes: all nodes; what most of the capable ones have decides which columns the data have.
    """
    tags = sla.training_configuration.data_tags

    def own_obstacle(node: Node) -> str:
        return (
            _addon_obstacle(node, LEARNER_ADDON)
            or _rows_obstacle(node, tags)
            or _runtime_obstacle(node, sla)
            or _resource_obstacle(node, sla, learner_resources(sla.resource_constraints))
            or _gpu_obstacle(node, sla.resource_constraints.vgpus)
        )

    schema = common_schema((node for node in nodes if not own_obstacle(node)), tags)
    return lambda node: own_obstacle(node) or schema_obstacle(node, tags, schema)


def aggregator_obstacle(sla: ProjectSla) -> Obstacle:
    """Why a node can take no aggregator."""
    return _host_obstacle(sla, aggregator_resources(sla.resource_constraints))


def inference_obstacle(sla: ProjectSla) -> Obstacle:
    """Why a node can take no inference service."""
    return _host_obstacle(sla, learner_resources(sla.resource_constraints))


def builder_obstacle(node: Node) -> str:
    """Why a node can take no builder."""
    return _addon_obstacle(node, IMAGE_BUILDER_ADDON)


def _host_obstacle(sla: ProjectSla, resources: Resources) -> Obstacle:
    return lambda node: (
        _away(node) or _runtime_obstacle(node, sla) or _resource_obstacle(node, sla, resources)
    )


def _away(node: Node) -> str:
    return "" if node.is_connected else "not connected"


def _runtime_obstacle(node: Node, sla: ProjectSla) -> str:
    if sla.packaging is Packaging.IMAGE and CONTAINER_RUNTIME not in node.facts.runtimes:
        return "runs no containers (`NodeEngine config virtualization container on`)"
    return ""


def _addon_obstacle(node: Node, name: str) -> str:
    if not node.is_connected:
        return _away(node)
    addon = next((addon for addon in node.addons if addon.name == name), None)
    if addon is None:
        return f"addon {name} is off"
    if addon.state is AddonState.HEALTHY:
        return ""
    return f"addon {name} is {addon.state.value}" + (f" ({addon.detail.rstrip('.')})" if addon.detail else "")


def _rows_obstacle(node: Node, tags: tuple[str, ...]) -> str:
    if node.rows_of(tags) > 0:
        return ""
    wanted = ", ".join(f"'{tag}'" for tag in tags)
    return f"no rows for the data tag{'s' if len(tags) > 1 else ''} {wanted}"


def _resource_obstacle(node: Node, sla: ProjectSla, resources: Resources) -> str:
    facts = node.facts
    asked = sla.resource_constraints
    memory_mb = _memory_mb(resources)
    platform = _PLATFORMS.get(facts.architecture, facts.architecture)
    if platform not in {p.value for p in sla.supported_platforms}:
        return f"its platform {platform} is not among supported_platforms"
    if facts.memory_mb and facts.memory_mb < memory_mb:
        return (
            f"{facts.memory_mb} MB of memory, {memory_mb} MB are needed "
            f"(memory {asked.memory} MB and {memory_mb - asked.memory} MB for the libraries)"
        )
    if facts.cpu_cores < asked.vcpus:
        return f"{facts.cpu_cores} CPU cores, vcpus asks for {asked.vcpus:g}"
    free_mb = _free_mb(node)
    if free_mb and free_mb < asked.storage:
        return f"{free_mb} MB of free disk, storage asks for {asked.storage} MB"
    return ""


def _free_mb(node: Node) -> int:
    """Free disk; 0 where it is not known."""
    return node.load.disk_free_mb or node.facts.disk_free_mb


def _gpu_obstacle(node: Node, asked: int) -> str:
    gpus = len(node.facts.gpus)
    if gpus >= asked:
        return ""
    return f"{gpus or 'no'} GPU{'' if gpus == 1 else 's'}, vgpus asks for {asked}"


def _full(learners: int) -> str:
    return f"takes {learners} learner{'s' if learners != 1 else ''}, its memory, GPUs or rows allow no more"


def _memory_mb(resources: Resources) -> int:
    return resources.memory_mb or 0


def _rank(node: Node) -> tuple[int, int, int, str]:
    """Powerful nodes first; the name makes the order the same every time."""
    facts = node.facts
    return (-len(facts.gpus), -facts.cpu_cores, -facts.memory_mb, f"{node.name}/{node.id}")


def _impossible(what: str, nodes: Sequence[Node], obstacle: Obstacle, possible: int) -> FlopsError:
    problems = [{"node": node.name, "problem": obstacle(node)} for node in nodes]
    problems = [entry for entry in problems if entry["problem"]]
    if not nodes:
        sentence = "no node has joined the cluster"
    else:
        counted = "no node can take it" if possible == 0 else f"the nodes can take only {possible}"
        sentence = f"{counted}: " + "; ".join(f"{p['node']}: {p['problem']}" for p in problems)
    return FlopsError(
        ErrorCode.PLACEMENT_IMPOSSIBLE, f"{what}, but {sentence}.", details={"problems": problems}
    )
