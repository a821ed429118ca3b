"""The certificate that a server of the control plane shows: made by the cluster's authority, or given."""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from flops.adapters.certificates import FileAuthority
from flops.adapters.http_server import server_tls
from flops.errors import ErrorCode, FlopsError
from flops.ports import Clock

_RETRY_S = 60.0
_LOOK_S = 60.0  # whether a given certificate has been replaced

_log = logging.getLogger(__name__)


class ServerCertificate:
    """How a server encrypts: `tls` shows what was loaded last; it is loaded anew from `start` to `close`.

    Args:
        tls: shows it.
        renew: brings the new one into `tls`.
        every_s: how often.
    """

    def __init__(self, tls: ssl.SSLContext, renew: Callable[[], None], every_s: float) -> None:
        self.tls = tls
        self._renew = renew
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server-certificate", daemon=True)

    def start(self) -> None:
        """Renew it from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop renewing."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        pause_s = self._every_s
        while not self._ended.wait(pause_s):
            try:
                self._renew()
                pause_s = self._every_s
            except FlopsError as error:
                _log.error("the server's certificate is not renewed: %s", error)
                pause_s = min(_RETRY_S, self._every_s / 10)


def signed_certificate(
    authority: FileAuthority,
    path: Path,
    name: str,
    clock: Clock,
    life_s: float,
    *,
    hosts: tuple[str, ...] = (),
    takes_clients: bool = False,
) -> ServerCertificate:
    """One that the cluster's authority signs, anew at every start and at two thirds of its life.

    Args:
        authority: signs.
        path: where key and certificate are kept.
        name: what those who dial expect.
        clock: the time.
        life_s: how long it is good.
        hosts: names and addresses at which it is good as well.
        takes_clients: whether clients may show a certificate of the authority.

    Raises:
        FlopsError: ``disk_full``, ``file_unreadable``.
    """

    def make() -> None:
        authority.keep_server_identity(path, name, clock.now_s(), life_s, hosts=hosts)

    def renew() -> None:
        make()
        tls.load_cert_chain(path)

    make()
    tls = server_tls(path, authority.pem if takes_clients else None)
    return ServerCertificate(tls, renew, life_s * 2 / 3)


def given_certificate(certificate: Path, key: Path | None, *, look_s: float = _LOOK_S) -> ServerCertificate:
    """The operator's own; when the files are replaced, the new one is shown soon.

    Args:
        certificate: file with the certificate, and those that lead to an authority.
        key: file with its key; in `certificate` if not given.
        look_s: how often is looked for a new one.

    Raises:
        FlopsError: ``config_invalid`` for files that cannot be used.
    """

    with _named(certificate, key), _whole(certificate, key) as path:
        tls = server_tls(path, None)
        loaded = path.read_bytes()

    def renew() -> None:
        nonlocal loaded
        with _named(certificate, key), _whole(certificate, key) as path:
            found = path.read_bytes()
            if found != loaded:
                server_tls(path, None)  # what does not fit together must not get into the context in use
                tls.load_cert_chain(path, password="")
                loaded = found

    return ServerCertificate(tls, renew, look_s)


@contextlib.contextmanager
def _named(certificate: Path, key: Path | None) -> Iterator[None]:
    """Name the operator's files in what goes wrong with them."""
    try:
        yield
    except OSError as exc:
        files = f"{certificate}" if key is None else f"{certificate} with the key {key}"
        reason = exc.reason if isinstance(exc, ssl.SSLError) and exc.reason else exc.strerror or exc
        raise FlopsError(
            ErrorCode.CONFIG_INVALID,
            f"The manager's certificate {files} cannot be used: {reason}.",
            hint="FLOPS_TLS_CERTIFICATE and FLOPS_TLS_KEY name PEM files that belong together; the "
            "key has no password.",
        ) from exc


@contextlib.contextmanager
def _whole(certificate: Path, key: Path | None) -> Iterator[Path]:
    """What both hold, read once, as a file that is on no disk: while they are replaced, none gets in half."""
    pem = b"\n".join(file.read_bytes() for file in (certificate, key) if file is not None)
    descriptor = os.memfd_create("certificate")
    try:
        os.write(descriptor, pem)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
