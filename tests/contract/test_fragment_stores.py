"""Both kinds of stores keep the contract; files also survive kills, damage and full disks."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flops.adapters.memory_fragments import MemoryFragments
from flops.adapters.parquet_store import BATCH_BYTES, ParquetStore
from flops.core.dataset import TagLimits
from flops.errors import ErrorCode, FlopsError
from flops.fragment_ports import FragmentStore, FragmentUpload
from flops.testing.contracts.fragment_store import (
    DIGESTS,
    SCHEMA,
    FragmentStoreContract,
    read_rows,
    some_rows,
    store_rows,
)


class FixedClock:
    def now_s(self) -> float:
        return 1_700_000_000.0


class TestMemoryFragments(FragmentStoreContract):
    @pytest.fixture
    def store(self) -> FragmentStore:
        return MemoryFragments(FixedClock())


class TestParquetStore(FragmentStoreContract):
    @pytest.fixture
    def store(self, parquet_store: ParquetStore) -> FragmentStore:
        return parquet_store


@pytest.fixture
def parquet_store(tmp_path: Path) -> Iterator[ParquetStore]:
    store = ParquetStore(tmp_path / "new" / "store")
    yield store
    store.close()


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != "lock")


def _reopened(folder: Path, store: ParquetStore) -> ParquetStore:
    store.close()
    return ParquetStore(folder)


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    store = ParquetStore(tmp_path)
    fragment = store_rows(store, "t", some_rows(10), DIGESTS[0], 0)
    store.put_limits("t", TagLimits())
    store = _reopened(tmp_path, store)
    assert [found for found, _ in store.fragments()] == [fragment]
    assert store.limits() == {"t": TagLimits()}
    assert read_rows(store, fragment).num_rows == 10
    store.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    store = ParquetStore(tmp_path)
    with pytest.raises(FlopsError) as caught:
        ParquetStore(tmp_path)
    assert caught.value.code is ErrorCode.ALREADY_RUNNING
    assert str(tmp_path) in caught.value.message
    store.close()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from flops.adapters.parquet_store import ParquetStore\n"
        "from flops.testing.contracts.fragment_store import *\n"
        "store = ParquetStore(Path(sys.argv[1]))\n"
        "store_rows(store, 't', some_rows(5), DIGESTS[0], 0)\n"
        "upload = store.begin('t', SCHEMA); upload.write(some_rows(9)); upload.seal()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(_files(tmp_path)) == 2
    store = ParquetStore(tmp_path)
    assert len(_files(tmp_path)) == 1
    assert [fragment.rows for fragment, _ in store.fragments()] == [5]
    store.close()


@pytest.mark.parametrize("damage", ["cut", "emptied", "junk"])
def test_a_damaged_file_is_set_aside_at_the_start(tmp_path: Path, damage: str) -> None:
    store = ParquetStore(tmp_path)
    store_rows(store, "t", some_rows(5), DIGESTS[0], 0)
    bad = store_rows(store, "t", some_rows(5, 5), DIGESTS[1], 5)
    (path,) = tmp_path.glob("tags/t/*.id-5.parquet")
    path.write_bytes({"cut": path.read_bytes()[:-20], "emptied": b"", "junk": b"x" * 500}[damage])
    store = _reopened(tmp_path, store)
    assert [fragment.id for fragment, _ in store.fragments()] == ["id-0"]
    (told,) = store.damaged("t")
    assert bad.id in told.name
    assert Path(told.path).exists()
    assert told.reason
    store.close()


def test_a_foreign_file_is_set_aside(tmp_path: Path, parquet_store: ParquetStore) -> None:
    folder = tmp_path / "new" / "store" / "tags" / "t"
    folder.mkdir()
    pq.write_table(pa.table({"a": [1]}), folder / "mine.parquet")
    (folder / "sub").mkdir()
    store_rows(parquet_store, "t", some_rows(1), DIGESTS[0], 0)
    assert [fragment.id for fragment, _ in parquet_store.fragments()] == ["id-0"]
    assert [damage.name for damage in parquet_store.damaged("t")] == ["mine.parquet", "sub"]


def test_a_flipped_bit_is_found_while_reading(tmp_path: Path, parquet_store: ParquetStore) -> None:
    batch = pa.record_batch({"x": np.random.default_rng(1).random(10_000)})
    fragment = store_rows(parquet_store, "t", batch, DIGESTS[0], 0)
    (path,) = (tmp_path / "new" / "store" / "tags" / "t").iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(FlopsError) as caught:
        read_rows(parquet_store, fragment)
    assert caught.value.code is ErrorCode.FRAGMENT_DAMAGED


def test_damaged_limits_are_named(tmp_path: Path, parquet_store: ParquetStore) -> None:
    parquet_store.put_limits("t", TagLimits())
    path = tmp_path / "new" / "store" / "tags" / "t" / "limits.json"
    path.write_text("{")
    with pytest.raises(FlopsError) as caught:
        parquet_store.limits()
    assert caught.value.code is ErrorCode.CONFIG_CORRUPT
    assert str(path) in caught.value.message


def test_batches_are_small_however_the_rows_came(parquet_store: ParquetStore) -> None:
    batch = pa.record_batch({"x": pa.array([b"y" * 1_000_000] * 40)})
    fragment = store_rows(parquet_store, "t", batch, DIGESTS[0], 0)
    sizes = [read.nbytes for read in parquet_store.read(fragment)]
    assert len(sizes) > 5
    assert max(sizes) <= 2 * BATCH_BYTES


def test_little_batches_become_large_row_groups(tmp_path: Path, parquet_store: ParquetStore) -> None:
    upload = parquet_store.begin("t", SCHEMA)
    for start in range(500):
        upload.write(some_rows(1, start))
    upload.seal()
    upload.publish("x", DIGESTS[0], 0, 500)
    (path,) = (tmp_path / "new" / "store" / "tags" / "t").iterdir()
    assert pq.read_metadata(path).num_row_groups == 1


@pytest.mark.parametrize("is_repeating", [False, True])
def test_only_values_that_repeat_get_a_dictionary(parquet_store: ParquetStore, is_repeating: bool) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 16, 100_000) if is_repeating else rng.random(100_000)
    fragment = store_rows(parquet_store, "t", pa.record_batch({"x": values}), DIGESTS[0], 0)
    stored_share = fragment.size_bytes / values.nbytes
    assert stored_share < 0.1 if is_repeating else stored_share < 1.05  # all in a dictionary: 1.2


def test_what_has_settled_was_synced_after_it_had_its_place(
    tmp_path: Path, parquet_store: ParquetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, list[str]]] = []
    really_sync = os.fsync

    def sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        synced.append((path.name, _files(path) if path.is_dir() else []))
        really_sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    store_rows(parquet_store, "t", some_rows(1), DIGESTS[0], 0)
    (stored,) = _files(tmp_path)
    assert synced == [("0.parquet", []), ("tags", []), ("t", [stored])]


def test_files_are_for_the_owner_only(tmp_path: Path, parquet_store: ParquetStore) -> None:
    store_rows(parquet_store, "t", some_rows(1), DIGESTS[0], 0)
    folder = tmp_path / "new" / "store" / "tags"
    assert folder.stat().st_mode & 0o077 == 0


def _write_and_seal(upload: FragmentUpload, batches: list[pa.RecordBatch]) -> None:
    for batch in batches:
        upload.write(batch)
    upload.seal()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 1 MB: a write fails as on a full disk, for root as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, parquet_store: ParquetStore, small_files: None
) -> None:
    upload = parquet_store.begin("t", SCHEMA)
    rng = np.random.default_rng(1)
    images = pa.array([{"bytes": rng.bytes(100_000)} for _ in range(50)], SCHEMA.field("image").type)
    batch = pa.RecordBatch.from_arrays([pa.array(range(50)), images], schema=SCHEMA)
    with pytest.raises(FlopsError) as caught:
        _write_and_seal(upload, [batch] * 20)
    upload.discard()
    assert caught.value.code is ErrorCode.DISK_FULL
    assert _files(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_disk_that_is_full_takes_more_when_there_is_room_again(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store = ParquetStore(disk / "store")
        rng = np.random.default_rng(1)
        batch = pa.record_batch({"x": rng.random(100_000)})  # 800 kB
        kept = [store_rows(store, "t", batch, DIGESTS[n], n * 100_000) for n in range(2)]
        upload = store.begin("t", batch.schema)
        with pytest.raises(FlopsError) as caught:
            _write_and_seal(upload, [batch])
        upload.discard()
        assert caught.value.code is ErrorCode.DISK_FULL
        assert [fragment for fragment, _ in store.fragments()] == kept
        store.remove(kept[0])
        store_rows(store, "t", batch, DIGESTS[2], 200_000)
        store.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
