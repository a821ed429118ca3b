"""The certificate that the manager shows to users: the operator's own, or one of the cluster's authority."""

from __future__ import annotations

import logging
import ssl
from contextlib import ExitStack
from typing import NamedTuple

from flops.adapters.system_clock import SystemClock
from flops.control.lifetime import AUTHORITY_CERTIFICATE_FILE, AUTHORITY_FILE
from flops.core.health import is_loopback
from flops.durable_file import write_durably
from flops.errors import ErrorCode, FlopsError
from flops.settings import ControlSettings

_IDENTITY_FILE = "manager.pem"

_log = logging.getLogger(__name__)


class ManagerTls(NamedTuple):
    """How the manager encrypts."""

    context: ssl.SSLContext | None = None  # None: it does not
    authority: str = ""  # certificate of the cluster's authority, PEM; "" unless the manager is known by it
    authority_file: str = ""  # where that is, for users of this machine


def open_manager_tls(settings: ControlSettings, clock: SystemClock, parts: ExitStack) -> ManagerTls:
    """How the manager encrypts, by the settings; certificates renew themselves until `parts` ends.

    Raises:
        FlopsError: ``config_invalid`` for a certificate of the operator's that cannot be used;
            ``config_corrupt``, ``disk_full``, ``file_unreadable``.
    """
    given = settings.tls_certificate
    if given is not None and settings.encryption == "off":
        raise FlopsError(
            ErrorCode.CONFIG_INVALID,
            f"FLOPS_TLS_CERTIFICATE names {given}, and FLOPS_ENCRYPTION=off has nothing encrypted.",
            hint="Set one of them.",
        )
    if given is None and not settings.encrypts(settings.host):
        if not is_loopback(settings.host):
            _log.warning(
                "The REST API and MLflow are open to other machines at %s, without encryption: whoever is "
                "between can read the token.", settings.host,
            )  # fmt: skip
        return ManagerTls()
    from flops.adapters.certificates import FileAuthority
    from flops.adapters.host_facts import names_of
    from flops.wire.cluster_tls import MANAGER_NAME
    from flops.wiring.server_certificate import given_certificate, signed_certificate

    folder = settings.control_dir
    if given is not None:
        certificate, shown, file = given_certificate(given, settings.tls_key), "", ""
    else:
        authority = FileAuthority(folder / AUTHORITY_FILE, clock.now_s())
        life_s = settings.certificate_hours * 3600
        path, hosts = folder / _IDENTITY_FILE, names_of(settings.host)
        certificate = signed_certificate(authority, path, MANAGER_NAME, clock, life_s, hosts=hosts)
        shown, file = authority.pem, str(folder / AUTHORITY_CERTIFICATE_FILE)
        write_durably(folder / AUTHORITY_CERTIFICATE_FILE, shown, mode=0o644)
    parts.callback(certificate.close)
    certificate.start()
    return ManagerTls(certificate.tls, shown, file)
