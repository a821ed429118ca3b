"""Further clusters: relays between a manager's cluster and nodes that tests play, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.http_server import HttpServer, server_tls
from flops.adapters.manager_uplink import ManagerUplink
from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.memory_cluster_store import MemoryClusterStore
from flops.adapters.node_identity import (
    certify_service,
    join_cluster,
    join_manager,
    read_identity,
    renew_identity,
)
from flops.adapters.node_link import dial_cluster
from flops.adapters.system_clock import SystemClock
from flops.core.admission import PeerCertificate
from flops.core.cluster import LEARNER_ADDON, NODE_LOST_AFTER_S, ServiceKind, ServiceSpec
from flops.core.clusters import DEFAULT_CLUSTER, Cluster
from flops.core.ids import NodeId, ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.app import build_app
from flops.orchestrator.cluster import ClusterOrchestrator
from flops.orchestrator.clusters import Clusters
from flops.registry.app import build_registry
from flops.registry.repositories import Repositories
from flops.relay.configuration import IDENTITY_FILE, RelayConfiguration
from flops.relay.presence import Presence
from flops.settings import RelaySettings
from flops.testing.safe_cluster import HOUR_S, LIFE_S, MovedClock, Played, SafeCluster, hello, refused
from flops.testing.waiting import until
from flops.wire.cluster_tls import cluster_tls
from flops.wire.join import JoinToken, RelayPresence, node_header
from flops.wire.node import FROM_CLUSTER, Refused, StartService, Welcome
from flops.wiring.cluster_port import with_registry
from flops.wiring.relay import start_relay
from flops.wiring.renewal import RenewedIdentity

pytestmark = pytest.mark.timeout(120)


class Site:
    """A further cluster: its relay runs from `start` to `close`."""

    def __init__(self, manager: SafeCluster, folder: Path, name: str) -> None:
        self.manager = manager
        self.name = name
        self.settings = RelaySettings(home=folder, cluster_port=0)
        self.folder = self.settings.relay_dir
        self.identity = self.folder / IDENTITY_FILE
        token = manager.security.admission.invite_relay(manager.address, name, for_s=HOUR_S)
        join_manager(self.identity, token, manager.address, name)
        RelayConfiguration(cluster=name, manager=manager.address).save(self.folder)
        self.start()

    def start(self) -> None:
        with ExitStack() as parts:
            self.endpoint = start_relay(self.settings, parts)
            self._parts = parts.pop_all()
        self.address = str(self.endpoint["cluster_address"])

    def close(self) -> None:
        self._parts.close()

    def invite(self) -> JoinToken:
        return self.manager.security.admission.invite(
            self.address, nodes=1, for_s=HOUR_S, addons=(LEARNER_ADDON,), cluster=self.name
        )

    def join(self, node_id: str, token: JoinToken | None = None) -> None:
        join_cluster(self.manager.file_of(node_id), token or self.invite(), self.address, node_id, ())

    @contextlib.contextmanager
    def linked(self, node_id: str) -> Iterator[Played]:
        with linked(self.manager, node_id, self.address, self.name) as played:
            yield played

    def get(self, path: str, node_id: str, **headers: str) -> httpx.Response:
        identity = self.manager.file_of(node_id)
        tls = cluster_tls(self.manager.security.admission.authority_pem, identity, self.name)
        with httpx.Client(verify=tls, trust_env=False) as client:
            return client.get(f"https://{self.address}{path}", headers=headers)


@contextlib.contextmanager
def linked(manager: SafeCluster, node_id: str, address: str, expected: str) -> Iterator[Played]:
    """The connection of a node, wherever it dials, and whomever it expects there."""
    identity = manager.file_of(node_id)
    tls = cluster_tls(manager.security.admission.authority_pem, identity, expected)
    link = dial_cluster(address, tls=tls)
    try:
        link.send(hello(node_id))
        yield Played(link)
    finally:
        link.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[SafeCluster]:
    cluster = SafeCluster(tmp_path / "manager")
    yield cluster
    cluster.close()


@pytest.fixture
def edge_a(manager: SafeCluster, tmp_path: Path) -> Iterator[Site]:
    site = Site(manager, tmp_path / "a", "edge-a")
    yield site
    site.close()


@pytest.fixture
def edge_b(manager: SafeCluster, tmp_path: Path) -> Iterator[Site]:
    site = Site(manager, tmp_path / "b", "edge-b")
    yield site
    site.close()


def spec(service_id: str, node_id: str, kind: ServiceKind = ServiceKind.LEARNER) -> ServiceSpec:
    return ServiceSpec(id=ServiceId(service_id), project_id="p", kind=kind, node_id=NodeId(node_id))


# Joining, and being there


def test_a_node_that_joins_by_a_relay_is_of_its_cluster_and_works(
    manager: SafeCluster, edge_a: Site, tmp_path: Path
) -> None:
    edge_a.join("n1")
    manager.join("n2")
    with edge_a.linked("n1") as far, manager.linked("n2") as near:
        assert far.expect(Welcome).cluster == "edge-a"
        assert near.expect(Welcome).cluster == "default"
        found = {node.id: node.cluster for node in manager.orchestrator.nodes()}
        assert found == {"n1": "edge-a", "n2": "default"}
        manager.orchestrator.start_service(spec("a1", "n1", ServiceKind.AGGREGATOR))
        key = far.expect(StartService).spec.key
        file = tmp_path / "service.pem"
        certify_service(manager.file_of("n1"), edge_a.address, "a1", file, time.time())
        assert file.exists()
        tls = cluster_tls(manager.security.admission.authority_pem, cluster="edge-a")
        with httpx.Client(verify=tls, trust_env=False, auth=("a1", key)) as client:
            url = f"https://{edge_a.address}/api/blobs/"
            digest = hashlib.sha256(b"model").hexdigest()
            assert client.put(url + digest, content=b"model").json() == {"digest": digest}
            assert client.get(url + digest).content == b"model"
            assert client.get(url + "0" * 64).json()["code"] == ErrorCode.NOT_FOUND.value


def test_clusters_are_known_by_their_presence_and_over_restarts(
    manager: SafeCluster, edge_a: Site, edge_b: Site
) -> None:
    def state() -> dict[str, bool]:
        return {cluster.name: cluster.is_connected for cluster in manager.clusters.all()}

    assert state() == {"default": True, "edge-a": True, "edge-b": True}
    edge_b.close()
    manager.clock.ahead_s = NODE_LOST_AFTER_S
    until(lambda: state() == {"default": True, "edge-a": True, "edge-b": False}, "it is noticed")
    manager.restart()
    until(lambda: state() == {"default": True, "edge-a": True, "edge-b": False}, "what was known")
    edge_b.start()
    assert state()["edge-b"]


def test_a_node_says_and_hears_that_the_manager_is_away_and_joins_again(
    manager: SafeCluster, edge_a: Site
) -> None:
    edge_a.join("n1")
    with edge_a.linked("n1") as played:
        played.expect(Welcome)
        manager.close()
        refused(ErrorCode.UNREACHABLE, lambda: [played.link.receive(20) for _ in range(3)])
    with edge_a.linked("n1") as played:
        error = FlopsError.from_dict(played.expect(Refused).error)
        assert error.code is ErrorCode.UNREACHABLE
        assert "does not answer" in error.message
    assert edge_a.get("/api/blobs/" + "0" * 64, "n1").status_code == 503
    manager.start()
    with edge_a.linked("n1") as played:
        played.expect(Welcome)


# Who is refused


def test_tokens_are_for_one_cluster_and_one_kind(manager: SafeCluster, edge_a: Site, edge_b: Site) -> None:
    foreign = edge_b.invite().model_copy(update={"cluster": edge_a.address, "name": "edge-a"})
    error = refused(ErrorCode.JOIN_REFUSED, lambda: edge_a.join("n1", foreign))
    assert "it is for the cluster edge-b, and this is edge-a" in error.message
    own = manager.invite().model_copy(update={"name": "edge-a"})
    assert "cluster default" in refused(ErrorCode.JOIN_REFUSED, lambda: edge_a.join("n1", own)).message
    direct = edge_a.invite().model_copy(update={"name": DEFAULT_CLUSTER})
    assert "edge-a" in refused(ErrorCode.JOIN_REFUSED, lambda: manager.join("n1", direct)).message
    file = edge_a.folder / "other.pem"
    for_nodes = manager.invite()
    join = lambda token, name: lambda: join_manager(file, token, manager.address, name)  # noqa: E731
    assert "this is a cluster" in refused(ErrorCode.JOIN_REFUSED, join(for_nodes, "edge-c")).message
    relays = manager.security.admission.invite_relay(manager.address, "edge-c", for_s=HOUR_S)
    assert "this is edge-d" in refused(ErrorCode.JOIN_REFUSED, join(relays, "edge-d")).message
    assert "this is a node" in refused(ErrorCode.JOIN_REFUSED, lambda: manager.join("n1", relays)).message
    refused(ErrorCode.USAGE, join(relays, DEFAULT_CLUSTER))
    refused(ErrorCode.USAGE, join(relays, "../up"))
    join(relays, "edge-c")()
    assert not manager.file_of("n1").exists()


def test_a_name_is_taken_once(manager: SafeCluster, edge_a: Site) -> None:
    invite = manager.security.admission.invite_relay
    assert (
        "already"
        in refused(ErrorCode.CONFLICT, lambda: invite(manager.address, "edge-a", for_s=HOUR_S)).message
    )
    two = [invite(manager.address, "edge-c", for_s=HOUR_S) for _ in range(2)]
    join_manager(edge_a.folder / "c1.pem", two[0], manager.address, "edge-c")
    error = refused(
        ErrorCode.JOIN_REFUSED,
        lambda: join_manager(edge_a.folder / "c2.pem", two[1], manager.address, "edge-c"),
    )
    assert "with another key" in error.message


def test_a_node_is_served_by_its_own_cluster_only(manager: SafeCluster, edge_a: Site, edge_b: Site) -> None:
    edge_a.join("n1")
    manager.join("n2")
    for node_id, address, name, own in (
        ("n1", manager.address, DEFAULT_CLUSTER, "edge-a"),
        ("n1", edge_b.address, "edge-b", "edge-a"),
        ("n2", edge_a.address, "edge-a", DEFAULT_CLUSTER),
    ):
        with linked(manager, node_id, address, name) as played:
            error = FlopsError.from_dict(played.expect(Refused).error)
        assert error.code is ErrorCode.CERTIFICATE_REFUSED
        assert error.message == f"Node {node_id} has joined the cluster {own}, and this is {name}."
        assert own in error.hint
    assert manager.orchestrator.nodes() == []
    # And no cluster can play another one: the node notices before it says anything.
    for address in (edge_a.address, edge_b.address):
        error = refused(
            ErrorCode.CERTIFICATE_REFUSED, lambda a=address: dial_cluster(a, tls=manager.tls_of("n2"))
        )
        assert "not the cluster that this node has joined" in error.message


def test_what_a_relay_or_a_node_claims_of_others_is_not_believed(
    manager: SafeCluster, edge_a: Site, edge_b: Site
) -> None:
    edge_a.join("n1")
    edge_b.join("n2")
    manager.join("n3")

    def claim(identity: Path, node_id: str) -> FlopsError:
        """What somebody hears who says that node's certificate was shown to it."""
        certificate = manager.security.admission._store.certificates_of(NodeId(node_id))[0]
        shown = node_header(PeerCertificate(serial=certificate.serial, name=node_id))
        tls = cluster_tls(manager.security.admission.authority_pem, identity)

        async def dial() -> str:
            uplink = ManagerUplink(manager.address, tls)
            async with uplink.dial([(b"flops-node", shown.encode())]) as link:
                await link.send(hello(node_id).model_dump_json())
                return await link.receive()

        message = FROM_CLUSTER.validate_json(asyncio.run(dial()))
        assert isinstance(message, Refused), message
        return FlopsError.from_dict(message.error)

    assert "has joined the cluster edge-a, and this is edge-b" in claim(edge_b.identity, "n1").message
    assert "cluster default, and this is edge-b" in claim(edge_b.identity, "n3").message
    assert "not one of node 'n1'" in claim(manager.file_of("n3"), "n1").message
    # What a node says in the headers does not get past the relay.
    (n2,) = manager.security.admission._store.certificates_of(NodeId("n2"))
    path = "/api/blobs/" + "0" * 64
    said = {"flops-node": f"{n2.serial} n2", "flops-cluster": "edge-b"}
    assert edge_b.get(path, "n1", **said).json()["code"] == ErrorCode.CERTIFICATE_REFUSED.value
    assert edge_b.get(path, "n2").json()["code"] == ErrorCode.NOT_FOUND.value
    assert edge_b.get("/api/cluster/presence", "n2").json()["code"] == ErrorCode.NOT_FOUND.value
    assert manager.connected() == set()


def test_a_removed_cluster_is_locked_out_with_its_nodes_at_once(
    manager: SafeCluster, edge_a: Site, edge_b: Site
) -> None:
    edge_a.join("n1")
    edge_a.join("silent")  # has joined, and has never connected
    edge_b.join("n2")
    leftover = edge_a.invite()
    with edge_a.linked("n1") as goes, edge_b.linked("n2") as stays:
        goes.expect(Welcome)
        stays.expect(Welcome)
        manager.orchestrator.start_service(spec("s1", "n1"))
        goes.expect(StartService)
        refused(ErrorCode.CONFLICT, lambda: manager.clusters.remove("edge-a"))
        refused(ErrorCode.CONFLICT, lambda: manager.clusters.remove(DEFAULT_CLUSTER))
        refused(ErrorCode.CLUSTER_NOT_FOUND, lambda: manager.clusters.remove("edge-x"))
        manager.clusters.remove("edge-a", is_forced=True)
        goes.link.receive(20)  # the service is removed
        assert goes.expect(Refused).error["code"] == ErrorCode.CERTIFICATE_REFUSED.value
        manager.orchestrator.start_service(spec("s2", "n2"))
        stays.expect(StartService)
        assert [cluster.name for cluster in manager.clusters.all()] == ["default", "edge-b"]
    for node_id in ("n1", "silent"):
        with edge_a.linked(node_id) as played:
            assert "removed from the cluster" in played.expect(Refused).error["message"]
    assert "removed" in refused(ErrorCode.CERTIFICATE_REFUSED, lambda: edge_a.join("n3", leftover)).message
    error = refused(ErrorCode.CERTIFICATE_REFUSED, lambda: renew_identity(edge_a.identity, manager.address))
    assert "the cluster edge-a was removed" in error.message
    edge_a.close()
    refused(ErrorCode.CERTIFICATE_REFUSED, edge_a.start)
    manager.restart()
    again = manager.security.admission.invite_relay(manager.address, "edge-a", for_s=HOUR_S)
    join_manager(edge_a.identity, again, manager.address, "edge-a")
    edge_a.start()
    with edge_a.linked("silent") as played:  # what the former cluster's nodes had is worth nothing
        assert "removed" in played.expect(Refused).error["message"]
    assert "has not made it" in refused(ErrorCode.JOIN_REFUSED, lambda: edge_a.join("n3", leftover)).message


def test_certificates_are_renewed_by_way_of_the_relay_and_the_relays_own(
    manager: SafeCluster, edge_a: Site
) -> None:
    edge_a.join("n1")
    node, relay = manager.file_of("n1"), edge_a.identity
    for file, where in ((node, edge_a.address), (relay, manager.address)):
        before = file.read_text()
        renewed = renew_identity(file, where)
        assert file.read_text() != before
        assert (renewed.cluster, read_identity(file)) == ("edge-a", renewed)
    clock = MovedClock()
    clock.ahead_s = manager.clock.ahead_s = LIFE_S * 0.7
    identity = RenewedIdentity(relay, manager.address, clock)
    contexts = [cluster_tls(manager.security.admission.authority_pem, relay), server_tls(relay, None)]
    before = relay.read_text()
    assert identity.is_due()
    identity.renew(contexts)
    assert not identity.is_due()
    assert relay.read_text() != before
    clock.ahead_s = manager.clock.ahead_s = LIFE_S * 1.2  # the first has expired
    presence = Presence(
        ManagerUplink(manager.address, contexts[0]),
        lambda: RelayPresence(cluster="edge-a", relay="r", address="h:1"),
        lambda: None,
    )
    asyncio.run(presence.tell())
    assert presence.problem is None, presence.problem


# What comes once


class Counted:
    """Counts what is asked for, before it is answered; a way that is `held` waits until it is let go."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.asked.append((scope["method"], scope["path"]))
        await self.app(scope, receive, send)

    def gets(self) -> int:
        return sum(method == "GET" for method, _ in self.asked)


class PlainSite:
    """A manager's cluster and a relay on loopback, without encryption."""

    def __init__(self, folder: Path) -> None:
        self.blobs = MemoryBlobs()
        self.orchestrator = ClusterOrchestrator(MemoryClusterStore(), SystemClock())
        own = Cluster(name=DEFAULT_CLUSTER, is_connected=True)
        register = _KeptClusters()
        self.clusters = Clusters(register, self.orchestrator, SystemClock(), lambda: own)
        images = FileBlobs(folder / "images")
        registry = build_registry(images, Repositories(folder / "names", images), SystemClock())
        cluster = build_app(self.orchestrator, self.blobs, more=self.clusters.routes())
        self.counted = Counted(with_registry(cluster, registry))
        self.server = HttpServer(self.counted, "127.0.0.1", 0)
        self.server.start()
        self.manager = f"127.0.0.1:{self.server.port}"
        self.folder = folder
        self.parts = ExitStack()
        self.address = self.start_relay("edge-a", folder / "a")

    def start_relay(self, name: str, home: Path) -> str:
        settings = RelaySettings(home=home, cluster_port=0)
        RelayConfiguration(cluster=name, manager=self.manager).save(settings.relay_dir)
        return str(start_relay(settings, self.parts)["cluster_address"])

    def close(self) -> None:
        self.parts.close()
        self.server.close()


class _KeptClusters:
    def __init__(self) -> None:
        self.saved: list[Cluster] = []

    def load(self) -> list[Cluster]:
        return self.saved

    def save(self, clusters: list[Cluster]) -> None:
        self.saved = clusters


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[PlainSite]:
    site = PlainSite(tmp_path)
    yield site
    site.close()


def test_without_encryption_a_relay_says_which_cluster_it_is(plain: PlainSite) -> None:
    link = dial_cluster(plain.address)
    try:
        link.send(hello("n1"))
        assert Played(link).expect(Welcome).cluster == "edge-a"
    finally:
        link.close()
    assert [node.cluster for node in plain.orchestrator.nodes()] == ["edge-a"]
    error = refused(ErrorCode.CONFLICT, lambda: plain.start_relay("edge-a", plain.folder / "again"))
    assert "runs the cluster edge-a already" in error.message
    refused(ErrorCode.CONFLICT, lambda: plain.clusters.remove("edge-a"))
    with httpx.Client(trust_env=False) as client:
        said = client.post(
            f"http://{plain.manager}/api/cluster/presence",
            json={"cluster": "edge-b", "relay": "r", "address": "h:1"},
            headers={"flops-cluster": "Edge B"},
        )
    assert said.json()["code"] == ErrorCode.USAGE.value
    presence = RelayPresence(cluster="Edge A", relay="r", address="h:1")
    refused(ErrorCode.USAGE, lambda: plain.clusters.heard(presence))


def test_a_blob_comes_over_the_uplink_once_for_all_nodes_of_a_site(plain: PlainSite) -> None:
    data = b"x" * 3_000_000
    digest = plain.blobs.put(data)
    url = f"http://{plain.address}/api/blobs/{digest}"
    got: list[bytes] = []
    asking = [threading.Thread(target=lambda: got.append(httpx.get(url).content)) for _ in range(6)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(30)
    assert [len(content) for content in got] == [len(data)] * 6
    assert set(got) == {data}
    assert plain.counted.gets() == 1
    part = httpx.get(url, headers={"range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, b"xxxxx")
    assert part.headers["content-range"] == f"bytes 5-9/{len(data)}"
    assert httpx.get(url, headers={"range": "bytes=9000000-"}).status_code == 416
    assert httpx.head(url).headers["content-length"] == str(len(data))
    assert plain.counted.gets() == 1
    plain.blobs.remove(digest)
    assert httpx.get(url).status_code == 404  # the manager is asked each time whether it may be had


def test_images_are_pushed_and_pulled_by_way_of_a_relay_and_each_layer_comes_once(plain: PlainSite) -> None:
    layer = b"a layer" * 100_000
    digest = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    with httpx.Client(base_url=f"http://{plain.address}", trust_env=False, timeout=30) as client:
        begun = client.post("/v2/flops/learner/blobs/uploads/")
        assert begun.status_code == 202
        pieces = (layer[at : at + 65_536] for at in range(0, len(layer), 65_536))  # without its length
        assert client.patch(begun.headers["location"], content=pieces).status_code == 202
        put = client.put(begun.headers["location"], params={"digest": digest})
        assert put.status_code == 201, put.text
        before = plain.counted.gets()
        for _ in range(2):
            got = client.get(f"/v2/flops/learner/blobs/{digest}")
            assert (got.content, got.headers["docker-content-digest"]) == (layer, digest)
        assert plain.counted.gets() == before + 1
        unknown = client.get(f"/v2/flops/learner/blobs/sha256:{'0' * 64}")
        assert unknown.status_code == 404
        assert unknown.json()["errors"]  # as the registry says it
