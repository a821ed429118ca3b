"""Projects with bad code in a whole deployment: they hurt neither nodes nor other projects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from flops.adapters import confinement
from flops.adapters.control_groups import find_control_groups
from flops.core.health import ExaminedNode, Severity
from flops.core.project import Project, Stage
from flops.testing.audit import Books
from flops.testing.chaos import DAEMONS, processes_of, services_of
from flops.testing.deployment import Deployment, commit_all
from flops.testing.example import begin_fit_with, example_deployment, make_example, sla_file, submit
from flops.wire.rest import NodeList

LIMITS = {*find_control_groups().limits()[0], *confinement.limits()[0]}

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not {"memory", "pids", "files", "network", "signals"} <= LIMITS,
        reason=f"only {sorted(LIMITS)} are limited here",
    ),
]
chaos = pytest.mark.chaos
ROUND_TIMEOUT_S = 60


@dataclass(frozen=True)
class Bad:
    """Code that a learner runs when it trains, and words of what `flops project show` says about its end."""

    name: str
    code: str
    reason: str


FORK = "while True:\n try: os.fork()\n except OSError: pass"
BAD_CODE = [
    Bad("outside-writer", "open('/etc/flops-was-here', 'w')", "PermissionError"),
    Bad("dialler", "import socket; socket.create_connection(('127.0.0.1', 9))", "PermissionError"),
    Bad("exit", "import sys; sys.exit(3)", "SystemExit"),
    Bad("memory-eater", "hoard = [b'x' * 1_000_000 for _ in iter(int, 1)]", "needed more memory"),
    Bad("endless-loop", "while True: pass", "it did not answer in time"),
    Bad("fork-bomb", f"import os; exec({FORK!r})", "it did not answer in time"),
    Bad("flood", "while True: print('x' * 10_000)", "it did not answer in time"),
    Bad("hard-exit", "import os; os._exit(3)", "exit code 3"),
    Bad("segfault", "import ctypes; ctypes.string_at(0)", "SIGSEGV"),
]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with example_deployment(tmp_path_factory.mktemp("deployment")) as deployment:
        deployment.wait_for(lambda: not services_of(deployment), "the end of the mock data provider")
        yield deployment


@pytest.fixture
def books(deployment: Deployment) -> Iterator[Books]:
    books = Books(deployment)
    yield books
    books.close()


def nodes_of(books: Books) -> list[ExaminedNode]:
    return list(books.api.get("/nodes", NodeList).nodes)


def check_nodes(books: Books) -> None:
    """Both nodes are there and work, as `flops node list` tells it."""
    nodes = nodes_of(books)
    assert all(node.is_connected for node in nodes)
    sick = [finding for node in nodes for finding in node.health.findings if finding.check != "services"]
    assert [
        f for f in sick if f.severity.rank >= Severity.WARNING.rank
    ] == []  # a restarted service is a hint


@pytest.mark.parametrize(
    "bad", [pytest.param(bad, id=bad.name, marks=[] if i < 1 else chaos) for i, bad in enumerate(BAD_CODE)]
)
def test_a_project_of_bad_code_hurts_only_itself(deployment: Deployment, books: Books, bad: Bad) -> None:
    repository = make_example(deployment, bad.name)
    begin_fit_with(repository, bad.code)
    commit_all(repository, "Be bad")
    daemons = {found.process.pid for found in processes_of(deployment, *DAEMONS)}
    folders = folders_of(deployment)
    training = {"training_rounds": 3, "round_timeout_s": ROUND_TIMEOUT_S}
    ids = [
        submit(
            deployment,
            sla_file(deployment, "sla", name, training_configuration=training, post_training_steps=[]),
        )
        for name in (bad.name, "repository")
    ]

    def projects() -> list[Project]:
        check_nodes(books)
        return [books.api.project(project_id) for project_id in ids]

    deployment.wait_for(lambda: all(p.stage.is_final for p in projects()), "both ends", timeout_s=600.0)
    hurt, honest = projects()
    assert (hurt.stage, honest.stage) == (Stage.FAILED, Stage.COMPLETED), (hurt.failure, honest.failure)
    assert [books.problems_of(project) for project in (hurt, honest)] == [[], []]
    shown = deployment.flops("project", "show", hurt.id).stdout
    assert bad.reason in shown, shown
    assert daemons == {found.process.pid for found in processes_of(deployment, *DAEMONS)}
    for project_id in ids:
        deployment.flops("project", "delete", project_id)
    deployment.wait_for(lambda: not services_of(deployment), "the end of all services")
    deployment.wait_for(lambda: folders_of(deployment) == folders, "the end of all folders")
    check_nodes(books)


def folders_of(deployment: Deployment) -> set[str]:
    """Folders of services on all nodes."""
    return {str(path.relative_to(deployment.home)) for path in deployment.home.glob("node-*/services/*")}
