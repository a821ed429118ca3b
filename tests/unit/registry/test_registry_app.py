"""What our registry does beside what every registry does: passwords, limits, tidying, damage, pages."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.http_server import HttpServer
from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.system_clock import SystemClock
from flops.core.ids import Digest
from flops.core.images import MANIFEST
from flops.registry.app import build_registry
from flops.registry.repositories import Repositories
from flops.testing.contracts.registry_server import NAME, sha256
from flops.testing.images import make_image, make_index

FOR_EVER = float("inf")  # nothing was used since then


class Place:
    """A registry on a folder."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.blobs = FileBlobs(folder / "blobs")
        self.repositories = Repositories(folder / "repositories", self.blobs)
        app = build_registry(self.blobs, self.repositories, SystemClock(), **options)  # type: ignore[arg-type]
        self._server = HttpServer(app, "127.0.0.1", 0)
        self.client = httpx.Client(trust_env=False)

    def __enter__(self) -> Place:
        self._server.start()
        self.client.base_url = f"http://127.0.0.1:{self._server.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.close()

    def push(self, *names: str, tag: str = "v1") -> Digest:
        blobs = MemoryBlobs()
        image = make_image(blobs, *names)
        for digest in blobs.digests():
            self.blobs.put(blobs.get(digest))
        self.repositories.put(NAME, blobs.get(image.digest), MANIFEST, tag)
        return image.digest


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        yield place


def test_blobs_that_no_image_has_are_removed_and_no_others(place: Place) -> None:
    kept = place.push("base", "code")
    gone = place.push("base", "old code", tag="v2")
    place.blobs.put(b"never named")
    before = len(place.blobs.digests())
    place.repositories.delete(NAME, f"sha256:{gone}")
    assert place.repositories.collect_garbage(FOR_EVER) > 0  # one layer, config, manifest, the stray one
    assert len(place.blobs.digests()) == before - 4
    blobs = MemoryBlobs()
    assert make_image(blobs, "base", "code").digest == kept
    assert set(blobs.digests()) == set(place.blobs.digests())


def test_images_of_an_index_are_kept_with_it(place: Place) -> None:
    blobs = MemoryBlobs()
    images = [make_image(blobs, arch, platform=f"linux/{arch}") for arch in ("amd64", "arm64")]
    index = make_index(blobs, *images)
    for digest in blobs.digests():
        place.blobs.put(blobs.get(digest))
    for image in images:
        place.repositories.put(NAME, blobs.get(image.digest), MANIFEST)
    place.repositories.put(NAME, blobs.get(index.digest), index.media_type, "v1")
    assert place.repositories.collect_garbage(FOR_EVER) == 0
    place.repositories.delete(NAME, f"sha256:{index.digest}")
    assert place.repositories.collect_garbage(FOR_EVER) > 0


def test_blobs_that_somebody_asked_for_lately_are_kept(tmp_path: Path, place: Place) -> None:
    digests = [place.blobs.put(data) for data in (b"asked for", b"sent again", b"forgotten")]
    for digest in digests:
        os.utime(tmp_path / "blobs" / digest[:2] / digest, (1_000, 1_000))
    assert place.client.head(f"/v2/{NAME}/blobs/sha256:{digests[0]}").status_code == 200
    url = f"/v2/{NAME}/blobs/uploads/"
    assert place.client.post(url, params={"digest": f"sha256:{digests[1]}"}, content=b"sent again").is_success
    assert place.repositories.collect_garbage(since_s=1_001) > 0
    assert set(place.blobs.digests()) == set(digests[:2])


def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    digest = Place(tmp_path).push("code")
    with Place(tmp_path) as place:
        client = place.client
        found = client.get(f"/v2/{NAME}/manifests/v1")
        assert found.headers["docker-content-digest"] == f"sha256:{digest}"
        assert client.get("/v2/_catalog").json() == {"repositories": [NAME]}


@pytest.mark.parametrize("damaged", ["layer", "manifest"])
def test_a_damaged_part_is_gone_until_it_is_pushed_again(tmp_path: Path, place: Place, damaged: str) -> None:
    digest = place.push("code")
    blobs = MemoryBlobs()
    make_image(blobs, "code")
    target = digest if damaged == "manifest" else max(blobs.digests(), key=blobs.size)
    url = f"/v2/{NAME}/manifests/v1" if damaged == "manifest" else f"/v2/{NAME}/blobs/sha256:{target}"
    (tmp_path / "blobs" / target[:2] / target).write_bytes(b"other bytes")
    assert place.client.get(url).status_code == 404
    assert not place.blobs.has(target)
    place.push("code")
    assert place.client.get(url).content == blobs.get(target)


def test_all_ask_for_the_password_when_there_is_one(tmp_path: Path) -> None:
    with Place(tmp_path, password="pä:ss") as place:
        client = place.client
        for method, path in (
            ("GET", "/v2/"),
            ("GET", "/v2/_catalog"),
            ("GET", f"/v2/{NAME}/manifests/v1"),
            ("PUT", f"/v2/{NAME}/manifests/v1"),
            ("DELETE", f"/v2/{NAME}/manifests/v1"),
            ("POST", f"/v2/{NAME}/blobs/uploads/"),
            ("PATCH", f"/v2/{NAME}/blobs/uploads/x"),
            ("GET", f"/v2/{NAME}/blobs/{sha256(b'')}"),
            ("GET", f"/v2/{NAME}/tags/list"),
        ):
            for value in ("", "Basic", "Basic x", "Bearer pä:ss".encode(), _basic("u:wrong"), _basic("u:")):
                refused = client.request(method, path, headers={"Authorization": value} if value else {})
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"].startswith("Basic ")
        assert client.get("/v2/", headers={"Authorization": _basic("anybody:pä:ss")}).status_code == 200


def _basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_a_blob_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with Place(tmp_path, max_blob_bytes=1_000) as place:
        client = place.client
        begun = client.post(f"/v2/{NAME}/blobs/uploads/")
        assert client.patch(begun.headers["location"], content=b"x" * 1_001).status_code == 413
        assert client.get(begun.headers["location"]).headers["range"] == "0-0"


def test_a_manifest_that_is_too_large_is_refused(place: Place) -> None:
    refused = place.client.put(f"/v2/{NAME}/manifests/v1", content=b"x" * (4 * 1024**2 + 1))
    assert refused.status_code == 413


def test_a_gap_in_an_upload_is_refused_with_what_is_there(place: Place) -> None:
    begun = place.client.post(f"/v2/{NAME}/blobs/uploads/")
    url = begun.headers["location"]
    assert place.client.patch(url, content=b"abc", headers={"Content-Range": "0-2"}).status_code == 202
    for start in (0, 2, 4):
        refused = place.client.patch(url, content=b"x", headers={"Content-Range": f"{start}-{start}"})
        assert refused.status_code == 416
        assert refused.headers["range"] == "0-2"
    data = b"abcdef"
    done = place.client.put(
        url, params={"digest": sha256(data)}, content=b"def", headers={"Content-Range": "3-5"}
    )
    assert done.status_code == 201


def test_an_upload_belongs_to_its_name(place: Place) -> None:
    begun = place.client.post(f"/v2/{NAME}/blobs/uploads/")
    other = begun.headers["location"].replace(NAME, "other/name")
    assert place.client.patch(other, content=b"x").status_code == 404


def test_a_blob_in_one_request(place: Place) -> None:
    url = f"/v2/{NAME}/blobs/uploads/"
    assert place.client.post(url, params={"digest": sha256(b"data")}, content=b"data").status_code == 201
    refused = place.client.post(url, params={"digest": sha256(b"data")}, content=b"else")
    assert refused.status_code == 400


def test_a_blob_is_there_for_every_name(place: Place) -> None:
    place.blobs.put(b"data")
    mount = {"mount": sha256(b"data"), "from": NAME}
    assert place.client.post("/v2/other/name/blobs/uploads/", params=mount).status_code == 201
    missing = {"mount": sha256(b"missing"), "from": NAME}
    assert place.client.post("/v2/other/name/blobs/uploads/", params=missing).status_code == 202


def test_pages_lead_to_each_other(place: Place) -> None:
    for n in range(1, 6):
        place.push("code", tag=f"t{n}")
    found: list[str] = []
    url: str | None = f"/v2/{NAME}/tags/list?n=2"
    while url is not None:
        page = place.client.get(url)
        assert len(page.json()["tags"]) <= 2
        found += page.json()["tags"]
        link = page.headers.get("link")
        url = link[link.index("<") + 1 : link.index(">")] if link else None
    assert found == ["t1", "t2", "t3", "t4", "t5"]


@pytest.mark.parametrize("asked", ["bytes=4-", "bytes=9-12", "bytes=-0"])
def test_a_part_that_is_not_there_is_refused(place: Place, asked: str) -> None:
    place.blobs.put(b"data")
    refused = place.client.get(f"/v2/{NAME}/blobs/{sha256(b'data')}", headers={"Range": asked})
    assert refused.status_code == 416
    assert refused.headers["content-range"] == "bytes */4"


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", f"/v2/{NAME}/blobs/sha256:12", "DIGEST_INVALID"),
        ("GET", f"/v2/{NAME}/manifests/-v1", "TAG_INVALID"),
        ("PUT", f"/v2/{NAME}/manifests/sha256:zz", "DIGEST_INVALID"),
        ("GET", "/v2/Upper/manifests/v1", "NAME_INVALID"),
        ("GET", "/v2/a/_manifests/x/manifests/v1", "NAME_INVALID"),
        ("DELETE", f"/v2/{NAME}/blobs/{sha256(b'')}", "UNSUPPORTED"),
        ("GET", "/elsewhere", "UNSUPPORTED"),
    ],
)
def test_what_is_wrong_is_said_as_clients_know_it(place: Place, method: str, path: str, code: str) -> None:
    refused = place.client.request(method, path)
    assert 400 <= refused.status_code < 500
    assert refused.json()["errors"][0]["code"] == code
