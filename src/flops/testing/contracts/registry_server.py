"""What every registry does that FLOps is used with, said in plain HTTP: ours, and those of others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from flops.adapters.memory_blobs import MemoryBlobs
from flops.core.images import INDEX, MANIFEST
from flops.testing.images import make_image, make_index

NAME = "flops/learner"


def sha256(data: bytes) -> str:
    """A digest as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def send_blob(client: httpx.Client, data: bytes, name: str = NAME) -> None:
    """Send a blob in one go."""
    begun = client.post(f"/v2/{name}/blobs/uploads/")
    assert begun.status_code == 202
    done = client.put(finish_at(begun, data), content=data)
    assert done.status_code == 201
    assert done.headers["docker-content-digest"] == sha256(data)


def finish_at(begun: httpx.Response, data: bytes) -> httpx.URL:
    """Where an upload is finished."""
    return begun.url.join(begun.headers["location"]).copy_merge_params({"digest": sha256(data)})


class RegistryServerContract:
    """Subclass it, and provide the fixture `host` of a fresh registry that anybody may use."""

    @pytest.fixture
    def host(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def client(self, host: str) -> Iterator[httpx.Client]:
        with httpx.Client(base_url=f"http://{host}", trust_env=False, timeout=30) as client:
            yield client

    def test_it_says_that_it_is_a_registry(self, client: httpx.Client) -> None:
        response = client.get("/v2/")
        assert response.status_code == 200
        assert response.headers["docker-distribution-api-version"] == "registry/2.0"

    @pytest.mark.parametrize("size", [0, 1, 3_000_000])
    def test_a_blob_that_was_sent_can_be_fetched(self, client: httpx.Client, size: int) -> None:
        data = b"x" * size
        url = f"/v2/{NAME}/blobs/{sha256(data)}"
        assert client.head(url).status_code == 404
        send_blob(client, data)
        head = client.head(url)
        assert (head.status_code, head.headers["content-length"]) == (200, str(size))
        assert client.get(url).content == data

    def test_a_part_of_a_blob_can_be_fetched(self, client: httpx.Client) -> None:
        data = bytes(range(256)) * 8_000
        send_blob(client, data)
        url = f"/v2/{NAME}/blobs/{sha256(data)}"
        for asked, expected in (("0-9", data[:10]), ("1500000-", data[1_500_000:]), ("-5", data[-5:])):
            part = client.get(url, headers={"Range": f"bytes={asked}"})
            assert part.status_code == 206
            assert part.content == expected

    def test_an_upload_goes_on_where_it_was_interrupted(self, client: httpx.Client) -> None:
        data = b"one" * 1_000 + b"two" * 1_000
        begun = client.post(f"/v2/{NAME}/blobs/uploads/")
        first = client.patch(begun.url.join(begun.headers["location"]), content=data[:3_000])
        assert first.status_code == 202
        asked = client.get(first.url.join(first.headers["location"]))
        assert asked.status_code == 204
        assert asked.headers["range"] == "0-2999"
        second = client.patch(asked.url.join(asked.headers["location"]), content=data[3_000:5_000])
        assert second.headers["range"] == "0-4999"
        done = client.put(finish_at(second, data), content=data[5_000:])
        assert done.status_code == 201
        assert client.get(f"/v2/{NAME}/blobs/{sha256(data)}").content == data

    def test_bytes_with_another_digest_are_refused(self, client: httpx.Client) -> None:
        begun = client.post(f"/v2/{NAME}/blobs/uploads/")
        refused = client.put(finish_at(begun, b"good"), content=b"evil")
        assert refused.status_code == 400
        assert refused.json()["errors"][0]["code"] == "DIGEST_INVALID"
        for data in (b"good", b"evil"):
            assert client.head(f"/v2/{NAME}/blobs/{sha256(data)}").status_code == 404

    def test_an_upload_that_was_given_up_is_gone(self, client: httpx.Client) -> None:
        begun = client.post(f"/v2/{NAME}/blobs/uploads/")
        url = begun.url.join(begun.headers["location"])
        assert client.delete(url).status_code == 204
        assert client.get(url).status_code == 404

    def test_the_same_blob_can_be_sent_by_many_at_once(self, client: httpx.Client) -> None:
        data = b"y" * 2_000_000
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(send_blob, client, data, f"flops/n{n}") for n in range(8)]:
                done.result()
        for n in range(8):
            assert client.get(f"/v2/flops/n{n}/blobs/{sha256(data)}").content == data

    def test_a_manifest_is_found_by_tag_and_digest(self, client: httpx.Client) -> None:
        data = self._send_image(client, "v1")
        for version in ("v1", sha256(data)):
            for method in ("GET", "HEAD"):
                found = client.request(
                    method, f"/v2/{NAME}/manifests/{version}", headers={"Accept": MANIFEST}
                )
                assert found.status_code == 200
                assert found.headers["docker-content-digest"] == sha256(data)
                assert found.headers["content-type"] == MANIFEST
                assert found.headers["content-length"] == str(len(data))
                assert found.content == (data if method == "GET" else b"")
        assert client.get(f"/v2/{NAME}/tags/list").json() == {"name": NAME, "tags": ["v1"]}
        assert NAME in client.get("/v2/_catalog").json()["repositories"]

    def test_an_index_leads_to_its_images(self, client: httpx.Client) -> None:
        blobs = MemoryBlobs()
        images = [make_image(blobs, arch, platform=f"linux/{arch}") for arch in ("amd64", "arm64")]
        index = make_index(blobs, *images)
        for digest in blobs.digests():
            if digest not in {index.digest, *(image.digest for image in images)}:
                send_blob(client, blobs.get(digest))
        early = self._put(client, "v2", blobs.get(index.digest), INDEX)
        assert early.status_code in {400, 404}
        for image in images:
            assert self._put(client, f"sha256:{image.digest}", blobs.get(image.digest)).status_code == 201
        assert self._put(client, "v2", blobs.get(index.digest), INDEX).status_code == 201
        found = client.get(f"/v2/{NAME}/manifests/v2", headers={"Accept": f"{INDEX}, {MANIFEST}"})
        assert found.headers["content-type"] == INDEX
        assert found.content == blobs.get(index.digest)

    def test_a_manifest_without_its_parts_is_refused(self, client: httpx.Client) -> None:
        blobs = MemoryBlobs()
        image = make_image(blobs, "never sent")
        refused = self._put(client, "v1", blobs.get(image.digest))
        assert refused.status_code in {400, 404}
        assert refused.json()["errors"][0]["code"] in {"MANIFEST_BLOB_UNKNOWN", "BLOB_UNKNOWN"}
        assert client.get(f"/v2/{NAME}/manifests/v1").status_code == 404

    @pytest.mark.parametrize("data", [b"", b"no json", b'{"schemaVersion": 2, "layers": 1}'])
    def test_what_is_no_manifest_is_refused(self, client: httpx.Client, data: bytes) -> None:
        refused = self._put(client, "v1", data)
        assert refused.status_code == 400
        assert refused.json()["errors"][0]["code"] == "MANIFEST_INVALID"

    def test_a_manifest_with_another_digest_is_refused(self, client: httpx.Client) -> None:
        data = self._send_image(client, "v1")
        refused = self._put(client, sha256(b"other"), data)
        assert refused.status_code == 400
        assert refused.json()["errors"][0]["code"] == "DIGEST_INVALID"

    def test_a_tag_moves_and_an_image_goes_with_its_tags(self, client: httpx.Client) -> None:
        first, second = self._send_image(client, "a"), self._send_image(client, "b", "other")
        assert self._put(client, "a", second).status_code == 201
        url = f"/v2/{NAME}/manifests"
        assert client.head(f"{url}/a", headers={"Accept": MANIFEST}).headers[
            "docker-content-digest"
        ] == sha256(second)
        assert client.head(f"{url}/{sha256(first)}", headers={"Accept": MANIFEST}).status_code == 200
        assert client.delete(f"{url}/{sha256(second)}").status_code == 202
        for version in ("a", "b", sha256(second)):
            assert client.get(f"{url}/{version}").status_code == 404
        assert client.delete(f"{url}/{sha256(second)}").status_code == 404

    @pytest.mark.parametrize("path", ["tags/list", "manifests/v1", f"blobs/{sha256(b'')}"])
    def test_what_is_not_there_is_not_found(self, client: httpx.Client, path: str) -> None:
        response = client.get(f"/v2/never/sent/{path}")
        assert response.status_code == 404
        assert response.json()["errors"][0]["code"] in {"NAME_UNKNOWN", "MANIFEST_UNKNOWN", "BLOB_UNKNOWN"}

    @pytest.mark.parametrize(
        "path", ["Flops/blobs/uploads/", "flops/%2e%2e/x/blobs/uploads/", "_x/blobs/uploads/"]
    )
    def test_no_name_leads_out_of_the_registry(self, client: httpx.Client, path: str) -> None:
        assert client.post(f"/v2/{path}").status_code >= 300

    def test_all_tags_are_listed(self, client: httpx.Client) -> None:
        data = self._send_image(client, "t1")
        for n in range(2, 6):
            assert self._put(client, f"t{n}", data).status_code == 201
        assert sorted(client.get(f"/v2/{NAME}/tags/list").json()["tags"]) == [f"t{n}" for n in range(1, 6)]

    def _send_image(self, client: httpx.Client, tag: str, layer: str = "code") -> bytes:
        blobs = MemoryBlobs()
        image = make_image(blobs, layer)
        for digest in blobs.digests():
            if digest != image.digest:
                send_blob(client, blobs.get(digest))
        data = blobs.get(image.digest)
        assert self._put(client, tag, data).status_code == 201
        return data

    def _put(
        self, client: httpx.Client, version: str, data: bytes, media_type: str = MANIFEST
    ) -> httpx.Response:
        url = f"/v2/{NAME}/manifests/{version}"
        return client.put(url, content=data, headers={"Content-Type": media_type})
