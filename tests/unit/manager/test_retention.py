"""What the control plane gives back, and what it must not, with blobs as files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.system_clock import SystemClock
from flops.core.ids import Digest
from flops.core.project import MockData, Stage
from flops.manager.retention import Retention, RetentionOptions
from flops.testing.projects import PlayedCluster, played_cluster, sla_with
from flops.testing.waiting import until

HOUR_S = 3_600.0


class Site:
    """A manager whose blobs are files that can be made old."""

    def __init__(self, folder: Path, cluster: PlayedCluster, blobs: FileBlobs) -> None:
        self._folder = folder
        self.cluster = cluster
        self.blobs = blobs

    def retention(self, **options: Any) -> Retention:
        return Retention(
            self.cluster.store,
            self.cluster.orchestrator,
            self.blobs,
            SystemClock(),
            RetentionOptions(**options),
        )

    def age(self, by_s: float = 2 * HOUR_S) -> None:
        """Have all blobs be used last so long ago."""
        at_s = SystemClock().now_s() - by_s
        for path in self._folder.glob("??/*"):
            os.utime(path, (at_s, at_s))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    blobs = FileBlobs(tmp_path)
    with played_cluster(blobs=blobs) as cluster:
        yield Site(tmp_path, cluster, blobs)


def test_what_a_project_refers_to_stays_until_it_is_deleted(site: Site) -> None:
    cluster = site.cluster
    project_id = cluster.engine.submit(sla_with()).id
    cluster.play_to_the_end(project_id)
    project = cluster.wait(project_id, lambda p: p.stage is Stage.COMPLETED)
    assert project.repository is not None
    assert project.model is not None
    assert project.environment is not None
    unreferenced = site.blobs.put(b"nobody's")
    site.age()
    site.retention().sweep()
    assert not site.blobs.has(unreferenced)
    mine = [project.repository.bundle, project.model.bundle]
    locks = [project.environment.lock, project.environment.model_lock]
    assert all(site.blobs.has(digest) for digest in (*mine, *locks))

    cluster.engine.delete(project_id)
    until(lambda: cluster.engine.projects() == [], "the deletion")
    site.age()
    site.retention().sweep()
    assert sorted(site.blobs.digests()) == sorted(locks)  # a later project needs no builder

    cluster.engine.clear_registry()
    site.retention().sweep()
    assert site.blobs.digests() == []


def test_an_upload_may_come_an_hour_before_what_refers_to_it(site: Site) -> None:
    site.blobs.put(b"old")
    site.age(HOUR_S + 60)
    site.blobs.put(b"new")
    digest = site.blobs.put(b"old once more")
    site.age(HOUR_S - 60)
    site.blobs.put(b"old")
    site.retention().sweep()
    assert len(site.blobs.digests()) == 3
    site.age(HOUR_S + 60)
    assert site.blobs.has(digest)
    site.retention().sweep()
    assert site.blobs.digests() == [digest]


def test_what_may_belong_to_a_running_project_stays_however_late_it_is_told(site: Site) -> None:
    """A builder stored its locks, and its node has been away since: the event that names them comes later."""
    cluster = site.cluster
    project_id = cluster.engine.submit(sla_with()).id
    cluster.wait_for_service(f"builder-{project_id}")
    lock = site.blobs.put(b"lock")  # the clock of these projects began at 1,000 s: before everything
    site.age()
    site.retention().sweep()
    assert site.blobs.has(lock)
    cluster.engine.stop(project_id)
    cluster.wait(project_id, lambda p: p.stage is Stage.STOPPED)
    site.age()
    site.retention().sweep()
    assert not site.blobs.has(lock)


def test_a_dataset_that_was_sent_along_goes_when_it_is_pushed(site: Site) -> None:
    digest = site.blobs.put(b"dataset")
    mock = MockData(id="m1", sla={}, dataset_blob=digest)
    site.cluster.store.put_mock_data(mock)
    site.age()
    site.retention().sweep()
    assert site.blobs.has(digest)
    site.cluster.store.put_mock_data(mock.model_copy(update={"state": "completed"}))
    site.age()
    site.retention().sweep()
    assert not site.blobs.has(Digest(digest))


def test_what_killed_writers_left_goes(site: Site, tmp_path: Path) -> None:
    (tmp_path / "incoming" / "tmpleft").write_bytes(b"half")
    site.retention().sweep()
    assert list((tmp_path / "incoming").iterdir()) == []


def test_output_is_kept_of_the_last_projects_only_and_their_records_stay(site: Site) -> None:
    cluster = site.cluster
    ids = [cluster.engine.submit(sla_with()).id for _ in range(3)]
    for project_id in ids:
        cluster.play_to_the_end(project_id)
        cluster.wait(project_id, lambda p: p.stage is Stage.COMPLETED)
    for project_id in ids:
        until(lambda p=project_id: _running(site, p) == 1, "only the model's service")  # type: ignore[misc]
    site.retention(keep_logs_projects=2, keep_logs_s=1e12).sweep()
    assert [_ended(site, project_id) > 0 for project_id in ids] == [False, True, True]
    assert all(_running(site, project_id) == 1 for project_id in ids)  # models are served on
    assert len(cluster.engine.projects()) == 3
    assert all(cluster.engine.history(project_id) for project_id in ids)


def test_old_output_goes_but_none_of_a_project_that_runs(site: Site) -> None:
    cluster = site.cluster
    project_id = cluster.engine.submit(sla_with()).id
    cluster.build(project_id)
    cluster.listen(project_id)
    until(lambda: _ended(site, project_id) == 1, "the builder's end")
    site.retention().sweep()  # it was long ago by the clock of the cluster
    assert _ended(site, project_id) == 1
    cluster.engine.stop(project_id)
    cluster.wait(project_id, lambda p: p.stage is Stage.STOPPED)
    assert _ended(site, project_id) > 1
    site.retention().sweep()
    assert _ended(site, project_id) == 0


def _ended(site: Site, project_id: str) -> int:
    services = site.cluster.orchestrator.services(project_id)
    return sum(service.status.state.is_final for service in services)


def _running(site: Site, project_id: str) -> int:
    return len(site.cluster.orchestrator.services(project_id)) - _ended(site, project_id)


def test_it_sweeps_at_its_start_and_again_and_says_what_it_removed(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    retention = site.retention(interval_s=0.05, unreferenced_s=HOUR_S)
    retention.start()
    try:
        for data in (b"one", b"two"):
            digest = site.blobs.put(data)
            site.age()
            told = f"removed blob {digest[:12]}"
            until(lambda told=told: told in caplog.text, "the sweep")  # type: ignore[misc]
            assert site.blobs.digests() == []
    finally:
        retention.close()
