"""Joins what makes a cluster's port safe: its authority, the admission of nodes, its own certificate."""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path

from flops.adapters.certificates import FileAuthority
from flops.adapters.http_server import server_tls
from flops.adapters.sql_admission import SqlAdmissionStore
from flops.errors import FlopsError
from flops.orchestrator.admission import Admission
from flops.ports import Clock
from flops.wire.cluster_tls import CLUSTER_NAME

AUTHORITY_FILE = "authority.pem"
IDENTITY_FILE = "identity.pem"
_STORE_FILE = "admission.sqlite"
_RETRY_S = 60.0

_log = logging.getLogger(__name__)


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
        self._clock = clock
        self._life_s = life_s
        self._identity = folder / IDENTITY_FILE
        self._authority = FileAuthority(folder / AUTHORITY_FILE, clock.now_s())
        self._store = SqlAdmissionStore(folder / _STORE_FILE)
        self.admission = Admission(self._store, self._authority, clock, secret=secret, life_s=life_s)
        self._make_identity()
        self.tls: ssl.SSLContext = server_tls(self._identity, self._authority.pem)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="server-certificate", daemon=True)

    def start(self) -> None:
        """Renew the server's certificate from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop renewing, and close the store."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._store.close()

    def _make_identity(self) -> None:
        self._authority.keep_server_identity(self._identity, CLUSTER_NAME, self._clock.now_s(), self._life_s)

    def _renew(self) -> None:
        pause_s = self._life_s * 2 / 3
        while not self._ended.wait(pause_s):
            try:
                self._make_identity()
                self.tls.load_cert_chain(self._identity)
                pause_s = self._life_s * 2 / 3
            except FlopsError as error:
                _log.error("the server's certificate is not renewed: %s", error)
                pause_s = min(_RETRY_S, self._life_s / 10)
