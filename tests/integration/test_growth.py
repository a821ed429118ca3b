"""What a control plane holds after many projects: no more than after a few, in memory and on the disk."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.sql_cluster_store import SqlClusterStore
from flops.adapters.sql_store import SqlProjectStore
from flops.adapters.system_clock import SystemClock
from flops.core.ids import ProjectId
from flops.core.project import Stage
from flops.manager.retention import Retention, RetentionOptions
from flops.testing.growth import elements, rows
from flops.testing.linked_orchestrator import LinkedOrchestrator
from flops.testing.projects import HandClock, PlayedCluster, sla_with
from flops.testing.waiting import until

KEPT = 3  # projects whose ended services are kept


class Site:
    """A real engine, cluster orchestrator and stores, with played nodes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cluster_store = SqlClusterStore(folder / "cluster.sqlite")
        self._store = SqlProjectStore(folder / "projects.sqlite")
        self._blobs = FileBlobs(folder / "blobs")
        self.orchestrator = LinkedOrchestrator(self._cluster_store, HandClock())
        self.cluster = PlayedCluster(
            store=self._store, blobs=self._blobs, orchestrator=self.orchestrator, nodes_obey=True
        )
        self.retention = Retention(
            self._store,
            self.orchestrator,
            self._blobs,
            SystemClock(),
            RetentionOptions(keep_logs_projects=KEPT, keep_logs_s=1e12),
        )
        self.cluster.join_two()
        self.cluster.engine.start()

    def live(self) -> ProjectId:
        """One project from its submission to its end; its model is taken down."""
        project_id = self.cluster.engine.submit(sla_with()).id
        self.cluster.play_to_the_end(project_id)
        self.cluster.wait(project_id, lambda p: p.stage is Stage.COMPLETED)
        self.cluster.engine.stop(project_id)
        until(lambda: all(s.status.state.is_final for s in self.orchestrator.services(project_id)), "the end")
        until(lambda: not self._store.pending_effects(), "its effects")
        return project_id

    def delete(self, project_id: ProjectId) -> None:
        self.cluster.engine.delete(project_id)
        known = self.cluster.engine.projects
        until(lambda: project_id not in {project.id for project in known()}, "the deletion")
        until(lambda: not self._store.pending_effects(), "its effects")

    def sweep(self) -> None:
        """What happens every few minutes."""
        for path in (self._folder / "blobs").glob("??/*"):
            os.utime(path, (1, 1))
        self.retention.sweep()
        seq = self._store.cursor()
        until(lambda: self.orchestrator.events(after=self._store.cursor()) == [], "the pump")
        self.orchestrator.forget_events(max(seq, self._store.cursor()))

    def held(self) -> tuple[Counter[str], dict[str, int]]:
        held = elements(self.cluster.engine, self.orchestrator, self.retention)
        counts = {**rows(self._folder / "cluster.sqlite"), **rows(self._folder / "projects.sqlite")}
        counts["blobs"] = len(self._blobs.digests())
        counts["files"] = len(open_files())
        counts["threads"] = threading.active_count()
        return held, counts

    def close(self) -> None:
        self.cluster.engine.close()
        self.orchestrator.close()
        self._store.close()
        self._cluster_store.close()


def open_files() -> list[str]:
    """What this process has open; not the databases, each of which keeps a few connections."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()))
    return [name for name in found if ".sqlite" not in name and not name.startswith("/proc/")]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def test_nothing_is_left_of_projects_that_were_deleted(site: Site) -> None:
    for _ in range(3):
        site.delete(site.live())
    site.sweep()
    before, counts_before = site.held()
    for _ in range(12):
        site.delete(site.live())
    site.sweep()
    after, counts = site.held()
    assert after - before == Counter()
    assert {name: count for name, count in counts.items() if count > counts_before[name]} == {}
    assert counts["projects"] == counts["project_events"] == counts["effects"] == 0
    assert counts["cluster_services"] == counts["cluster_lines"] == counts["cluster_events"] == 0


def test_of_projects_that_are_kept_only_the_records_grow(site: Site) -> None:
    for _ in range(KEPT + 1):
        site.live()
    site.sweep()
    before, counts_before = site.held()
    for _ in range(8):
        site.live()
    site.sweep()
    after, counts = site.held()
    assert after - before == Counter()
    grown = {name for name, count in counts.items() if count > counts_before[name]}
    assert grown == {"projects", "project_events", "effects"}
