"""Nodes of a site fetch packages through their cluster: from the index each once, and only locked ones."""

from __future__ import annotations

import functools
import hashlib
import http.server
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
import uv

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.http_server import HttpServer
from flops.adapters.images.assembler import OciAssembler
from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.memory_cluster_store import MemoryClusterStore
from flops.adapters.package_index import ClusterPackages, HttpPackageIndex
from flops.adapters.system_clock import SystemClock
from flops.adapters.uv_environments import UvEnvironments
from flops.core.cluster import ServiceKind, ServiceSpec
from flops.core.clusters import DEFAULT_CLUSTER
from flops.core.ids import Digest, NodeId, ServiceId
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageRecipe
from flops.orchestrator.app import build_app
from flops.orchestrator.cluster import ClusterOrchestrator
from flops.orchestrator.packages import PackageCache
from flops.settings import inherited_environment
from flops.testing.images import HandMadeBase, free_port
from flops.testing.safe_cluster import SafeCluster
from flops.testing.wheels import lock_of, make_wheel
from flops.wire.cluster_tls import cluster_tls, http_options
from flops.wire.node import StartService, Welcome
from flops.wiring.site_packages import site_packages

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
DATA_BYTES = 300_000


class Index:
    """A package index: a folder with a page and the wheels of each package, served and counted.

    Args:
        folder: of the packages.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels: list[Path] = []
        self.asked: Counter[str] = Counter()
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                asked[self.path.rpartition("/")[2] or self.path] += 1
                super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, name: str, *, requires: tuple[str, ...] = ()) -> Path:
        """Put a package there, with a page that names its hash."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        wheel = make_wheel(folder, name, "1", requires=requires, modules=[name], data_bytes=DATA_BYTES)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        page = f'<a href="{wheel.name}#sha256={digest}" data-requires-python="&gt;=3.8">{wheel.name}</a>'
        (folder / "index.html").write_text(f"<html><body>{page}</body></html>")
        self.wheels.append(wheel)
        return wheel

    @property
    def fetched(self) -> dict[str, int]:
        """How often each wheel was asked for."""
        return {name: count for name, count in self.asked.items() if name.endswith(".whl")}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def index_for(packages: ClusterPackages, lock: str) -> str:
    """Where a cluster serves the files of a lock, having been told of it."""
    with packages.serving(lock) as index:
        return index


class MovedClock(SystemClock):
    """The time, some days ahead."""

    days = 0

    def now_s(self) -> float:
        return super().now_s() + self.days * 86_400


class Site:
    """A cluster that fetches packages for its nodes.

    Args:
        folder: for everything.
        index: where packages come from.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.index = index
        self.blobs = MemoryBlobs()
        self.kept = FileBlobs(folder / "packages")
        self._upstream = HttpPackageIndex(index.url)
        self.clock = MovedClock()
        self.packages = PackageCache(self._upstream, self.kept, self.blobs, self.clock)
        orchestrator = ClusterOrchestrator(MemoryClusterStore(), SystemClock())
        app = build_app(orchestrator, self.blobs, more=self.packages.routes())
        self._server = HttpServer(app, "127.0.0.1", 0)
        self._server.start()
        self.url = f"http://127.0.0.1:{self._server.port}/api"

    def close(self) -> None:
        self._server.close()
        self._upstream.close()

    def environ(self, name: str) -> dict[str, str]:
        """The environment of a node's uv: a cache of its own, and the index."""
        cache = {"UV_CACHE_DIR": str(self.folder / f"cache of {name}"), "UV_DEFAULT_INDEX": self.index.url}
        return {**inherited_environment(), **cache}

    def node(self, name: str, packages: ClusterPackages | None = None) -> UvEnvironments:
        return UvEnvironments(
            self.folder / name,
            uv=Path(uv.find_uv_bin()),
            environ=self.environ(name),
            mlflow_version="3.0",
            site=packages or site_packages(f"{self.url}/blobs", dict),
        )

    def lock(self, *wheels: Path) -> str:
        """A lock of wheels that the cluster knows."""
        text = lock_of(*wheels, python=MINOR)
        self.blobs.put(text.encode())
        return text

    def ask(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}/packages/{path}", headers=headers, timeout=30)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path / "index")
    yield index
    index.close()


@pytest.fixture
def site(tmp_path: Path, index: Index) -> Iterator[Site]:
    site = Site(tmp_path, index)
    yield site
    site.close()


def ignore(_message: str) -> None:
    pass


def path_of(wheel: Path) -> str:
    return f"files/{hashlib.sha256(wheel.read_bytes()).hexdigest()}/{wheel.name}"


def test_two_nodes_at_once_fetch_each_file_from_the_index_once(site: Site) -> None:
    lock = site.lock(site.index.add("one"), site.index.add("two"))
    with ThreadPoolExecutor(2) as pool:
        pythons = list(pool.map(lambda name: site.node(name).materialise(lock, ignore), ("a", "b")))
    for python in pythons:
        assert (python.parents[1] / f"lib/python{MINOR}/site-packages/two").is_dir()
    assert site.index.fetched == {wheel.name: 1 for wheel in site.index.wheels}


def test_an_image_is_made_from_the_same_files(site: Site) -> None:
    lock = site.lock(site.index.add("one"))
    site.node("a").materialise(lock, ignore)
    assembler = OciAssembler(
        site.folder / "layers",
        FileBlobs(site.folder / "images"),
        HandMadeBase(),
        uv=Path(uv.find_uv_bin()),
        environ=site.environ("b"),
        site=site_packages(f"{site.url}/blobs", dict),
    )
    assembler.assemble(ImageRecipe(tuple(Platform), lock), ignore)
    assert set(site.index.fetched.values()) == {1}


@pytest.fixture
def safe(site: Site) -> Iterator[SafeCluster]:
    """The same cluster on a port that encrypts."""
    cluster = SafeCluster(site.folder / "safe", more=site.packages.routes())
    yield cluster
    cluster.close()


def packages_of(cluster: SafeCluster, **options: Any) -> ClusterPackages:
    return site_packages(f"{cluster.url}/api/blobs", lambda: options)


def test_nodes_fetch_from_a_cluster_that_encrypts_too(site: Site, index: Index, safe: SafeCluster) -> None:
    lock = site.lock(index.add("one", requires=("two",)), index.add("two"))
    for name in ("n1", "n2"):
        safe.join(name)
        packages = packages_of(safe, verify=safe.tls_of(name))
        site.node(name, packages).materialise(lock, ignore)
    assert index.fetched == {wheel.name: 1 for wheel in index.wheels}
    # At the same address as before: uv, which caches by address, has nothing to fetch again.
    with packages.serving(lock) as first, packages.serving(lock) as beside:
        assert httpx.get(f"{first}one/").is_success
        assert httpx.get(f"{beside}one/").is_success
        assert first != beside
    assert index_for(packages, lock) == first


def test_nothing_but_packages_is_passed_on_and_to_no_stranger(
    site: Site, index: Index, safe: SafeCluster
) -> None:
    lock = site.lock(index.add("one"))
    authority = safe.security.admission.authority_pem
    guessed = http_options(authority, "s1", "guessed", DEFAULT_CLUSTER)
    assert index_for(packages_of(safe, verify=cluster_tls(authority)), lock) == ""
    assert index_for(packages_of(safe, **guessed), lock) == ""
    assert index_for(packages_of(safe), lock) == ""  # an authority that nobody has named
    safe.join("n1")
    with safe.linked("n1") as played:
        played.expect(Welcome)
        builder = ServiceSpec(
            id=ServiceId("b1"), project_id="p", kind=ServiceKind.BUILDER, node_id=NodeId("n1")
        )
        safe.orchestrator.start_service(builder)
        key = played.expect(StartService).spec.key
        own = packages_of(safe, **http_options(authority, "b1", key, DEFAULT_CLUSTER))
        assert index_for(own, lock).endswith("/simple/")
    blob = f"api/blobs/{hashlib.sha256(lock.encode()).hexdigest()}"
    with packages_of(safe, verify=safe.tls_of("n1")).serving(lock) as found:
        base = found.removesuffix("/simple/")
        for path in (f"../{blob[4:]}", f"%2e%2e/{blob[4:]}", f"..%2F{blob[4:]}", blob, f"/{blob}"):
            url = httpx.URL(base).copy_with(raw_path=f"/{path}".encode())
            answer = httpx.get(url)
            assert answer.status_code == 404, path


def test_a_node_asks_the_index_itself_while_the_cluster_is_away_or_does_not_know_the_lock(
    site: Site, index: Index
) -> None:
    lock = lock_of(index.add("one"), python=MINOR)
    site.node("a").materialise(lock, ignore)
    assert index_for(site_packages(f"http://127.0.0.1:{free_port()}/api/blobs", dict), lock) == ""
    assert index_for(site_packages(f"https://127.0.0.1:{free_port()}/api/blobs", dict), lock) == ""
    assert list(site.kept.digests()) == []


def test_a_cluster_that_cannot_reach_the_index_is_passed_over(
    site: Site, index: Index, tmp_path: Path
) -> None:
    lock = site.lock(index.add("one"))
    other = Index(tmp_path / "empty")
    other.folder.mkdir()
    cut_off = Site(tmp_path / "cut off", other)
    cut_off.blobs.put(lock.encode())
    cut_off.index = index
    told: list[str] = []
    try:
        cut_off.node("a").materialise(lock, told.append)
    finally:
        cut_off.close()
        other.close()
    assert any(line.startswith("The cluster's packages cannot be used") for line in told)
    assert index.fetched == {index.wheels[0].name: 1}


def test_other_bytes_than_locked_are_not_taken_from_the_index(site: Site, index: Index) -> None:
    wheel = index.add("one")
    lock = site.lock(wheel)
    path = path_of(wheel)
    index_for(site_packages(f"{site.url}/blobs", dict), lock)
    assert site.ask("simple/one/").status_code == HTTPStatus.OK
    wheel.write_bytes(b"evil")
    assert site.ask(path).status_code != HTTPStatus.OK
    assert site.kept.digests() == []
    with pytest.raises(FlopsError) as caught:
        site.node("a").materialise(lock, ignore)
    assert caught.value.code is ErrorCode.ENVIRONMENT_BUILD_FAILED


def test_what_no_known_lock_has_is_not_served_also_when_it_is_here(site: Site, index: Index) -> None:
    known, unknown = index.add("known"), index.add("unknown")
    index_for(site_packages(f"{site.url}/blobs", dict), site.lock(known))
    site.kept.put(unknown.read_bytes())
    assert site.ask(path_of(known)).content == known.read_bytes()
    for path in (path_of(unknown), "simple/unknown/", "files/x/y.whl", "simple/../"):
        assert site.ask(path).status_code == HTTPStatus.NOT_FOUND, path
    assert httpx.post(f"{site.url}/packages/locks/{'0' * 64}").status_code == HTTPStatus.NOT_FOUND
    assert "unknown" not in "".join(index.asked)


def test_a_part_of_a_file_is_given(site: Site, index: Index) -> None:
    wheel = index.add("one")
    index_for(site_packages(f"{site.url}/blobs", dict), site.lock(wheel))
    data = wheel.read_bytes()
    for header, part in (("bytes=0-3", data[:4]), ("bytes=-5", data[-5:]), ("bytes=7-", data[7:])):
        answer = site.ask(path_of(wheel), Range=header)
        assert (answer.status_code, answer.content) == (HTTPStatus.PARTIAL_CONTENT, part)
    beyond = site.ask(path_of(wheel), Range=f"bytes={len(data)}-")
    assert beyond.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


def test_a_damaged_file_is_fetched_again(site: Site, index: Index) -> None:
    wheel = index.add("one")
    index_for(site_packages(f"{site.url}/blobs", dict), site.lock(wheel))
    site.ask(path_of(wheel))
    (digest,) = site.kept.digests()
    (site.folder / "packages" / digest[:2] / digest).write_bytes(b"damaged")
    assert site.ask(path_of(wheel)).content == wheel.read_bytes()


def test_files_that_nobody_asked_for_in_a_month_go(site: Site, index: Index) -> None:
    wheel = index.add("one")
    index_for(site_packages(f"{site.url}/blobs", dict), site.lock(wheel))
    site.ask(path_of(wheel))
    site.clock.days = 29
    site.packages.shrink()
    assert len(site.kept.digests()) == 1
    site.clock.days = 31
    site.packages.shrink()
    assert site.kept.digests() == []
    assert site.ask(path_of(wheel)).content == wheel.read_bytes()
    assert Digest(path_of(wheel).split("/")[1]) in site.kept.digests()
