"""The further clusters of a federation: which there are, whether they are there, and how one goes.

Each is run by a relay, which says every few seconds that it is there (`flops.wire.join.RelayPresence`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from flops.admission_ports import ClusterRegister
from flops.core.admission import relay_id
from flops.core.cluster import NODE_LOST_AFTER_S, Node
from flops.core.clusters import DEFAULT_CLUSTER, Cluster, check_cluster_name, find_cluster
from flops.core.ids import NodeId
from flops.core.node_removal import check_removal
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.cluster import ClusterOrchestrator
from flops.orchestrator.port_guard import caller_of, read_body
from flops.ports import Clock
from flops.wire.join import PRESENCE_PATH, RelayPresence
from flops.wire.rest import Message

_log = logging.getLogger(__name__)


class Clusters:
    """Thread-safe.

    Args:
        register: what survives a restart.
        orchestrator: has the nodes of all clusters.
        clock: tells when a relay was heard last.
        own: the manager's own cluster, as it is now.
    """

    def __init__(
        self,
        register: ClusterRegister,
        orchestrator: ClusterOrchestrator,
        clock: Clock,
        own: Callable[[], Cluster],
    ) -> None:
        self._register = register
        self._orchestrator = orchestrator
        self._clock = clock
        self._own = own
        self._admission = orchestrator.admission
        self._lock = threading.Lock()
        self._clusters = {cluster.name: cluster for cluster in register.load()}

    def routes(self) -> list[BaseRoute]:
        """What relays ask for, beside what they pass on."""
        return [Route(PRESENCE_PATH, self._take_presence, methods=["POST"])]

    async def _take_presence(self, request: Request) -> Response:
        presence = await read_body(RelayPresence, request.scope, request.receive)
        caller = caller_of(request.scope)
        if self._admission is not None:  # its certificate says which cluster it is
            name = await run_in_threadpool(self._admission.cluster_of, caller)
            presence = presence.model_copy(update={"cluster": name})
        await run_in_threadpool(self.heard, presence)
        return JSONResponse(Message(message="ok").model_dump())

    def heard(self, presence: RelayPresence) -> None:
        """A relay says that it is there.

        Raises:
            FlopsError: ``conflict`` while another relay of the same name is there, ``usage`` for a name that
                is none, ``disk_full``.
        """
        name, now_s = check_cluster_name(presence.cluster), self._clock.now_s()
        with self._lock:
            known = self._clusters.get(name)
            if known is not None and known.relay != presence.relay and self._is_there(known, now_s):
                raise FlopsError(
                    ErrorCode.CONFLICT,
                    f"Another relay runs the cluster {name} already, at {known.address}.",
                    hint="Give this one another --name, or end the other one (`flops cluster down`).",
                )
            cluster = Cluster(
                name=name,
                relay=presence.relay,
                address=presence.address,
                version=presence.version,
                joined_at_s=known.joined_at_s if known is not None else now_s,
            )
            if known is None or known.model_copy(update={"last_seen_s": 0.0}) != cluster:
                self._register.save([*(c for c in self._kept() if c.name != name), cluster])
                _log.info("the cluster %s is there, at %s", name, presence.address)
            self._clusters[name] = cluster.model_copy(update={"last_seen_s": now_s})

    def all(self) -> list[Cluster]:
        """All clusters, the manager's own first."""
        now_s = self._clock.now_s()
        with self._lock:
            found = sorted(self._clusters.values(), key=lambda cluster: cluster.name)
        return [
            self._own(),
            *(c.model_copy(update={"is_connected": self._is_there(c, now_s)}) for c in found),
        ]

    def remove(self, name: str, *, is_forced: bool = False) -> Cluster:
        """Lock a cluster out at once, with its nodes, and forget it; what was known of it.

        Args:
            name: of the cluster.
            is_forced: also when its nodes have services, which have failed then.

        Raises:
            FlopsError: ``cluster_not_found``; ``conflict`` for the manager's own cluster, one whose nodes
                have services, or, where nothing is encrypted, one that is there; ``disk_full``.
        """
        cluster = find_cluster(self.all(), name)
        if name == DEFAULT_CLUSTER:
            raise FlopsError(
                ErrorCode.CONFLICT,
                f"The cluster {name} is the manager's own.",
                hint="`flops node remove` removes its nodes, `flops down` ends it.",
            )
        nodes = [node for node in self._orchestrator.nodes() if node.cluster == name]
        self._check_removal(cluster, nodes, is_forced=is_forced)
        if self._admission is not None:
            self._admission.expel(relay_id(name))  # first, so that none of its nodes comes back
        for node in nodes:
            self._orchestrator.remove_node(node.id, is_forced=True)
        if self._admission is not None:
            self._admission.expel_cluster(name)
        with self._lock:
            self._register.save([c for c in self._kept() if c.name != name])
            self._clusters.pop(name, None)
        _log.warning("the cluster %s was removed, with %d nodes", name, len(nodes))
        return cluster

    def _check_removal(self, cluster: Cluster, nodes: Sequence[Node], *, is_forced: bool) -> None:
        if self._admission is None and cluster.is_connected:
            raise FlopsError(
                ErrorCode.CONFLICT,
                f"The cluster {cluster.name} is connected, and would come back: nothing is encrypted.",
                hint="Run `flops cluster down` on its machine first.",
            )
        services = [s for s in self._orchestrator.services() if not s.status.state.is_final]
        for node in nodes:
            own = [s for s in services if s.spec.node_id == node.id]
            check_removal(node, own, is_forced=is_forced, is_locked_out=self._is_member(node.id))

    def _is_member(self, node_id: NodeId) -> bool:
        return self._admission is not None and self._admission.is_member(node_id)

    def _kept(self) -> list[Cluster]:
        return [cluster.model_copy(update={"last_seen_s": 0.0}) for cluster in self._clusters.values()]

    @staticmethod
    def _is_there(cluster: Cluster, now_s: float) -> bool:
        return now_s - cluster.last_seen_s < NODE_LOST_AFTER_S
