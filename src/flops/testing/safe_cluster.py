"""A cluster that encrypts, with nodes that tests play: real sockets and real certificates."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
from starlette.routing import BaseRoute

from flops.adapters.cluster_register import FileClusterRegister
from flops.adapters.file_blobs import FileBlobs
from flops.adapters.http_server import HttpServer
from flops.adapters.node_identity import Identity, join_cluster, read_identity
from flops.adapters.node_link import WebSocketLink, dial_cluster
from flops.adapters.sql_cluster_store import SqlClusterStore
from flops.adapters.system_clock import SystemClock
from flops.core.cluster import IMAGE_BUILDER_ADDON, LEARNER_ADDON, Addon, AddonState, NodeFacts
from flops.core.clusters import DEFAULT_CLUSTER, Cluster
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.app import build_app
from flops.orchestrator.cluster import ClusterOrchestrator
from flops.orchestrator.clusters import Clusters
from flops.wire.cluster_tls import cluster_tls
from flops.wire.join import JoinToken
from flops.wire.node import Hello, Refused
from flops.wiring.cluster_port import guarded
from flops.wiring.cluster_security import ClusterSecurity

T = TypeVar("T")
ADDONS = (LEARNER_ADDON, IMAGE_BUILDER_ADDON)
HOUR_S = 3_600.0
LIFE_S = 7 * 24 * HOUR_S


class MovedClock:
    """The system's clock, put forward by `ahead_s`."""

    ahead_s = 0.0

    def now_s(self) -> float:
        """Seconds since the epoch."""
        return SystemClock().now_s() + self.ahead_s


class SafeCluster:
    """A cluster that encrypts; `restart` starts it anew on the same files and port.

    Args:
        folder: of its files.
        port: that it listens on; 0 for a free one.
        more: what it serves beside what every cluster serves.
    """

    def __init__(self, folder: Path, port: int = 0, more: Sequence[BaseRoute] = ()) -> None:
        self.folder = folder
        self._more = more
        self.clock = MovedClock()
        self.port = port
        self.start()

    def start(self) -> None:
        """Start it on its files and port."""
        self.security = ClusterSecurity(self.folder, self.clock, secret=b"s", life_s=LIFE_S)
        self.security.start()
        self.store = SqlClusterStore(self.folder / "cluster.sqlite")
        self.orchestrator = ClusterOrchestrator(self.store, self.clock, admission=self.security.admission)
        register = FileClusterRegister(self.folder / "clusters.json")
        own = Cluster(name=DEFAULT_CLUSTER, is_connected=True)
        self.clusters = Clusters(register, self.orchestrator, self.clock, lambda: own)
        self.blobs = FileBlobs(self.folder / "blobs")
        app = build_app(self.orchestrator, self.blobs, more=(*self.clusters.routes(), *self._more))
        app = guarded(app, self.security.admission, self.orchestrator)
        self.server = HttpServer(app, "127.0.0.1", self.port, tls=self.security.tls)
        self.server.start()
        self.port = self.server.port
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"https://{self.address}"

    def close(self) -> None:
        """End it."""
        self.server.close()
        self.security.close()
        self.store.close()

    def restart(self) -> None:
        """End it, and start it anew."""
        self.close()
        self.start()

    def invite(self, *, nodes: int = 1, addons: tuple[str, ...] = ADDONS) -> JoinToken:
        """A token for nodes."""
        return self.security.admission.invite(self.address, nodes=nodes, for_s=HOUR_S, addons=addons)

    def join(self, node_id: str, token: JoinToken | None = None, *, addons: tuple[str, ...] = ()) -> Identity:
        token = token or self.invite()
        return join_cluster(self.file_of(node_id), token, self.address, node_id, addons)

    def file_of(self, node_id: str) -> Path:
        """Where a node keeps its identity."""
        return self.folder / "nodes" / node_id / "identity.pem"

    def tls_of(self, node_id: str) -> ssl.SSLContext:
        """How a node dials."""
        identity = read_identity(self.file_of(node_id))
        assert identity is not None
        return cluster_tls(identity.authority, self.file_of(node_id))

    @contextlib.contextmanager
    def linked(self, node_id: str, *, says_it_is: str = "", addons: tuple[str, ...] = ()) -> Iterator[Played]:
        link = dial_cluster(self.address, tls=self.tls_of(node_id))
        try:
            link.send(hello(says_it_is or node_id, addons))
            yield Played(link)
        finally:
            link.close()

    def refusal_of(self, node_id: str, *, says_it_is: str = "", addons: tuple[str, ...] = ()) -> FlopsError:
        with self.linked(node_id, says_it_is=says_it_is, addons=addons) as played:
            return FlopsError.from_dict(played.expect(Refused).error)

    def connected(self) -> set[str]:
        """Ids of the nodes that are connected."""
        return {node.id for node in self.orchestrator.nodes() if node.is_connected}

    def get(
        self, path: str, tls: ssl.SSLContext | None = None, auth: tuple[str, str] | None = None
    ) -> tuple[int, str]:
        """Ask for a path: the status, and the error's code."""
        tls = tls or cluster_tls(self.security.admission.authority_pem)
        with httpx.Client(verify=tls, trust_env=False) as client:
            answer = client.get(self.url + path, auth=auth)
        return answer.status_code, "" if answer.is_success else answer.json().get("code", "")


class Played:
    """A node's end of a connection."""

    def __init__(self, link: WebSocketLink) -> None:
        self.link = link

    def expect(self, kind: type[T]) -> T:
        """The next message, which has to be of this kind."""
        message = self.link.receive(20)
        assert isinstance(message, kind), message
        return message


def hello(node_id: str, addons: tuple[str, ...] = ()) -> Hello:
    """What a node says first."""
    on = tuple(Addon(name=name, state=AddonState.HEALTHY) for name in addons)
    return Hello(node_id=node_id, name=f"name of {node_id}", facts=NodeFacts(), addons=on)


def refused(code: ErrorCode, action: Callable[[], object]) -> FlopsError:
    """Have something refused with this code; the error."""
    with pytest.raises(FlopsError) as caught:
        action()
    assert caught.value.code is code, caught.value
    assert caught.value.hint
    return caught.value
