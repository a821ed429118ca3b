"""Joins what makes a node a member of its cluster: its identity, how it dials, how it is renewed."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from flops.adapters.node_link import WebSocketLink, client_tls, dial_cluster
from flops.core.health import is_loopback
from flops.core.ids import ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.node.configuration import NodeConfiguration
from flops.node.home import keep_node_id
from flops.node.paths import NodePaths
from flops.ports import Clock
from flops.wire.cluster_tls import cluster_tls

_RETRY_S = 60.0  # after a renewal that failed

_log = logging.getLogger(__name__)


class Membership:
    """A node's way to its cluster: by its certificate, or in the clear where that is allowed.

    Args:
        paths: where the identity is kept.
        conf: which cluster it is.
        clock: tells when the certificate is to be renewed.

    Raises:
        FlopsError: ``encryption_mismatch`` for a cluster on another machine without a certificate of it;
            ``config_corrupt``, ``file_unreadable``.
    """

    def __init__(self, paths: NodePaths, conf: NodeConfiguration, clock: Clock) -> None:
        self._paths = paths
        self._clock = clock
        self.cluster = conf.cluster
        self.tls: ssl.SSLContext | None = None
        self.authority = ""
        self._next_try_s = 0.0
        self._identity = None
        if paths.identity.exists():
            from flops.adapters.node_identity import read_identity

            self._identity = read_identity(paths.identity)
        if self._identity is not None:
            self.authority = self._identity.authority
            self.tls = cluster_tls(self.authority, paths.identity)
            self.node_id = self._identity.node_id
            return
        self.node_id = keep_node_id(paths.node_id)
        if conf.is_cluster_tls:
            self.tls = client_tls(*conf.client_certificate)
        elif not is_loopback(conf.cluster_address):
            _allow_plain(conf)

    def dial(self) -> WebSocketLink:
        """Open a connection, with a renewed certificate when it is time.

        Raises:
            FlopsError: see `dial_cluster`.
        """
        if self.must_redial():
            self._renew()
        return dial_cluster(self.cluster, tls=self.tls)

    def certify(self, service_id: ServiceId, path: Path) -> bool:
        """Write key and certificate of a service that others dial, unless good ones are there.

        Raises:
            FlopsError: see `certify_service`.
        """
        from flops.adapters.node_identity import certify_service

        return certify_service(self._paths.identity, self.cluster, service_id, path, self._clock.now_s())

    def must_redial(self) -> bool:
        """Whether it is time to renew the certificate."""
        if self._identity is None:
            return False
        now_s = self._clock.now_s()
        return self._identity.is_due(now_s) and now_s >= self._next_try_s

    def _renew(self) -> None:
        from flops.adapters.node_identity import renew_identity

        if self._identity is None or self.tls is None:
            return
        life_s = self._identity.not_after_s - self._identity.not_before_s
        self._next_try_s = self._clock.now_s() + min(_RETRY_S, life_s / 10)
        try:
            self._identity = renew_identity(self._paths.identity, self.cluster)
            self.tls.load_cert_chain(self._paths.identity)
        except FlopsError as error:
            _log.warning("the node's certificate is not renewed: %s", error)
        else:
            _log.info("the node's certificate is renewed")


def _allow_plain(conf: NodeConfiguration) -> None:
    if not conf.is_insecure:
        raise FlopsError(
            ErrorCode.ENCRYPTION_MISMATCH,
            f"The cluster at {conf.cluster} is on another machine, and this node has no certificate of it.",
            hint="Join with a token: `flops node invite` there, then `NodeEngine --token TOKEN -d` here. "
            "Only in a network that you trust, --insecure does without encryption.",
        )
    _log.warning("The connection to %s is not encrypted.", conf.cluster)
