"""Kills in a deployment: finds its processes by what they are, and ends them as a power cut would.

Everything is done from outside, by process id; no process of the deployment knows that it is being tested.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from flops.adapters import service_shim as shim
from flops.adapters.process_runtime import FOLDER_VARIABLE, ID_VARIABLE
from flops.core.cluster import ServiceKind
from flops.testing.deployment import Deployment


class Role(StrEnum):
    """What a process of a deployment is."""

    CONTROL_PLANE = "control plane"
    TRACKING = "MLflow server"
    NODE = "NodeEngine"
    DATA_SERVER = "data server"
    BUILDER = "builder"
    AGGREGATOR = "aggregator"
    LEARNER = "learner"
    INFERENCE = "inference server"
    MOCK_DATA_PROVIDER = "mock data provider"
    SHIM = "shim"  # watches a service or an addon
    OTHER = "other"  # their children: uv, MLflow's workers, model hosts


_BY_WORDS = {  # of the command line
    ("flops.wiring", "control-plane"): Role.CONTROL_PLANE,
    ("flops.wiring", "node"): Role.NODE,
    ("flops.wiring", "data-server"): Role.DATA_SERVER,
    ("flops.wiring", "builder"): Role.BUILDER,
    ("flops.wiring", "aggregator"): Role.AGGREGATOR,
    ("flops.wiring", "mock-data-provider"): Role.MOCK_DATA_PROVIDER,
    ("flops.adapters.mlflow_process",): Role.TRACKING,
    ("flops.trainer.learner",): Role.LEARNER,
    ("flops.serving.app",): Role.INFERENCE,
}
_PLACES = ("FLOPS_HOME", FOLDER_VARIABLE)


@dataclass(frozen=True)
class Found:
    """A process of a deployment."""

    process: psutil.Process
    role: Role
    node: str  # name of its node's folder, "" for those of the control plane
    service_id: str  # "" for what is no service of a project

    def __str__(self) -> str:
        return f"{self.service_id or self.role}{f' on {self.node}' if self.node else ''}"


def processes_of(deployment: Deployment, *roles: Role) -> list[Found]:
    """The deployment's living processes, of all roles or of those given, oldest first."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            environ, command = process.environ(), process.cmdline()
            if not any(_is_below(environ.get(name, ""), deployment.home) for name in _PLACES):
                continue
            role = _role_of(command)
            if not roles or role in roles:
                node = _node_of(environ, command, deployment)
                found.append(Found(process, role, node, _service_of(environ, command)))
    return sorted(found, key=lambda item: item.process.create_time())


def _is_below(path: str, home: Path) -> bool:
    return bool(path) and Path(path).is_relative_to(home)


def _role_of(command: Sequence[str]) -> Role:
    if shim.__file__ in command:
        return Role.SHIM
    words = set(command)
    return next((role for marks, role in _BY_WORDS.items() if words.issuperset(marks)), Role.OTHER)


def _service_of(environ: Mapping[str, str], command: Sequence[str]) -> str:
    """The service that a process belongs to; a shim has its service's folder as its last argument."""
    name = environ.get(ID_VARIABLE) or Path(command[-1] if command else "").name
    return name if name.startswith(tuple(f"{kind}-" for kind in ServiceKind)) else ""


def _node_of(environ: Mapping[str, str], command: Sequence[str], deployment: Deployment) -> str:
    places = [environ.get(FOLDER_VARIABLE, ""), *command]
    return next((n for n in deployment.nodes if any(_is_below(p, deployment.home / n) for p in places)), "")


def kill(victims: Collection[Found]) -> None:
    """Kill processes with SIGKILL, all of them before any is waited for."""
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.process.send_signal(signal.SIGKILL)
    psutil.wait_procs([victim.process for victim in victims], timeout=10)


def kill_machine(deployment: Deployment) -> None:
    """Kill everything of a deployment at once, as when its machine loses power."""
    # What starts while others are killed is killed in the next pass: what could start it is gone by then.
    while everything := processes_of(deployment):
        kill(everything)


def forget_boot(deployment: Deployment) -> None:
    """Have what is on disk look as if it were written before the machine was started the last time."""
    for path in deployment.home.glob(f"*/*/*/{shim.SHIM_FILE}"):
        identity = json.loads(path.read_text())
        path.write_text(json.dumps({**identity, "boot_id": "an-earlier-boot"}))


def revive(deployment: Deployment) -> None:
    """Start what an operator, or systemd, starts: the control plane and the nodes that do not run."""
    running = processes_of(deployment, Role.CONTROL_PLANE, Role.NODE)
    if not any(found.role is Role.CONTROL_PLANE for found in running):
        deployment.up()
    nodes = {found.node for found in running if found.role is Role.NODE}
    for name in deployment.nodes:
        if name not in nodes:
            deployment.start_node(name)


@dataclass(frozen=True)
class Strike:
    """What a monkey does: which processes it kills, and how likely."""

    name: str
    weight: int
    roles: frozenset[Role]  # empty: the whole machine
    is_for_all: bool = False  # kills every process of the roles, not one of them


STRIKES = (
    Strike("a learner", 6, frozenset({Role.LEARNER})),
    Strike("an aggregator", 4, frozenset({Role.AGGREGATOR})),
    Strike("a data server", 2, frozenset({Role.DATA_SERVER})),
    Strike("MLflow", 2, frozenset({Role.TRACKING})),
    Strike("a shim", 2, frozenset({Role.SHIM})),
    Strike("a child of a service", 1, frozenset({Role.OTHER})),
    Strike("the control plane", 2, frozenset({Role.CONTROL_PLANE})),
    Strike("a NodeEngine", 2, frozenset({Role.NODE})),
    Strike("control plane, MLflow and nodes", 1,
           frozenset({Role.CONTROL_PLANE, Role.TRACKING, Role.NODE, Role.DATA_SERVER}), is_for_all=True),
    Strike("the whole machine", 1, frozenset()),
)  # fmt: skip
DAEMONS = frozenset({Role.CONTROL_PLANE, Role.NODE})


class Monkey:
    """Kills processes of a deployment, chosen by a seed, and starts what an operator would start again.

    Args:
        deployment: whose processes.
        seed: decides every choice; the same processes and seed give the same kills.
        tell: is told each kill in one line.
        spared: roles that are never killed; strikes that could touch them are left out.
    """

    def __init__(
        self,
        deployment: Deployment,
        seed: int,
        tell: Callable[[str], None],
        *,
        spared: frozenset[Role] = frozenset(),
    ) -> None:
        self._deployment = deployment
        self._random = random.Random(seed)  # noqa: S311 (chooses victims, guards nothing)
        self._tell = tell
        self._strikes = [s for s in STRIKES if not spared or (s.roles and not s.roles & spared)]
        self.kills: Counter[str] = Counter()

    def pause_s(self, mean_s: float) -> float:
        """How long to wait before the next strike."""
        return self._random.uniform(0.2, 1.8) * mean_s

    def strike(self) -> None:
        """Kill something; nothing happens when nothing of the chosen kind runs."""
        strike = self._random.choices(self._strikes, [s.weight for s in self._strikes])[0]
        if not strike.roles:
            self._tell("kills the whole machine")
            self.kills[strike.name] += 1
            kill_machine(self._deployment)
            forget_boot(self._deployment)
            revive(self._deployment)
            return
        victims = processes_of(self._deployment, *strike.roles)
        if victims and not strike.is_for_all:
            victims = [self._random.choice(victims)]
        if victims:
            self._tell(f"kills {', '.join(str(victim) for victim in victims)}")
            self.kills[strike.name] += 1
            kill(victims)
            revive(self._deployment)


def services_of(deployment: Deployment) -> list[Found]:
    """Processes of services, with their shims and children."""
    return [found for found in processes_of(deployment) if found.service_id]
