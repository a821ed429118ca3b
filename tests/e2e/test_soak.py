"""Many short projects at once while things are killed at random: all end, and everything is given back.

``make chaos`` runs it. ``FLOPS_SOAK_PROJECTS``, ``FLOPS_SOAK_SEED`` and ``FLOPS_SOAK_AT_ONCE`` change it.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from flops.core.project import Project
from flops.errors import ErrorCode, FlopsError
from flops.node.disk_guard import folder_bytes
from flops.testing.audit import Books
from flops.testing.chaos import DAEMONS, Monkey, Role, processes_of, revive, services_of
from flops.testing.deployment import Deployment
from flops.testing.example import example_deployment, example_sla
from flops.wire.rest import Message, ProjectCreated, ProjectList

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(7200)]

PAUSE_S = 6.0  # between two kills, on average
# Ends that kills may bring about; any other failure is a defect.
EXCUSED = {ErrorCode.SERVICE_FAILED, ErrorCode.TOO_FEW_LEARNERS, ErrorCode.ROUND_FAILED}
T = TypeVar("T")
# That a daemon may have after many projects; allocators keep some tens of MB, now more and now less.
GROWTH_MB, GROWTH_FDS = 64.0, 8
DISK_MB_EACH = 1.0  # that an ended project may keep: its records, logs, and the registered model


def setting(name: str, default: int) -> int:
    return int(os.environ.get(f"FLOPS_SOAK_{name}", default))


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with example_deployment(tmp_path) as deployment:
        yield deployment


class Soak:
    """Keeps some projects running until enough have ended; looks over each one's books."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._books = Books(deployment)
        training = {"training_rounds": 5, "round_timeout_s": 60}
        self._sla = example_sla(deployment, training_configuration=training, post_training_steps=[])
        self._started = time.monotonic()
        self.ends: Counter[str] = Counter()
        self.problems: list[str] = []

    def tell(self, sentence: str) -> None:
        sys.stdout.write(f"{time.monotonic() - self._started:7.1f} s  {sentence}\n")
        sys.stdout.flush()

    def run(self, count: int, at_once: int, disturb: Callable[[], None]) -> None:
        """Run projects to their ends, with `disturb` called all the time."""
        api = self._books.api
        open_ids: set[str] = set()
        begun = ended = 0
        while ended < count:
            disturb()
            while begun < count and len(open_ids) < at_once:
                created = self._patiently(
                    lambda: self._books.api.post("/projects", ProjectCreated, self._sla)
                )
                open_ids.add(created.project_id)
                begun += 1
            for project in self._patiently(lambda: api.get("/projects", ProjectList)).projects:
                if project.id in open_ids and project.stage.is_final:
                    open_ids.remove(project.id)
                    ended += 1
                    self._take_end(project, ended, count)
            time.sleep(0.5)

    def _take_end(self, project: Project, ended: int, count: int) -> None:
        code = project.failure.code if project.failure else ""
        end = f"{project.stage}{f' ({code})' if code else ''}"
        self.ends[end] += 1
        took = project.updated_at_s - project.created_at_s
        self.tell(f"{ended}/{count} {project.id} {end} after {took:.1f} s")
        if project.failure is not None:
            self.tell(f"  {project.failure.message}")
            if project.failure.code not in EXCUSED:
                self.problems.append(f"{project.id}: {project.failure}")

    def look_over(self) -> None:
        """Check the books of all projects, and delete half of them."""
        projects = self._books.api.get("/projects", ProjectList).projects
        for project in projects:
            self.problems += self._books.problems_of(project)
        for project in projects[::2]:
            self._books.api.delete(f"/projects/{project.id}", Message)
        kept = len(projects) - len(projects[::2])
        self._deployment.wait_for(
            lambda: len(self._books.api.get("/projects", ProjectList).projects) == kept, "the deletions"
        )

    def settle(self) -> None:
        """Wait until nothing of any project runs."""
        revive(self._deployment)
        self._deployment.wait_for_nodes(len(self._deployment.nodes))
        self._deployment.wait_for(lambda: not services_of(self._deployment), "the end of all services")

    def close(self) -> None:
        self._books.close()

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask again while the control plane is away; a project may be accepted without our being told."""
        while True:
            try:
                return ask()
            except FlopsError as exc:
                if exc.code is not ErrorCode.UNREACHABLE:
                    raise
                revive(self._deployment)


class Usage:
    """Memory and open files of the processes that live long, and the disk; at a quiet moment."""

    def __init__(self, deployment: Deployment) -> None:
        roles = (Role.CONTROL_PLANE, Role.NODE, Role.DATA_SERVER, Role.TRACKING)
        processes = [(found, found.process) for found in processes_of(deployment, *roles)]
        self.memory_mb = {str(f): p.memory_info().rss / 1024**2 for f, p in processes}
        self.descriptors = {str(f): p.num_fds() for f, p in processes}
        folders = [deployment.home / name for name in ("control", *deployment.nodes)]
        self.disk_mb = {folder.name: folder_bytes(folder) / 1024**2 for folder in folders}

    def __str__(self) -> str:
        memory = ", ".join(f"{name} {mb:.0f} MB" for name, mb in self.memory_mb.items())
        descriptors = ", ".join(f"{name} {count}" for name, count in self.descriptors.items())
        disk = ", ".join(f"{name} {mb:.1f} MB" for name, mb in self.disk_mb.items())
        return f"memory: {memory}; open files: {descriptors}; disk: {disk}"


def test_projects_end_whatever_is_killed_and_everything_is_given_back(deployment: Deployment) -> None:
    count, at_once = setting("PROJECTS", 200), setting("AT_ONCE", 4)
    seed = setting("SEED", secrets.randbelow(10**9))
    soak = Soak(deployment)
    soak.tell(f"{count} projects, {at_once} at once; FLOPS_SOAK_SEED={seed}")

    wild = Monkey(deployment, seed, soak.tell)
    soak.run(count // 2, at_once, pacing(wild))
    soak.look_over()
    soak.settle()

    # Daemons are spared now: what they use is measured over many projects of one life.
    mild = Monkey(deployment, seed + 1, soak.tell, spared=DAEMONS | {Role.DATA_SERVER, Role.TRACKING})
    soak.run(min(20, count // 10), at_once, pacing(mild))
    soak.settle()
    before = Usage(deployment)
    soak.tell(f"before: {before}")
    rest = count - count // 2 - min(20, count // 10)
    soak.run(rest, at_once, pacing(mild))
    soak.look_over()
    soak.settle()
    after = Usage(deployment)
    soak.tell(f"after {rest} more projects: {after}")
    soak.tell(f"ends: {dict(soak.ends)}; kills: {dict(wild.kills + mild.kills)}")
    soak.close()

    assert soak.problems == []
    assert sum(soak.ends.values()) == count
    for name, mb in after.memory_mb.items():
        assert mb < before.memory_mb[name] + GROWTH_MB, f"{name} grew to {mb:.0f} MB"
    for name, descriptors in after.descriptors.items():
        assert descriptors <= before.descriptors[name] + GROWTH_FDS, f"{name} has {descriptors} open files"
    for name, mb in after.disk_mb.items():
        assert mb < before.disk_mb[name] + rest * DISK_MB_EACH, f"{name} grew to {mb:.1f} MB"


def pacing(monkey: Monkey) -> Callable[[], None]:
    """Have a monkey strike now and then."""
    due_s = time.monotonic() + monkey.pause_s(PAUSE_S)

    def disturb() -> None:
        nonlocal due_s
        if time.monotonic() >= due_s:
            monkey.strike()
            due_s = time.monotonic() + monkey.pause_s(PAUSE_S)

    return disturb
