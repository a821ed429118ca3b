"""What every `flops.retention_ports.Cache` does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from flops.retention_ports import Cache

KEYS = ("a" * 64, "b" * 64)
Make = Callable[[str], None]


class CacheContract:
    """Subclass it, and provide the fixtures `cache` and `make`.

    `make(key)` has something made, or used if it is there.
    """

    @pytest.fixture
    def cache(self) -> Cache:
        raise NotImplementedError

    @pytest.fixture
    def make(self) -> Make:
        raise NotImplementedError

    def test_nothing_is_cached_at_first(self, cache: Cache) -> None:
        assert cache.cached() == []
        cache.sweep()

    def test_what_was_made_is_cached_with_its_last_use(self, cache: Cache, make: Make) -> None:
        before_s = time.time() - 1  # noqa: TID251 (what files are stamped with)
        for key in KEYS:
            make(key)
        found = {item.key: item for item in cache.cached()}
        assert found.keys() == set(KEYS)
        for item in found.values():
            assert any(item.folder.iterdir())
            assert item.used_at_s >= before_s

    def test_a_use_counts(self, cache: Cache, make: Make) -> None:
        make(KEYS[0])
        for path in (cache.cached()[0].folder, *cache.cached()[0].folder.iterdir()):
            os.utime(path, (1, 1))
        assert cache.cached()[0].used_at_s == 1
        make(KEYS[0])
        assert cache.cached()[0].used_at_s > 1

    def test_what_is_dropped_is_gone_and_can_be_made_anew(self, cache: Cache, make: Make) -> None:
        for key in KEYS:
            make(key)
        folder = next(item.folder for item in cache.cached() if item.key == KEYS[0])
        assert cache.drop(KEYS[0], lambda: False)
        assert [item.key for item in cache.cached()] == [KEYS[1]]
        assert not folder.exists()
        assert not [path for path in folder.parent.iterdir() if path.is_dir() and path.name.startswith(".")]
        make(KEYS[0])
        assert {item.key for item in cache.cached()} == set(KEYS)

    def test_what_is_in_use_is_not_dropped(self, cache: Cache, make: Make) -> None:
        make(KEYS[0])
        assert not cache.drop(KEYS[0], lambda: True)
        assert [item.key for item in cache.cached()] == [KEYS[0]]

    def test_what_is_not_there_cannot_be_dropped(self, cache: Cache, make: Make) -> None:
        make(KEYS[0])
        assert cache.drop(KEYS[0], lambda: False)
        assert not cache.drop(KEYS[0], lambda: False)

    def test_a_sweep_takes_nothing_that_is_whole(self, cache: Cache, make: Make) -> None:
        make(KEYS[0])
        cache.sweep()
        assert [item.key for item in cache.cached()] == [KEYS[0]]
