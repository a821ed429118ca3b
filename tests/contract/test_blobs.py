"""Both kinds of blobs keep the contract; files are also verified, durable and tidy."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.memory_blobs import MemoryBlobs
from flops.core.ids import Digest
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs
from flops.testing.contracts.blobs import BlobsContract, digest_of


class TestMemoryBlobs(BlobsContract):
    @pytest.fixture
    def blobs(self) -> ImageBlobs:
        return MemoryBlobs()


class TestFileBlobs(BlobsContract):
    @pytest.fixture
    def blobs(self, tmp_path: Path) -> ImageBlobs:
        return FileBlobs(tmp_path / "new" / "blobs")


class TestBlobsOfAnOciLayout(BlobsContract):
    @pytest.fixture
    def blobs(self, tmp_path: Path) -> ImageBlobs:
        return FileBlobs(tmp_path / "new" / "layout", is_oci_layout=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_blobs_survive_a_restart(tmp_path: Path) -> None:
    digest = FileBlobs(tmp_path).put(b"data")
    assert FileBlobs(tmp_path).get(digest) == b"data"


@pytest.mark.parametrize("damage", [b"", b"dat", b"dada"], ids=["emptied", "cut", "changed"])
def test_damage_is_found_named_and_healed(tmp_path: Path, damage: bytes) -> None:
    blobs = FileBlobs(tmp_path)
    digest = blobs.put(b"data")
    (path,) = _files(tmp_path)
    path.write_bytes(damage)
    for read in (blobs.get, lambda d: next(blobs.chunks(d))):
        with pytest.raises(FlopsError) as caught:
            read(digest)
        assert caught.value.code is ErrorCode.INTERNAL
        assert str(path) in caught.value.message
    blobs.put(b"data")
    assert blobs.get(digest) == b"data"


@pytest.mark.parametrize("damage", [b"", b"dada"], ids=["emptied", "changed"])
def test_a_file_that_was_written_to_is_not_intact(tmp_path: Path, damage: bytes) -> None:
    blobs = FileBlobs(tmp_path)
    digest = blobs.put(b"data")
    (path,) = _files(tmp_path)
    os.utime(path, (100, 100))  # copied by somebody, say
    assert blobs.is_intact(digest)
    path.write_bytes(damage)
    assert not blobs.is_intact(digest)
    blobs.put(b"data")
    assert blobs.is_intact(digest)


def test_an_intact_file_is_read_once_and_damage_without_a_trace_is_known_from_the_next_read_on(
    tmp_path: Path,
) -> None:
    blobs = FileBlobs(tmp_path)
    digest = blobs.put(b"data")
    (path,) = _files(tmp_path)
    written_ns = path.stat().st_mtime_ns
    path.write_bytes(b"dada")
    os.utime(path, ns=(written_ns, written_ns))  # as a disk does it that lost bytes
    assert blobs.is_intact(digest)
    with pytest.raises(FlopsError):
        next(blobs.chunks(digest))
    assert not blobs.is_intact(digest)


def test_nothing_else_is_left_behind(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    blobs.put(b"data")
    blobs.put(b"data")
    upload = blobs.upload()
    upload.write(b"other")
    upload.discard()
    assert [path.name for path in _files(tmp_path)] == [digest_of(b"data")]


def test_a_running_upload_outlives_another_start_on_the_folder(tmp_path: Path) -> None:
    upload = FileBlobs(tmp_path).upload()
    upload.write(b"data")
    other = FileBlobs(tmp_path)
    upload.commit(digest_of(b"data"))
    upload.discard()
    assert other.get(digest_of(b"data")) == b"data"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from flops.adapters.file_blobs import FileBlobs\n"
        "upload = FileBlobs(Path(sys.argv[1])).upload(); upload.write(b'x' * 100_000)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": "src"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(_files(tmp_path)) == 1
    FileBlobs(tmp_path)
    assert _files(tmp_path) == []


@pytest.mark.parametrize(
    "use",
    [
        lambda blobs, digest: blobs.put(b"data"),
        lambda blobs, digest: blobs.has(digest),
        lambda blobs, digest: blobs.get(digest),
        lambda blobs, digest: blobs.size(digest),
        lambda blobs, digest: list(blobs.chunks(digest)),
    ],
    ids=["put", "has", "get", "size", "chunks"],
)
def test_a_blob_is_removed_unless_it_was_used(
    tmp_path: Path, use: Callable[[FileBlobs, Digest], object]
) -> None:
    blobs = FileBlobs(tmp_path)
    digest, other = blobs.put(b"data"), blobs.put(b"other")
    for path in _files(tmp_path):
        os.utime(path, (100, 100))
    use(blobs, digest)
    assert blobs.digests() == sorted([digest, other])
    used_at_s = {blob.digest: blob.used_at_s for blob in blobs.kept()}
    assert used_at_s[other] == 100.0
    assert used_at_s[digest] > 1_000.0
    assert blobs.remove_unless_used(other, since_s=100.0) == 0
    assert blobs.remove_unless_used(other, since_s=101.0) > 0
    assert blobs.remove_unless_used(digest, since_s=101.0) == 0
    assert blobs.digests() == [digest]
    assert blobs.remove_unless_used(other, since_s=101.0) == 0


def test_who_looks_for_a_blob_and_who_removes_it_do_not_meet(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    digest = blobs.put(b"data")
    os.utime(_files(tmp_path)[0], (100, 100))
    folder = os.open(tmp_path / "incoming", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_SH)  # as who looks
        assert blobs.remove_unless_used(digest, since_s=101.0) == 0
        fcntl.flock(folder, fcntl.LOCK_EX)  # as who removes
        with ThreadPoolExecutor(1) as pool:
            looks = [pool.submit(blobs.has, digest), pool.submit(blobs.put, b"data")]
            assert wait(looks, timeout=0.2).done == set()
            fcntl.flock(folder, fcntl.LOCK_UN)
            assert [look.result(10) for look in looks] == [True, digest]
    finally:
        os.close(folder)
    assert blobs.remove_unless_used(digest, since_s=101.0) == 0


def test_a_sweep_leaves_uploads_alone(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    upload = blobs.upload()
    upload.write(b"data")
    (tmp_path / "incoming" / "left").touch()
    blobs.sweep()
    assert [path.name for path in _files(tmp_path)] != ["left"]
    assert len(_files(tmp_path)) == 1
    upload.commit(digest_of(b"data"))
    upload.discard()
    assert blobs.get(digest_of(b"data")) == b"data"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(FlopsError) as caught:
        FileBlobs(blocked / "blobs")
    assert str(blocked) in caught.value.message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    upload = blobs.upload()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, upload._file.fileno())  # every write now fails as on a full disk
    os.close(full)
    with pytest.raises(FlopsError) as caught:
        upload.write(b"x" * 10_000_000)
    upload.discard()
    assert caught.value.code is ErrorCode.DISK_FULL
    assert _files(tmp_path) == []


def test_threads_can_put_the_same_bytes(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    contents = [b"a" * 100_000, b"b" * 100_000]
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(blobs.put, contents * 8))
    assert set(digests) == {digest_of(data) for data in contents}
    assert all(blobs.get(digest_of(data)) == data for data in contents)
    assert len(_files(tmp_path)) == 2
