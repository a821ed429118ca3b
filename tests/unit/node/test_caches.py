"""A node's caches on real folders: what goes, what stays, what a kill leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.environment_folders import EnvironmentFolders
from flops.core.ids import Digest
from flops.node.bundles import BundleStore
from flops.node.caches import NodeCaches
from flops.node.disk_guard import folder_bytes
from flops.testing.disk import small_disk
from flops.testing.waiting import StandingClock, until

KB = 1024


def digest(number: int) -> str:
    return f"{number:064x}"


class Site:
    """A node's folder with environments of given sizes, used one after the other."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environments = EnvironmentFolders(home / "environments")
        self.bundles = BundleStore(home / "bundles", lambda _digest, _path: None)
        self.needed: set[str] = set()

    def caches(self, max_bytes: int) -> NodeCaches:
        return NodeCaches(
            (self.environments, self.bundles),
            lambda: frozenset(self.needed),
            max_bytes,
            self.home,
            StandingClock(),
        )

    def add(self, number: int, *, kilobytes: int = 100, linked: Path | None = None) -> Path:
        """Make an environment that was used last at second `number`."""
        folder = self.environments.folder_of(digest(number))
        with self.environments.exclusive(digest(number), print):
            (folder / "bin").mkdir(parents=True)
            (folder / "bin" / "python").touch()
            if linked is None:
                (folder / "data").write_bytes(os.urandom(kilobytes * KB))
            else:
                os.link(linked, folder / "data")
            self.environments.complete(digest(number))
        os.utime(folder / ".complete", (number, number))
        return folder

    def left(self) -> list[str]:
        return sorted(item.key for item in self.environments.cached())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_what_was_used_least_recently_goes_beyond_the_limit(site: Site) -> None:
    for number in (3, 1, 4, 2):
        site.add(number)
    caches = site.caches(250 * KB)
    caches.tend()
    assert site.left() == [digest(3), digest(4)]
    environments, bundles = caches.lines()
    assert (environments.name, environments.entries) == ("environments", 2)
    assert 200 * KB <= environments.size_bytes <= 250 * KB
    assert (bundles.entries, bundles.size_bytes) == (0, 0)


def test_what_a_service_needs_stays_however_old_and_large_it_is(site: Site) -> None:
    for number in (1, 2, 3):
        site.add(number)
    site.needed = {digest(1)}
    caches = site.caches(0)
    caches.tend()
    assert site.left() == [digest(1)]
    site.needed = set()
    caches.tend()
    assert site.left() == []


def test_a_file_of_several_environments_counts_once(site: Site) -> None:
    first = site.add(1, kilobytes=400)
    for number in (2, 3, 4):
        site.add(number, linked=first / "data")
    caches = site.caches(600 * KB)
    caches.tend()
    assert len(site.left()) == 4
    assert 400 * KB <= caches.lines()[0].size_bytes < 500 * KB
    seen: set[tuple[int, int]] = set()
    assert folder_bytes(site.home / "environments", seen) == caches.lines()[0].size_bytes


def test_what_is_not_too_much_is_not_measured_again(site: Site) -> None:
    folder = site.add(1)
    caches = site.caches(1_000 * KB)
    caches.tend()
    known = caches.lines()
    (folder / "more").write_bytes(os.urandom(50 * KB))
    caches.tend()
    assert caches.lines() == known
    site.add(2)
    caches.tend()
    assert caches.lines()[0].size_bytes >= known[0].size_bytes + 150 * KB


def test_a_removal_for_which_there_is_no_right_any_more_does_not_happen(site: Site) -> None:
    """A service that begins between the choice and the removal keeps what it needs."""
    site.add(1)
    looks = iter([frozenset[str](), frozenset({digest(1)})])  # the choice, and the look before the removal
    caches = NodeCaches((site.environments,), lambda: next(looks), 0, site.home, StandingClock())
    caches.tend()
    assert site.left() == [digest(1)]


def test_who_begins_to_use_something_while_it_is_removed_does_not_get_half_of_it(site: Site) -> None:
    for _ in range(30):
        folder = site.add(1)
        got: list[bool] = []
        is_used = threading.Event()
        user = threading.Thread(
            target=lambda got=got, used=is_used: (
                used.set(),
                got.append(site.environments.begin_use(digest(1))),
            )
        )
        user.start()
        is_used.wait()
        is_gone = site.environments.drop(digest(1), lambda: False)
        user.join()
        # Here nobody is known to need it, so a use may come too late to save it; but it is whole or away.
        assert folder.exists() is not is_gone
        if not is_gone:
            assert site.environments.drop(digest(1), lambda: False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "20m") as disk:
        yield disk


@pytest.mark.root
def test_caches_give_way_when_the_disk_gets_low_and_only_as_much_as_is_needed(disk: Path) -> None:
    site = Site(disk)
    for number in (1, 2, 3, 4):
        site.add(number, kilobytes=2_000)
    caches = site.caches(10**12)
    caches.tend()
    assert len(site.left()) == 4  # 12 of 20 MB are free
    (disk / "other").write_bytes(bytes(9_000 * KB))  # 3 MB are free, 4 MB should be
    caches.tend()
    assert site.left() == [digest(2), digest(3), digest(4)]


@pytest.mark.root
def test_downloads_are_looked_after_now_and_then_and_when_the_disk_gets_low(disk: Path) -> None:
    site, told = Site(disk), []
    caches = NodeCaches((), frozenset, 0, site.home, StandingClock(), told.append)
    caches.start()
    try:
        until(lambda: told == [False], "the first look")
        (disk / "other").write_bytes(bytes(18_000 * KB))
        until(lambda: told == [False, True], "the look at the low disk")
    finally:
        caches.close()


REMOVE = """
import sys
from pathlib import Path
from flops.adapters.environment_folders import EnvironmentFolders
print("now", flush=True)
EnvironmentFolders(Path(sys.argv[1])).drop(sys.argv[2], lambda: False)
"""


def test_what_a_killed_removal_left_is_removed_at_the_next_start(site: Site) -> None:
    folder = site.add(1)
    for number in range(60):
        (folder / f"d{number}").mkdir()
        for name in range(100):
            (folder / f"d{number}" / str(name)).touch()
    root = site.home / "environments"
    with subprocess.Popen(
        [sys.executable, "-c", REMOVE, str(root), digest(1)], stdout=subprocess.PIPE
    ) as remover:
        assert remover.stdout is not None
        remover.stdout.readline()
        until(lambda: not folder.exists(), "the removal")
        remover.kill()
    assert list(root.glob(".removed-*"))  # it was killed in the middle
    assert site.left() == []
    caches = site.caches(0)
    caches.start()
    try:
        until(lambda: not list(root.glob(".*")), "the sweep")
    finally:
        caches.close()
    site.add(1)
    assert site.environments.begin_use(digest(1))


def test_what_a_killed_daemon_has_half_unpacked_is_removed(site: Site) -> None:
    half = site.home / "bundles" / f".{digest(1)[:12]}-x" / "tree"
    half.mkdir(parents=True)
    site.bundles.sweep()
    assert list((site.home / "bundles").iterdir()) == []
    assert site.bundles.cached() == []
    assert not site.bundles.drop(Digest(digest(1)), lambda: False)
