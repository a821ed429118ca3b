"""Joins a relay: the cluster orchestrator of a further cluster."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import flops
from flops.adapters.file_blobs import FileBlobs
from flops.adapters.host_facts import address_towards
from flops.adapters.http_server import HttpServer, server_tls
from flops.adapters.manager_uplink import ManagerUplink
from flops.adapters.system_clock import SystemClock
from flops.control.kept_ports import KeptPorts
from flops.control.lifetime import run_until_told
from flops.core.address import is_any, split_port, with_port
from flops.core.health import is_loopback
from flops.errors import ErrorCode, FlopsError
from flops.log import configure_logging
from flops.relay.app import build_relay
from flops.relay.configuration import IDENTITY_FILE, WHAT, RelayConfiguration
from flops.relay.presence import Presence
from flops.relay.site_cache import SiteCache
from flops.settings import RelaySettings
from flops.wire.cluster_tls import cluster_tls
from flops.wire.join import RelayPresence
from flops.wiring.renewal import RenewedIdentity

_log = logging.getLogger(__name__)


def run_relay(arguments: list[str]) -> int:
    """Run a relay until it is told to stop; returns its exit code."""
    settings = RelaySettings.from_arguments(arguments)
    configure_logging(settings.log_level)
    return run_until_told(settings.relay_dir, lambda parts: start_relay(settings, parts), WHAT)


def start_relay(settings: RelaySettings, parts: ExitStack) -> Mapping[str, Any]:
    """Start a relay; what it tells its clients.

    Args:
        settings: of it.
        parts: end it.

    Raises:
        FlopsError: ``usage``, ``encryption_mismatch``, ``port_occupied``; what the manager refuses it with.
    """
    folder, clock = settings.relay_dir, SystemClock()
    conf = RelayConfiguration.load(folder)
    if conf is None:
        raise FlopsError(ErrorCode.USAGE, f"Nothing in {folder} says which cluster this is.")
    identity = RenewedIdentity(folder / IDENTITY_FILE, conf.manager, clock)
    uplink_tls, port_tls = _encryption(settings, conf, identity)
    uplink = ManagerUplink(conf.manager, uplink_tls)
    cache = SiteCache(FileBlobs(folder / "blobs"), clock, settings.site_cache_mb * 1024**2)

    def told() -> RelayPresence:
        address = with_port(_reached_at(settings, conf), server.port)
        return RelayPresence(
            cluster=conf.cluster, relay=conf.relay, address=address, version=flops.__version__
        )

    def renew() -> None:
        identity.renew([tls for tls in (uplink_tls, port_tls) if tls is not None])

    presence = Presence(uplink, told, renew)
    app = build_relay(conf.cluster, uplink, cache, presence.keep)
    ports = KeptPorts(folder)
    wanted = ports.wanted("cluster", settings.cluster_port)
    server = HttpServer(app, settings.cluster_host, wanted, tls=port_tls)
    server.start()
    parts.callback(server.close)
    ports.keep({"cluster": server.port})
    first = Presence(uplink, told, renew)
    asyncio.run(first.tell())
    if first.problem is not None and first.is_refused:
        raise first.problem
    problem = first.problem.message if first.problem is not None else ""
    return {"cluster": conf.cluster, "cluster_address": told().address, "manager": conf.manager,
            "is_encrypted": port_tls is not None, "problem": problem}  # fmt: skip


def _encryption(
    settings: RelaySettings, conf: RelayConfiguration, identity: RenewedIdentity
) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """How the way to the manager is encrypted, and the port of the cluster: both, or none."""
    path = settings.relay_dir / IDENTITY_FILE
    if (present := identity.present) is not None:
        tls = cluster_tls(present.authority, path, present.dials)
        return tls, server_tls(path, present.authority)
    for host, what in ((conf.manager.rpartition(":")[0], "The manager"), (settings.cluster_host, "A node")):
        if is_loopback(host):
            continue
        if not conf.is_insecure:
            raise FlopsError(
                ErrorCode.ENCRYPTION_MISMATCH,
                f"{what} may be on another machine ({host}), and this relay has no certificate.",
                hint="Join with a token: `flops cluster invite NAME` there, `flops cluster up --token TOKEN` "
                "here. Only in a network that you trust, --insecure does without encryption.",
            )
        _log.warning("What is sent by way of %s is not encrypted.", host)
    return None, None


def _reached_at(settings: RelaySettings, conf: RelayConfiguration) -> str:
    host = settings.cluster_host
    return address_towards(split_port(conf.manager)[0]) if is_any(host) else host
