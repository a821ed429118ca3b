"""Nodes that come while a training runs."""

from __future__ import annotations

from typing import Any

import pytest

from flops.core import events as life
from flops.core.change import Step
from flops.core.cluster import Node, ServiceState
from flops.core.effects import EffectKind
from flops.core.ids import Digest, EnvironmentKey, NodeId, ProjectId, ServiceId
from flops.core.late_nodes import late_nodes, takes_in_nodes
from flops.core.lifecycle import new_project, step
from flops.core.placement import place_project
from flops.core.project import Environment, Failure, Project, ProjectEvent, Repository, Round, Stage
from flops.core.sla import parse_project_sla
from flops.errors import ErrorCode, FlopsError
from flops.testing.projects import node_with, raw_sla, sla_with, with_columns

REPOSITORY = Repository(
    commit="c" * 40, bundle=Digest("b"), dependency_file="conda.yml", environment_key=EnvironmentKey("k")
)
ENVIRONMENT = Environment(key=EnvironmentKey("k"), lock=Digest("l"), model_lock=Digest("m"))
AGGREGATOR, OF_EAST, OF_WEST = "aggregator-p1", "aggregator-p1-1", "aggregator-p1-2"
X, Y = {"x": "double"}, {"y": "double"}


class Running:
    """A project that is placed on these nodes and whose aggregator listens; its cluster may grow."""

    def __init__(self, *nodes: Node, **training: Any) -> None:
        sla = sla_with(**{"max_clients": 4, **training})
        self.nodes = list(nodes)
        self.steps: list[Step] = []
        self.project: Project = new_project(ProjectId("p1"), sla, 1.0)
        self.happen(
            life.Submitted(),
            life.RepositoryResolved(repository=REPOSITORY, environment=ENVIRONMENT),
            life.PlacementDecided(placement=place_project(sla, nodes, needs_build=False)),
        )
        self.listen(AGGREGATOR, "h:1")

    def happen(self, *events: life.LifecycleEvent) -> None:
        for event in events:
            self.steps.append(step(self.project, event, 2.0))
            self.project = self.steps[-1].project

    def listen(self, aggregator: str, address: str) -> None:
        self.happen(life.AggregatorListening(service_id=ServiceId(aggregator), address=address))

    def begin_round(self, number: int, aggregator: str = AGGREGATOR, *, rounds: int = 3) -> None:
        self.happen(life.RoundStarted(round=number, rounds=rounds, aggregator=aggregator))

    def found(self) -> list[str]:
        return [late.name for late in late_nodes(self.project, self.nodes, {"quick": 0.5})]

    def take_in(self) -> list[str]:
        """Let the manager look once; returns whom it takes in."""
        found = late_nodes(self.project, self.nodes, {})
        if found:
            self.happen(life.NodesTakenIn(nodes=found))
        return [late.name for late in found]

    def payloads(self, kind: EffectKind) -> list[dict[str, Any]]:
        return [e.payload for one in self.steps for e in one.effects if e.kind is kind]

    def told(self, kind: str) -> list[ProjectEvent]:
        return [line for one in self.steps for line in one.history if line.kind == kind]


def in_cluster(name: str, *nodes: Node) -> list[Node]:
    return [node.model_copy(update={"cluster": name}) for node in nodes]


def test_a_node_that_joins_gets_a_learner_for_the_next_round() -> None:
    running = Running(node_with("a"), node_with("b"))
    assert running.found() == []
    running.nodes.append(node_with("c"))
    assert running.found() == []  # before the first round, learners are still waited for
    running.begin_round(1)
    assert running.payloads(EffectKind.LOOK_FOR_NODES) == [{}]
    assert running.take_in() == ["c"]
    assert running.project.placement is not None
    assert running.project.placement.learners == ("id-a", "id-b", "id-c")
    assert "learner-p1-3" in running.project.services
    assert running.payloads(EffectKind.ADD_LEARNER) == [{"learner": "learner-p1-3", "node": "c"}]
    (line,) = running.told("node_taken_in")
    assert (line.data, line.message[:14]) == ({"node": "c", "learner": "learner-p1-3"}, "c is taken in.")
    assert running.take_in() == []


def test_it_is_one_learner_a_node_and_no_more_than_max_clients() -> None:
    running = Running(node_with("a"), max_clients=4)
    running.begin_round(1)
    running.nodes += [node_with("d"), node_with("quick"), node_with("c", cores=64), node_with("e")]
    assert running.found() == ["quick", "c"]  # two learners share a
    stale = life.NodesTakenIn(
        nodes=tuple(life.LateNode(id=NodeId(f"id-{name}"), name=name) for name in ("a", "c", "c", "d", "e"))
    )
    running.happen(stale)
    assert running.project.placement is not None
    assert running.project.placement.learners == ("id-a", "id-a", "id-c", "id-d")
    assert running.found() == []


def test_a_node_that_comes_by_data_is_taken_in_and_unfit_ones_are_not() -> None:
    running = Running(with_columns(node_with("a"), X), with_columns(node_with("b"), X))
    running.begin_round(1)
    unfit = [
        node_with("empty", rows=0),
        node_with("plain", addons=()),
        with_columns(node_with("odd"), Y),
        with_columns(node_with("as-odd"), Y),
        with_columns(node_with("odd-too"), Y),
        node_with("away", is_connected=False),
    ]
    running.nodes += unfit
    assert running.found() == []
    running.nodes.append(with_columns(node_with("empty"), X))
    assert running.found() == ["empty"]


def test_the_last_round_takes_nobody_in_and_its_end_ends_the_search() -> None:
    running = Running(node_with("a"), node_with("b"))
    running.nodes.append(node_with("c"))
    running.begin_round(1)
    running.begin_round(3)
    assert running.found() == []
    assert takes_in_nodes(running.project)  # the aggregator may repeat rounds after a kill
    for number in (1, 2, 3):
        running.happen(life.RoundCompleted(rounds=3, record=Round(number=number)))
    assert not takes_in_nodes(running.project)


def test_without_max_clients_nobody_looks() -> None:
    running = Running(node_with("a"), node_with("b"), max_clients=None)
    running.nodes.append(node_with("c"))
    running.begin_round(1)
    assert running.payloads(EffectKind.LOOK_FOR_NODES) == []
    assert running.take_in() == []


def test_a_learner_that_failed_for_good_makes_room_but_not_for_its_own_node() -> None:
    running = Running(node_with("a"), node_with("b"), max_clients=2, min_fit_clients=1)
    running.begin_round(1)
    running.nodes.append(node_with("c"))
    assert running.found() == []
    failure = Failure(code="user_code_failed", message="It raised.")
    running.happen(
        life.ServiceChanged(
            service_id=ServiceId("learner-p1-2"), node="b", state=ServiceState.FAILED, failure=failure
        )
    )
    assert running.project.stage is Stage.TRAINING
    assert running.take_in() == ["c"]
    assert running.found() == []


def test_another_address_of_the_aggregator_replaces_late_learners_too() -> None:
    running = Running(node_with("a"), node_with("b"))
    running.begin_round(1)
    running.nodes.append(node_with("c"))
    running.take_in()
    running.listen(AGGREGATOR, "h:2")
    assert {f"learner-p1-{number}-r2" for number in (1, 2, 3)} <= set(running.project.services)
    (stop,) = running.payloads(EffectKind.STOP_SERVICES)
    assert set(stop["services"]) == {"learner-p1-1", "learner-p1-2", "learner-p1-3"}
    running.nodes.append(node_with("d"))
    running.take_in()
    assert "learner-p1-4-r2" in running.project.services


def test_in_a_hierarchical_training_a_node_learns_in_its_own_cluster() -> None:
    nodes = [*in_cluster("east", node_with("e1")), *in_cluster("west", node_with("w1"))]
    running = Running(*nodes, mode="hierarchical", training_cycles=1, max_clients=3)
    running.listen(OF_EAST, "east:1")
    running.begin_round(1, rounds=1)
    running.begin_round(1, OF_EAST)
    running.nodes += in_cluster("east", node_with("e2"), node_with("e3"))
    running.nodes += [*in_cluster("west", node_with("w2")), *in_cluster("south", node_with("s1"))]
    assert running.take_in() == ["e2"]  # west has not begun, south takes no part
    assert running.payloads(EffectKind.ADD_LEARNER) == [{"learner": "learner-p1-5", "node": "e2"}]
    (line,) = running.told("node_taken_in")
    assert line.data["cluster"] == "east"
    running.listen(OF_WEST, "west:1")
    running.begin_round(1, OF_WEST)
    assert running.take_in() == ["w2"]
    placement, training = running.project.placement, running.project.training
    assert placement is not None
    assert training is not None
    east, west = training.clusters
    assert east.learners == ("learner-p1-1", "learner-p1-2", "learner-p1-5")
    assert west.learners == ("learner-p1-3", "learner-p1-4", "learner-p1-6")
    assert placement.learners == ("id-e1", "id-e1", "id-e2", "id-w1", "id-w1", "id-w2")
    running.listen(OF_EAST, "east:2")
    assert {f"learner-p1-{number}-r2" for number in (1, 2, 5)} <= set(running.project.services)


def test_max_clients_below_what_begins_is_refused() -> None:
    with pytest.raises(FlopsError, match="max_clients is 1, but min_available_clients asks for 2") as refused:
        parse_project_sla(raw_sla(max_clients=1))
    assert refused.value.code is ErrorCode.SLA_INVALID
