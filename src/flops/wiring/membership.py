"""Joins what makes a node a member of its cluster: its identity, how it dials, how it is renewed."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from flops.adapters.node_link import WebSocketLink, client_tls, dial_cluster
from flops.core.clusters import DEFAULT_CLUSTER
from flops.core.health import is_loopback
from flops.core.ids import ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.node.configuration import NodeConfiguration
from flops.node.home import keep_node_id
from flops.node.paths import NodePaths
from flops.ports import Clock
from flops.wire.cluster_tls import cluster_tls

if TYPE_CHECKING:
    from flops.wiring.renewal import RenewedIdentity

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
        self.cluster_name = DEFAULT_CLUSTER
        self._identity: RenewedIdentity | None = None
        if paths.identity.exists():
            from flops.wiring.renewal import RenewedIdentity

            self._identity = RenewedIdentity(paths.identity, conf.cluster, clock)
        if self._identity is not None and (present := self._identity.present) is not None:
            self.authority = present.authority
            self.cluster_name = present.cluster
            self.tls = cluster_tls(self.authority, paths.identity, present.dials)
            self.node_id = present.node_id
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
        if self._identity is not None and self.tls is not None:
            self._identity.renew([self.tls])
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
        return self._identity is not None and self._identity.is_due()


def _allow_plain(conf: NodeConfiguration) -> None:
    if not conf.is_insecure:
        raise FlopsError(
            ErrorCode.ENCRYPTION_MISMATCH,
            f"The cluster at {conf.cluster} is on another machine, and this node has no certificate of it.",
            hint="Join with a token: `flops node invite` there, then `NodeEngine --token TOKEN -d` here. "
            "Only in a network that you trust, --insecure does without encryption.",
        )
    _log.warning("The connection to %s is not encrypted.", conf.cluster)
