from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from flops.core.ids import Digest
from flops.errors import ErrorCode, FlopsError
from flops.node.bundles import BundleStore

DIGEST = Digest("a" * 64)


def archive(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return raw.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def store(folder: Path, data: bytes, **options: int) -> BundleStore:
    return BundleStore(folder / "bundles", lambda _digest, path: path.write_bytes(data) and None, **options)


def test_a_bundle_is_unpacked_once(tmp_path: Path) -> None:
    fetched = []

    def fetch(digest: Digest, path: Path) -> None:
        fetched.append(digest)
        path.write_bytes(archive(("a/b.txt", b"text"), link("a/c", "b.txt"), link("d", "a/b.txt")))

    bundles = BundleStore(tmp_path / "bundles", fetch)
    folder = bundles.folder_of(DIGEST)
    assert bundles.folder_of(DIGEST) == folder
    assert fetched == [DIGEST]
    assert (folder / "a/c").read_text() == (folder / "d").read_text() == "text"
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == [DIGEST]


@pytest.mark.parametrize(
    "member",
    [
        ("../out", b"x"),
        ("/tmp/out", b"x"),
        ("a/../../out", b"x"),
        link("a", "/etc"),
        link("a", ".."),
        link("a/b", "../../etc"),
        link("a/b", "c/../.."),
        link("a", "b", tarfile.LNKTYPE),
        link("a", "", tarfile.FIFOTYPE),
        link("a", "", tarfile.CHRTYPE),
    ],
)
def test_what_leaves_the_bundle_is_refused(
    tmp_path: Path, member: tarfile.TarInfo | tuple[str, bytes]
) -> None:
    with pytest.raises(FlopsError) as caught:
        store(tmp_path, archive(("fine", b"x"), member)).folder_of(DIGEST)
    assert caught.value.code is ErrorCode.SERVICE_FAILED
    assert not list(tmp_path.rglob("out"))
    assert list((tmp_path / "bundles").iterdir()) == []


def test_nothing_is_written_behind_a_link(tmp_path: Path) -> None:
    data = archive(("a/real", b"x"), link("b", "a"), ("b/c", b"x"))
    with pytest.raises(FlopsError, match="behind a link"):
        store(tmp_path, data).folder_of(DIGEST)


@pytest.mark.parametrize(
    "data", [b"", b"text", archive(("a", b"x" * 10_000))[:-30]], ids=["empty", "text", "cut off"]
)
def test_a_damaged_bundle_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(FlopsError) as caught:
        store(tmp_path, data).folder_of(DIGEST)
    assert caught.value.code is ErrorCode.SERVICE_FAILED
    assert list((tmp_path / "bundles").iterdir()) == []


def test_a_bundle_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlopsError, match="more than 100 bytes"):
        store(tmp_path, archive(("a", b"x" * 101)), max_bytes=100).folder_of(DIGEST)


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    def fetch(_digest: Digest, path: Path) -> None:
        path.write_bytes(b"part")
        raise FlopsError(ErrorCode.UNREACHABLE, "away")

    with pytest.raises(FlopsError, match="away"):
        BundleStore(tmp_path / "bundles", fetch).folder_of(DIGEST)
    assert list((tmp_path / "bundles").iterdir()) == []
