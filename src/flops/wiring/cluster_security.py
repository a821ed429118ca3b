"""Joins what makes a cluster's port safe: its authority, the admission of nodes, its own certificate."""

from __future__ import annotations

import ssl
from pathlib import Path

from flops.adapters.certificates import FileAuthority
from flops.adapters.sql_admission import SqlAdmissionStore
from flops.control.lifetime import AUTHORITY_FILE
from flops.core.clusters import DEFAULT_CLUSTER
from flops.orchestrator.admission import Admission
from flops.ports import Clock
from flops.wire.cluster_tls import server_name
from flops.wiring.server_certificate import signed_certificate

IDENTITY_FILE = "identity.pem"
_STORE_FILE = "admission.sqlite"


class ClusterSecurity:
    """Authority, admission, and the server's certificate, which renews itself from `start` to `close`.

    Args:
        folder: of the control plane.
        clock: of it.
        secret: what services' keys are made from.
        life_s: how long certificates are good.

    Raises:
        FlopsError: ``config_corrupt``, ``disk_full``, ``file_unreadable``.
    """

    def __init__(self, folder: Path, clock: Clock, *, secret: bytes, life_s: float) -> None:
        authority = FileAuthority(folder / AUTHORITY_FILE, clock.now_s())
        self._store = SqlAdmissionStore(folder / _STORE_FILE)
        self.admission = Admission(self._store, authority, clock, secret=secret, life_s=life_s)
        self._certificate = signed_certificate(
            authority, folder / IDENTITY_FILE, server_name(DEFAULT_CLUSTER), clock, life_s, takes_clients=True
        )
        self.tls: ssl.SSLContext = self._certificate.tls

    def start(self) -> None:
        """Renew the server's certificate from now on."""
        self._certificate.start()

    def close(self) -> None:
        """Stop renewing, and close the store."""
        self._certificate.close()
        self._store.close()
