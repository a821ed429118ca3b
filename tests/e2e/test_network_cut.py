"""Cuts the cables of nodes that are machines of their own, each way on its own: everything goes on."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from flops.core.health import ExaminedNode, Severity
from flops.core.project import Project, Stage
from flops.node.service_folder import ServiceFolder
from flops.testing.audit import Books
from flops.testing.chaos import Role, processes_of, services_of
from flops.testing.deployment import Deployment, commit_all, deployed
from flops.testing.example import EXAMPLES, REPOSITORY, begin_fit_with, make_example, sla_file, submit
from flops.testing.network import Machine, Network, missing_for_networks, network
from flops.testing.waiting import until
from flops.wire.rest import NodeList

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.root,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing_for_networks() != "", reason=missing_for_networks()),
]

NODES = ("node-1", "node-2")
WORKSHOP = "workshop"  # a node on this machine, the only one that reaches a package index
NOTICED_WITHIN_S = 10.0
BACK_WITHIN_S = 20.0
chaos = pytest.mark.chaos


class Lab:
    """A control plane on this machine, and two nodes on machines of their own.

    Args:
        deployment: the control plane is up, no node is there.
        network: connects them.
    """

    def __init__(self, deployment: Deployment, network: Network) -> None:
        self.deployment = deployment
        self.network = network
        self.machines: dict[str, Machine] = {}
        self.books = Books(deployment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.books.close()

    def prepare(self) -> None:
        """Build the environments on a node that reaches an index, and have the others share them."""
        deployment = self.deployment
        deployment.start_node(WORKSHOP, "FLOps-learner", "imageBuilder")
        self._add_data(1)
        repository = make_example(deployment, REPOSITORY)
        begin_fit_with(repository, "__import__('time').sleep(0.3)")
        commit_all(repository, "Take time")
        with Trial(self, rounds=1) as trial:
            deployment.wait_for(lambda: trial.rounds() == 1, "a first round", timeout_s=300.0)
        deployment.node(WORKSHOP, "stop")
        for name in NODES:
            self.machines[name] = self.network.add_machine()
            deployment.prefixes[name] = self.machines[name].prefix
            (deployment.home / name).mkdir()
            (deployment.home / name / "environments").symlink_to(deployment.home / WORKSHOP / "environments")
            deployment.start_node(name, "FLOps-learner")
        self._add_data(len(NODES))

    def _add_data(self, nodes: int) -> None:
        self.deployment.wait_for_nodes(nodes)
        mock = EXAMPLES / "slas/mocks/breast_cancer.json"
        self.deployment.flops("mock-data", "create", str(mock), "--watch")

    def nodes(self) -> dict[str, ExaminedNode]:
        """The nodes by the names of their folders."""
        found = self.books.api.get("/nodes", NodeList).nodes
        return {name: node for node in found for name in NODES if node.name.endswith(name)}

    def is_connected(self, name: str) -> bool:
        return self.nodes()[name].is_connected

    def is_healthy(self, name: str) -> bool:
        node = self.nodes()[name]
        return node.is_connected and node.health.severity.rank < Severity.WARNING.rank


class Trial:
    """A project whose rounds go on while one of two learners answers."""

    def __init__(self, lab: Lab, rounds: int) -> None:
        self._lab = lab
        training: dict[str, Any] = {
            "training_rounds": rounds,
            "min_fit_clients": 1,
            "min_evaluate_clients": 1,
        }
        sla = sla_file(lab.deployment, training_configuration=training, post_training_steps=[])
        self.id = submit(lab.deployment, sla)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lab.deployment.flops("project", "delete", self.id, exit_code=None)

    def project(self) -> Project:
        project = self._lab.books.api.project(self.id)
        assert project.failure is None, project.failure
        return project

    def rounds(self) -> int:
        training = self.project().training
        return len(training.history) if training is not None else 0

    def learners(self) -> int:
        training = self.project().training
        return len(training.learners) if training is not None else 0

    def begin(self) -> tuple[str, str]:
        """Wait until it trains; returns the aggregator's node and the other one."""
        self._lab.deployment.wait_for(lambda: self.rounds() >= 2, "two rounds")
        (aggregator,) = processes_of(self._lab.deployment, Role.AGGREGATOR)
        (other,) = set(NODES) - {aggregator.node}
        return aggregator.node, other

    def processes(self) -> dict[str, int]:
        """Process ids by service; nothing may run twice."""
        found = processes_of(self._lab.deployment, Role.AGGREGATOR, Role.LEARNER)
        assert set(Counter(one.service_id for one in found).values()) == {1}, [str(one) for one in found]
        return {one.service_id: one.process.pid for one in found}

    def finish(self) -> Project:
        """Wait for its end; its books have to be in order, and nothing of it may run."""
        deployment = self._lab.deployment
        deployment.wait_for(lambda: self.project().stage is Stage.COMPLETED, "its end", timeout_s=300.0)
        project = self.project()
        assert self._lab.books.problems_of(project) == []
        deployment.wait_for(lambda: not services_of(deployment), "the end of all services")
        return project


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    home = tmp_path_factory.mktemp("deployment")
    with network() as net, deployed(home, address=net.here.address) as deployment:
        deployment.up()
        with Lab(deployment, net) as lab:
            lab.prepare()
            yield lab


def hold(is_true: Callable[[], bool], what: str, *, since_s: float, within_s: float) -> None:
    """Wait until something holds, tell how long after `since_s` that is, and hold it to a limit."""
    until(is_true, what, timeout_s=since_s + within_s - time.monotonic())
    sys.stdout.write(f"{what}: {time.monotonic() - since_s:.1f} s\n")


def ways(name: str, lab: Lab, machine: str, *others: Machine) -> list[tuple[Machine, Machine]]:
    """Which ways to cut for a machine to be cut off from others, to it, from it, or both."""
    here = lab.machines[machine]
    to = [(other, here) for other in others] if name in {"to it", "both ways"} else []
    return to + ([(here, other) for other in others] if name in {"from it", "both ways"} else [])


WAYS = ("both ways", "to it", "from it")
DIRECTIONS = [WAYS[0], *(pytest.param(way, marks=chaos) for way in WAYS[1:])]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_learner_whose_machine_is_cut_off_is_lost_and_takes_part_again(lab: Lab, direction: str) -> None:
    with Trial(lab, rounds=25) as trial:
        near, far = trial.begin()
        before = trial.processes()
        with lab.network.cut(*ways(direction, lab, far, lab.network.here, lab.machines[near])):
            cut_s = time.monotonic()
            hold(lambda: not lab.is_connected(far), "node gone", since_s=cut_s, within_s=NOTICED_WITHIN_S)
            hold(lambda: trial.learners() == 1, "learner lost", since_s=cut_s, within_s=NOTICED_WITHIN_S)
            alone = trial.rounds() + 3
            until(lambda: trial.rounds() >= alone, "three rounds without it")
        mended_s = time.monotonic()
        hold(lambda: lab.is_healthy(far), "node healthy again", since_s=mended_s, within_s=BACK_WITHIN_S)
        hold(lambda: trial.learners() == 2, "learner joined again", since_s=mended_s, within_s=BACK_WITHIN_S)
        assert trial.processes() == before  # nothing was restarted for it
        history = trial.finish().training.history  # type: ignore[union-attr]  # it has trained
    assert {len(history[0].participants), len(history[-1].participants)} == {2}
    assert len(history[alone - 1].participants) == 1


@chaos
@pytest.mark.parametrize("direction", WAYS)
def test_training_goes_on_while_the_aggregators_machine_is_cut_off_from_the_control_plane(
    lab: Lab, direction: str
) -> None:
    with Trial(lab, rounds=80) as trial:
        near, _ = trial.begin()
        home = lab.deployment.home / near
        before = trial.processes()
        with lab.network.cut(*ways(direction, lab, near, lab.network.here)):
            cut_s = time.monotonic()
            hold(lambda: not lab.is_connected(near), "node gone", since_s=cut_s, within_s=NOTICED_WITHIN_S)
            until(lambda: f"Waits for {lab.nodes()[near].name}" in trial.project().doing, "what it waits for")
            told, done = trial.rounds(), rounds_on_disk(home) + 5
            until(lambda: rounds_on_disk(home) >= done, "five rounds without the control plane")
            assert trial.rounds() == told
        mended_s = time.monotonic()
        hold(lambda: lab.is_healthy(near), "node healthy again", since_s=mended_s, within_s=BACK_WITHIN_S)
        hold(lambda: trial.rounds() >= done, "rounds told", since_s=mended_s, within_s=BACK_WITHIN_S)
        assert trial.processes() == before
        history = trial.finish().training.history  # type: ignore[union-attr]  # it has trained
    assert {len(record.participants) for record in history} == {2}  # no round went without anybody


def rounds_on_disk(node: Path) -> int:
    """Rounds in the checkpoint of a node's aggregator."""
    (folder,) = node.glob("services/aggregator-*")
    return len((ServiceFolder(folder).work_dir / "checkpoint" / "history.jsonl").read_text().splitlines())
