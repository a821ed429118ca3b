"""Registries that are away, break off, refuse, restart or are damaged: what is pushed and pulled is whole."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.http_server import HttpServer
from flops.adapters.registry_client.auth import DockerCredentials
from flops.adapters.registry_client.client import OciRegistry
from flops.command import StoppedError, stopped_when
from flops.core.image_reference import ImageReference
from flops.core.images import Manifest, read_manifest
from flops.errors import ErrorCode, FlopsError
from flops.testing.disk import small_disk
from flops.testing.images import (
    BreakingProxy,
    debian_registry,
    free_port,
    has_debian_registry,
    make_image,
    own_registry,
)
from flops.testing.waiting import until

LARGE = 36_000_000  # three requests
SERVERS = [
    own_registry,
    pytest.param(
        debian_registry,
        marks=pytest.mark.skipif(not has_debian_registry(), reason="needs Debian's docker-registry"),
    ),
]


def ignore(_message: str) -> None:
    pass


def client(credentials: dict[str, str] | None = None, **options: object) -> OciRegistry:
    auths = {
        host: {"auth": base64.b64encode(text.encode()).decode()} for host, text in (credentials or {}).items()
    }
    return OciRegistry(DockerCredentials({"auths": auths}), first_pause_s=0.02, **options)  # type: ignore[arg-type]


def name_at(host: str) -> ImageReference:
    return ImageReference(host=host, name="flops/learner", tag="v1")


@pytest.fixture
def here(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "there")


@pytest.mark.parametrize("server", SERVERS)
def test_a_push_goes_on_where_the_connection_broke(
    server: object, tmp_path: Path, here: FileBlobs, there: FileBlobs
) -> None:
    image = make_image(here, "large", size=LARGE)
    with server(tmp_path / "registry") as host:  # type: ignore[operator]
        port = int(host.rpartition(":")[2])
        with BreakingProxy(port, up=30_000_000, times=3) as proxy:
            client().push(name_at(proxy.host), image, here, ignore)
            assert proxy.broken >= 1
            # Debian's registry takes up no upload of which a part had arrived: it has to be sent anew.
            assert proxy.bytes_up < 1.9 * LARGE or server is debian_registry
        client().pull(name_at(host), there, ignore)
    assert there.digests() == here.digests()


@pytest.mark.parametrize("server", SERVERS)
def test_a_pull_goes_on_where_the_connection_broke(
    server: object, tmp_path: Path, here: FileBlobs, there: FileBlobs
) -> None:
    image = make_image(here, "large", size=LARGE)
    with server(tmp_path / "registry") as host:  # type: ignore[operator]
        client().push(name_at(host), image, here, ignore)
        with BreakingProxy(int(host.rpartition(":")[2]), down=9_000_000, times=20) as proxy:
            client().pull(name_at(proxy.host), there, ignore)
            assert 4 <= proxy.broken < 20  # each time it got on: so often it may break
    assert there.digests() == here.digests()


def test_a_registry_that_is_away_for_a_moment_is_waited_for(
    tmp_path: Path, here: FileBlobs, there: FileBlobs
) -> None:
    image = make_image(here, "large", size=LARGE)
    port = free_port()
    reference = name_at(f"127.0.0.1:{port}")
    registry = OciRegistry(first_pause_s=0.5)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(registry.push(reference, image, here, ignore)))
    thread.start()
    with own_registry(tmp_path / "registry", port=port):
        thread.join(30)
        assert done
        registry.pull(reference, there, ignore)
    assert there.digests() == here.digests()


def test_a_push_survives_a_restart_of_the_registry(tmp_path: Path, here: FileBlobs, there: FileBlobs) -> None:
    image = make_image(here, "large", size=LARGE)
    folder, port = tmp_path / "registry", free_port()
    reference = name_at(f"127.0.0.1:{port}")
    thread = threading.Thread(target=lambda: OciRegistry().push(reference, image, here, ignore))
    with own_registry(folder, port=port):
        thread.start()
        until(lambda: any(path.stat().st_size for path in (folder / "blobs" / "incoming").iterdir()))
    with own_registry(folder, port=port):
        thread.join(60)
        client().pull(reference, there, ignore)
    assert there.digests() == here.digests()


def test_a_registry_that_is_away_is_told_with_its_address(here: FileBlobs, there: FileBlobs) -> None:
    reference = name_at(f"127.0.0.1:{free_port()}")
    registry = OciRegistry(first_pause_s=0.001)
    for ask in (
        lambda: registry.push(reference, make_image(here, "code"), here, ignore),
        lambda: registry.pull(reference, there, ignore),
        lambda: registry.tags(reference),
        lambda: registry.delete(reference),
    ):
        with pytest.raises(FlopsError) as caught:
            ask()
        assert caught.value.code is ErrorCode.REGISTRY_UNREACHABLE
        assert reference.host in caught.value.message


def test_a_push_that_nobody_needs_any_more_ends(here: FileBlobs) -> None:
    image = make_image(here, "code")
    asked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # nobody takes connections, nobody answers
        reference = name_at(f"127.0.0.1:{silent.getsockname()[1]}")
        silent.close()

        def is_needless() -> bool:
            asked.set()
            return True

        with stopped_when(is_needless), pytest.raises(StoppedError):
            OciRegistry(first_pause_s=60).push(reference, image, here, ignore)
    assert asked.is_set()


# What is damaged


def parts_in(folder: Path, here: FileBlobs) -> list[Path]:
    """Files of an image's layers and config in our registry's folder."""
    (manifest,) = [
        found
        for digest in here.digests()
        if here.size(digest) < 2_000
        and here.get(digest).startswith(b'{"config":{"d')
        and isinstance(found := read_manifest(here.get(digest)), Manifest)
    ]
    return [folder / "blobs" / part.digest[:2] / part.digest for part in manifest.blobs]


def test_a_part_that_is_damaged_in_the_registry_is_found_and_healed_by_the_next_push(
    tmp_path: Path, here: FileBlobs, there: FileBlobs
) -> None:
    image = make_image(here, "code")
    with own_registry(tmp_path / "registry") as host:
        client().push(name_at(host), image, here, ignore)
        parts_in(tmp_path / "registry", here)[0].write_bytes(b"other bytes")
        with pytest.raises(FlopsError) as caught:
            client().pull(name_at(host), there, ignore)
        assert caught.value.code is ErrorCode.IMAGE_NOT_FOUND
        assert "damaged" in caught.value.message
        assert client().push(name_at(host), image, here, ignore) > 1_000
        client().pull(name_at(host), there, ignore)
    assert there.digests() == here.digests()


@pytest.mark.skipif(not has_debian_registry(), reason="needs Debian's docker-registry")
@pytest.mark.parametrize("damage", [b"x" * 50_000, b"x", b""], ids=["longer", "shorter", "emptied"])
def test_a_part_with_other_bytes_is_not_taken(
    tmp_path: Path, here: FileBlobs, there: FileBlobs, damage: bytes
) -> None:
    image = make_image(here, "code", size=20_000)
    with debian_registry(tmp_path / "registry") as host:
        client().push(name_at(host), image, here, ignore)
        for path in (tmp_path / "registry").rglob("data"):
            if path.is_file() and path.stat().st_size > 10_000:
                path.write_bytes(damage)
        with pytest.raises(FlopsError) as caught:
            client().pull(name_at(host), there, ignore)
    assert caught.value.code in {ErrorCode.IMAGE_DAMAGED, ErrorCode.REGISTRY_UNREACHABLE}
    assert all(there.size(digest) < 10_000 for digest in there.digests())


def test_a_damaged_part_here_is_fetched_again(tmp_path: Path, here: FileBlobs, there: FileBlobs) -> None:
    image = make_image(here, "code")
    with own_registry(tmp_path / "registry") as host:
        client().push(name_at(host), image, here, ignore)
        client().pull(name_at(host), there, ignore)
        for path in (tmp_path / "there").glob("??/*"):
            path.write_bytes(b"other bytes")
        client().pull(name_at(host), there, ignore)
    assert all(there.get(digest) == here.get(digest) for digest in here.digests())


def test_a_damaged_part_here_is_not_pushed(tmp_path: Path, here: FileBlobs) -> None:
    image = make_image(here, "code", size=30_000)
    (layer,) = [path for path in (tmp_path / "here").glob("??/*") if path.stat().st_size > 20_000]
    layer.write_bytes(os.urandom(layer.stat().st_size))
    with own_registry(tmp_path / "registry") as host:
        with pytest.raises(FlopsError) as caught:
            client().push(name_at(host), image, here, ignore)
        assert caught.value.code is ErrorCode.IMAGE_DAMAGED
        assert str(layer) in caught.value.message
        assert client().tags(name_at(host)) == []


SERVE = """
import sys
from pathlib import Path
from flops.testing.images import own_registry
with own_registry(Path(sys.argv[1]), port=int(sys.argv[2])):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def registry_process(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(folder), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_nothing_that_was_pushed_is_lost_by_a_kill(tmp_path: Path, here: FileBlobs, there: FileBlobs) -> None:
    port = free_port()
    reference = name_at(f"127.0.0.1:{port}")
    first, second = make_image(here, "first"), make_image(here, "second", size=LARGE)
    with registry_process(tmp_path / "registry", port) as process:
        client().push(reference, first, here, ignore)
        thread = threading.Thread(
            target=lambda: OciRegistry().push(
                reference.model_copy(update={"tag": "v2"}), second, here, ignore
            )
        )
        thread.start()
        incoming = tmp_path / "registry" / "blobs" / "incoming"
        until(lambda: any(path.stat().st_size > 1_000_000 for path in incoming.iterdir()))
        process.send_signal(signal.SIGKILL)
    with registry_process(tmp_path / "registry", port):
        thread.join(60)
        assert client().tags(reference) == ["v1", "v2"]
        for tag in ("v1", "v2"):
            client().pull(reference.model_copy(update={"tag": tag}), there, ignore)
    assert there.digests() == here.digests()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_registry_whose_disk_is_full_says_so_and_takes_images_again(
    tmp_path: Path, here: FileBlobs, there: FileBlobs
) -> None:
    image = make_image(here, "large", size=3_000_000)
    with small_disk(tmp_path / "disk", "1m") as disk, own_registry(disk / "registry") as host:
        with pytest.raises(FlopsError) as caught:
            client().push(name_at(host), image, here, ignore)
        assert caught.value.code is ErrorCode.REGISTRY_REFUSED
        assert "full" in caught.value.message
        assert not list((disk / "registry" / "blobs" / "incoming").iterdir())
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        client().push(name_at(host), image, here, ignore)
        client().pull(name_at(host), there, ignore)
    assert there.digests() == here.digests()


# Who may


def test_our_registry_wants_its_password(tmp_path: Path, here: FileBlobs, there: FileBlobs) -> None:
    image = make_image(here, "code")
    with own_registry(tmp_path / "registry", password="secret") as host:
        for credentials in (None, {host: "flops:wrong"}, {"other:1": "flops:secret"}):
            with pytest.raises(FlopsError) as caught:
                client(credentials).push(name_at(host), image, here, ignore)
            assert caught.value.code is ErrorCode.REGISTRY_REFUSED
            assert host in caught.value.message
            assert "secret" not in caught.value.message
        client({host: "anybody:secret"}).push(name_at(host), image, here, ignore)
        client({host: "anybody:secret"}).pull(name_at(host), there, ignore)
    assert there.digests() == here.digests()


@pytest.mark.skipif(not has_debian_registry(), reason="needs Debian's docker-registry")
def test_debians_registry_wants_a_user(tmp_path: Path, here: FileBlobs) -> None:
    users = "flops:$2y$05$PlVRcmpJLDdHpzd95EeSmOb5/6CNIzUXEzsEH5SDpWCyTXMm4FYYW\n"
    with debian_registry(tmp_path / "registry", users=users) as host:
        image = make_image(here, "code")
        with pytest.raises(FlopsError) as caught:
            client({host: "flops:wrong"}).push(name_at(host), image, here, ignore)
        assert caught.value.code is ErrorCode.REGISTRY_REFUSED
        assert "401" in caught.value.message


class TokenRegistry:
    """A registry that sends everyone to a server of tokens, as large ones do; a token is for one use."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self._tokens: set[str] = set()
        self._base = ""
        self.server = HttpServer(
            Starlette(
                routes=[
                    Route("/token", self.give_token, methods=["GET", "POST"]),
                    Route("/v2/{rest:path}", self.answer),
                ]
            ),
            "127.0.0.1",
            0,
        )

    def __enter__(self) -> TokenRegistry:
        self.server.start()
        self._base = f"http://127.0.0.1:{self.server.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()

    async def give_token(self, request: Request) -> Response:
        known = request.headers.get("authorization") == "Basic " + base64.b64encode(b"me:pw").decode()
        form = (await request.body()).decode()
        if not known and "refresh_token=idtoken" not in form:
            return Response(status_code=401)
        self.asked.append({"query": str(request.url.query), "form": form})
        token = f"t{len(self.asked)}"
        self._tokens.add(token)
        return JSONResponse({"token": token} if known else {"access_token": token})

    async def answer(self, request: Request) -> Response:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in self._tokens:
            challenge = f'Bearer realm="{self._base}/token",service="reg",scope="repository:a/b:pull"'
            return Response(status_code=401, headers={"WWW-Authenticate": challenge})
        self._tokens.remove(token)
        return JSONResponse({"name": "a/b", "tags": ["v1"]})


@pytest.mark.parametrize("kind", ["password", "token"])
def test_a_token_is_asked_for_and_again_when_it_has_run_out(kind: str) -> None:
    with TokenRegistry() as registry:
        host = f"127.0.0.1:{registry.server.port}"
        entry = (
            {"auth": base64.b64encode(b"me:pw").decode()}
            if kind == "password"
            else {"auth": base64.b64encode(b"me:").decode(), "identitytoken": "idtoken"}
        )
        tags = OciRegistry(DockerCredentials({"auths": {host: entry}})).tags
        for _ in range(2):
            assert tags(ImageReference(host=host, name="a/b")) == ["v1"]
        assert len(registry.asked) == 2
        asked = registry.asked[0]["query"] + registry.asked[0]["form"]
        assert "service=reg" in asked
        assert "scope=repository" in asked


def test_a_wrong_password_for_tokens_is_a_refusal() -> None:
    with TokenRegistry() as registry:
        host = f"127.0.0.1:{registry.server.port}"
        with pytest.raises(FlopsError) as caught:
            client({host: "me:wrong"}).tags(ImageReference(host=host, name="a/b"))
        assert caught.value.code is ErrorCode.REGISTRY_REFUSED


# Encryption


@pytest.mark.skipif(
    not has_debian_registry() or shutil.which("openssl") is None, reason="needs docker-registry and openssl"
)
def test_a_registry_with_a_private_authority_is_trusted_when_told_to(tmp_path: Path, here: FileBlobs) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.2"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    image = make_image(here, "code")
    with debian_registry(tmp_path / "registry", tls=(certificate, key)) as host:
        # a name that is not taken for this machine, where registries are spoken to in the clear
        reference = name_at(host.replace("127.0.0.1", socket.gethostname()))
        trusted = ssl.create_default_context(cafile=str(certificate))
        trusted.check_hostname = False
        client(tls=trusted).push(reference, image, here, ignore)
        assert client(tls=trusted).tags(reference) == ["v1"]
        with pytest.raises(FlopsError) as caught:
            OciRegistry(first_pause_s=0.001).tags(reference)
        assert caught.value.code is ErrorCode.REGISTRY_UNREACHABLE
        assert "certificate" in caught.value.message
