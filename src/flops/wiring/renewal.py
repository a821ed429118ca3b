"""How nodes and relays keep their certificates good."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Sequence
from pathlib import Path

from flops.adapters.node_identity import Identity, read_identity, renew_identity
from flops.errors import FlopsError
from flops.ports import Clock

_RETRY_S = 60.0  # after a renewal that failed

_log = logging.getLogger(__name__)


class RenewedIdentity:
    """An identity that renews itself when it is asked to, and it is time.

    Args:
        path: its file.
        where: ``host:port`` of the cluster that signed it.
        clock: tells when it is time.

    Raises:
        FlopsError: ``config_corrupt``, ``file_unreadable``.
    """

    def __init__(self, path: Path, where: str, clock: Clock) -> None:
        self._path = path
        self._where = where
        self._clock = clock
        self._next_try_s = 0.0
        self.present: Identity | None = read_identity(path)

    def is_due(self) -> bool:
        """Whether it is time, and not too early after a renewal that failed."""
        now_s = self._clock.now_s()
        return self.present is not None and self.present.is_due(now_s) and now_s >= self._next_try_s

    def renew(self, contexts: Sequence[ssl.SSLContext]) -> None:
        """Renew it if it is time, and have others shown the new certificate; what fails is tried again later.

        Args:
            contexts: what shows it.
        """
        if self.present is None or not self.is_due():
            return
        life_s = self.present.not_after_s - self.present.not_before_s
        self._next_try_s = self._clock.now_s() + min(_RETRY_S, life_s / 10)
        try:
            self.present = renew_identity(self._path, self._where)
            for context in contexts:
                context.load_cert_chain(self._path)
        except FlopsError as error:
            _log.warning("the certificate is not renewed: %s", error)
        else:
            _log.info("the certificate is renewed")
