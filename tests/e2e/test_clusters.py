"""From nothing to a served model over clusters on machines of their own, one of them cut off for a while.

Clusters and nodes join by the commands of docs/clusters.md.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flops.core.project import Project, Stage
from flops.testing.audit import Books
from flops.testing.deployment import Deployment, commit_all, deployed
from flops.testing.example import EXAMPLES, REPOSITORY, begin_fit_with, make_example, sla_file, submit
from flops.testing.network import Machine, Network, missing_for_networks, network
from flops.testing.waiting import until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.root,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(missing_for_networks() != "", reason=missing_for_networks()),
]

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "clusters.md"
WORKSHOP = "workshop"  # a node of the manager's own cluster; it builds, and has the root aggregator
IN_DOCUMENT = ("edge-a", "10.1.0.4")
NOTICED_WITHIN_S = 20.0  # 10 s, and what commands take that ask for it
BACK_WITHIN_S = 30.0


class Federation:
    """The clusters of a deployment, each with a relay and nodes on machines of their own."""

    def __init__(self, deployment: Deployment, net: Network) -> None:
        self.deployment = deployment
        self.network = net
        self.machines: dict[str, list[Machine]] = {}
        self.books = Books(deployment)

    def add_cluster(self, name: str, nodes: int) -> None:
        """Do what the document says, for a cluster of this name."""
        relay = self.network.add_machine()
        self.machines[name] = [relay]
        token = ""
        for where, command in commands_of_document():
            words = shlex.split(command.replace(IN_DOCUMENT[0], name).replace(IN_DOCUMENT[1], relay.address))
            words = [token if word == "TOKEN" else word for word in words]
            if where == "manager":
                told = self.deployment.run(*words).stdout
                token = told.strip() if "invite" in words else token
            elif where == "relay":
                home = self.deployment.home / name
                self._run(words, relay, f"FLOPS_HOME={home}")
            else:
                for number in range(1, nodes + 1):
                    self._run(
                        words, self._machine_of(name, number), f"FLOPS_NODE_HOME={self._home(name, number)}"
                    )

    def _home(self, name: str, number: int) -> Path:
        return self.deployment.home / f"{name}-{number}"

    def _machine_of(self, name: str, number: int) -> Machine:
        if len(self.machines[name]) <= number:
            machine, home = self.network.add_machine(), self._home(name, number)
            self.machines[name].append(machine)
            self.deployment.prefixes[home.name] = machine.prefix
            self.deployment.nodes.append(home.name)
            home.mkdir()
            # There is no package index that it could reach.
            (home / "environments").symlink_to(self.deployment.home / WORKSHOP / "environments")
        return self.machines[name][number]

    def _run(self, words: list[str], machine: Machine, *environment: str) -> None:
        while "=" in words[0]:
            environment = (*environment, words.pop(0))
        self.deployment.run(*words, prefix=(*machine.prefix, "env", *environment))

    def clusters(self) -> dict[str, dict[str, Any]]:
        return {cluster["name"]: cluster for cluster in self.deployment.ask("cluster", "list")}

    def way_to(self, name: str) -> list[tuple[Machine, Machine]]:
        """Both ways between all machines of a cluster and the manager's."""
        here = self.network.here
        return [way for machine in self.machines[name] for way in ((machine, here), (here, machine))]

    def close(self) -> None:
        self.books.close()
        for name, (relay, *_) in self.machines.items():
            home = str(self.deployment.home / name)
            self.deployment.run(
                "flops", "cluster", "down", "--home", home, exit_code=None, prefix=relay.prefix
            )


def commands_of_document() -> list[tuple[str, str]]:
    """The commands of docs/clusters.md, each with the machine that it is typed on."""
    blocks = re.findall(r"```console (manager|relay|node)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    found = [(where, line[2:]) for where, block in blocks for line in block.splitlines() if line[:2] == "$ "]
    assert {where for where, _ in found} == {"manager", "relay", "node"}
    return found


def training_of_document() -> dict[str, Any]:
    (block,) = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    training: dict[str, Any] = json.loads(block)["training_configuration"]
    return training


class Run:
    """A hierarchical project."""

    def __init__(self, federation: Federation, **training: Any) -> None:
        self.federation = federation
        changes = {**training_of_document(), **training}
        self.id = submit(
            federation.deployment, sla_file(federation.deployment, training_configuration=changes)
        )

    def project(self) -> Project:
        project = self.federation.books.api.project(self.id)
        assert project.failure is None, project.failure
        return project

    def sizes(self) -> list[int]:
        """How many clusters took part in each cycle so far."""
        training = self.project().training
        return [] if training is None else [len(cycle.participants) for cycle in training.history]

    def finish(self) -> Project:
        """Wait for its end; its books have to be in order, and its model has to answer."""
        deployment = self.federation.deployment
        deployment.wait_for(lambda: self.project().stage is Stage.COMPLETED, "its end", timeout_s=900.0)
        project = self.project()
        assert self.federation.books.problems_of(project) == []
        rows = deployment.home / "rows.json"
        rows.write_text(json.dumps({"inputs": [[0.0] * 30, [1.0] * 30]}))
        told = deployment.flops("model", "predict", self.id, str(rows)).stdout
        assert told.strip()
        return project


def hold(is_true: Callable[[], bool], what: str, since_s: float, within_s: float) -> None:
    """Wait until something holds, tell how long after `since_s` that is, and hold it to a limit."""
    until(is_true, what, timeout_s=since_s + within_s - time.monotonic())
    sys.stdout.write(f"{what}: {time.monotonic() - since_s:.1f} s\n")


def prepare(federation: Federation, names: tuple[str, ...], nodes: int) -> None:
    deployment = federation.deployment
    deployment.start_node(WORKSHOP, "imageBuilder")
    for name in names:
        federation.add_cluster(name, nodes)
    deployment.wait_for_nodes(1 + nodes * len(names))
    found = federation.clusters()
    assert {name: (c["is_connected"], c["nodes_connected"]) for name, c in found.items()} == {
        "default": (True, 1),
        **{name: (True, nodes) for name in names},
    }
    addresses = {n["facts"]["address"] for n in deployment.ask("node", "list") if n["cluster"] != "default"}
    ours = {machine.address for name in names for machine in federation.machines[name][1:]}
    assert addresses == ours  # and not those of the relays
    mock = json.loads((EXAMPLES / "slas/mocks/breast_cancer.json").read_text())
    mock["mock_data_configuration"]["number_of_partitions"] = nodes * len(names)
    file = deployment.home / "mock.json"
    file.write_text(json.dumps(mock))
    deployment.flops("mock-data", "create", str(file), "--watch")
    repository = make_example(deployment, REPOSITORY)
    begin_fit_with(repository, "__import__('time').sleep(0.3)")
    commit_all(repository, "Take time")


@contextmanager
def federated(home: Path, names: tuple[str, ...], nodes: int) -> Iterator[Federation]:
    """Clusters of these names, each with so many nodes that have data, and the example's repository."""
    with network() as net, deployed(home, address=net.here.address) as deployment:
        deployment.up()
        federation = Federation(deployment, net)
        try:
            prepare(federation, names, nodes)
            yield federation
        finally:
            federation.close()


def test_two_clusters_train_a_served_model(tmp_path: Path) -> None:
    with federated(tmp_path, ("edge-a", "edge-b"), 1) as federation:
        run = Run(federation, training_cycles=2, min_available_clients=1, min_fit_clients=1,
                  min_evaluate_clients=1)  # fmt: skip
        run.finish()
        assert run.sizes() == [2, 2]


@pytest.mark.chaos
def test_a_cluster_is_cut_off_while_three_train_and_is_back(tmp_path: Path) -> None:
    names, nodes = ("edge-a", "edge-b", "edge-c"), 2
    with federated(tmp_path, names, nodes) as federation:
        deployment, run = federation.deployment, Run(federation)
        deployment.wait_for(lambda: len(run.sizes()) >= 2, "two cycles", timeout_s=600.0)
        assert run.sizes()[:2] == [3, 3]
        placement = run.project().placement
        assert placement is not None
        (root,) = (n for n in deployment.ask("node", "list") if n["id"] == placement.aggregator)
        assert root["cluster"] == "default"
        far = names[-1]

        def state() -> tuple[bool, int]:
            found = federation.clusters()[far]
            return found["is_connected"], found["nodes_connected"]

        with federation.network.cut(*federation.way_to(far)):
            cut_s = time.monotonic()
            hold(lambda: state() == (False, 0), "cluster and nodes gone", cut_s, NOTICED_WITHIN_S)
            until(lambda: run.sizes()[-2:] == [2, 2], "two cycles without it", timeout_s=180)
        mended_s = time.monotonic()
        hold(lambda: state() == (True, nodes), "cluster and nodes back", mended_s, BACK_WITHIN_S)
        until(lambda: run.sizes()[-1] == 3, "a cycle with it again", timeout_s=180)
        project = run.finish()
        assert project.training is not None
        assert len(project.training.history) == project.sla.training_configuration.training_cycles
