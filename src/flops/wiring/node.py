"""Joins the parts of a node's daemon."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import platform
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uv

from flops import __version__
from flops.adapters.actor_kit import install_kit
from flops.adapters.blob_client import HttpBlobClient
from flops.adapters.containers.engine import ContainerEngine
from flops.adapters.containers.images import EngineImages
from flops.adapters.containers.runtime import ContainerRuntime
from flops.adapters.control_groups import find_control_groups
from flops.adapters.environment_folders import EnvironmentFolders
from flops.adapters.file_blobs import FileBlobs
from flops.adapters.gpus import local_gpus
from flops.adapters.host_facts import LocalHost, memory_bytes
from flops.adapters.images.layout import ImageLayout
from flops.adapters.process_runtime import ProcessRuntime
from flops.adapters.system_clock import SystemClock
from flops.adapters.uv_cache import UvCache
from flops.core.cluster import (
    IMAGE_BUILDER_ADDON,
    LEARNER_ADDON,
    NodeFacts,
    Resources,
    ServiceKind,
    ServiceSpec,
)
from flops.core.ids import ServiceId
from flops.core.platforms import Platform
from flops.durable_file import remove_unfinished, write_durably
from flops.errors import ErrorCode, FlopsError
from flops.log import JsonFormatter, configure_logging
from flops.node.addons import (
    DATA_SERVER,
    Addons,
    DataServerAddon,
    DataServerPlan,
    ImageBuilder,
    NodeAddon,
    endpoint_port,
)
from flops.node.agent import NodeAgent
from flops.node.bundles import BundleStore
from flops.node.caches import NodeCaches
from flops.node.configuration import CONTAINER, PROCESS, NodeConfiguration, default_configuration
from flops.node.daemon import DaemonFacts, NodeDaemon
from flops.node.home import only_daemon
from flops.node.images import NodeImages, shrink_images
from flops.node.paths import NodePaths
from flops.node.preparation import NodeSite, Preparer
from flops.node.service_environment import service_environment
from flops.node.service_runtimes import ServiceRuntimes
from flops.node.session import NodeView
from flops.node.supervisor import Supervisor
from flops.ports import DataCatalog, Environments, Runtime
from flops.retention_ports import Cache
from flops.settings import NodeSettings, inherited_environment
from flops.wire.cluster_tls import cluster_tls
from flops.wire.flight import IDENTITY_FILE, TAGS_FOLDER, TOKEN_FILE, Right, Scope, mint_token
from flops.wire.server_trust import with_trust
from flops.wiring.data import open_data_catalog, server_trust
from flops.wiring.membership import Membership
from flops.wiring.node_files import container_socket, node_build_tools, node_conf_file, node_paths
from flops.wiring.registries import ClusterRegistry, open_registry
from flops.wiring.services import open_environments

_WRITING_MOST_S = 600.0  # no file takes that long to be written
_LOG_BYTES = 8 * 1024**2
# Services in containers are another user, who reads environments and bundles; secrets have their own modes.
_UMASK = 0o022

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeParts:
    """What a node's daemon works with, apart from its own parts.

    Args:
        environments: builds virtual environments.
        kit_dir: folder with our modules for projects' environments.
        open_catalog: connects to the data server in a folder.
        caches: what the parts keep to use it again, and can make anew.
        shrink_downloads: see `NodeCaches`.
    """

    environments: Environments
    kit_dir: Path
    open_catalog: Callable[[Path], DataCatalog]
    caches: tuple[Cache, ...] = ()
    shrink_downloads: Callable[[bool], None] = lambda _is_disk_low: None


def node_parts(paths: NodePaths) -> NodeParts:
    """The parts of a real node."""
    limit_mb = NodeSettings.read().uv_cache_mb
    limit = None if limit_mb is None else limit_mb * 1024**2
    downloads = UvCache(Path(uv.find_uv_bin()), inherited_environment(), limit)
    conf = NodeConfiguration(node_conf_file(paths).load())
    return NodeParts(
        environments=open_environments(
            paths.environments, _blobs_url(paths, conf), functools.partial(_cluster_options, paths)
        ),
        kit_dir=install_kit(paths.kit),
        open_catalog=open_data_catalog,
        caches=(EnvironmentFolders(paths.environments),),
        shrink_downloads=downloads.shrink,
    )


def run_node_daemon(arguments: list[str], make_parts: Callable[[NodePaths], NodeParts] = node_parts) -> int:
    """Run a daemon until SIGTERM or SIGINT: ``[--home DIR] [--foreground]``.

    Args:
        arguments: the command line.
        make_parts: what the daemon works with.

    Returns:
        The exit code. An error at the start is left in ``startup_error.json`` for whoever started us.
    """
    parser = argparse.ArgumentParser(prog="node")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--foreground", action="store_true", help="also write the log that -d writes")
    given = parser.parse_args(arguments)
    configure_logging(NodeSettings.read().log_level)
    paths = node_paths(given.home)
    if given.foreground:
        _log_to(paths.log)
    try:
        with only_daemon(paths.pid):
            paths.startup_error.unlink(missing_ok=True)
            paths.status.unlink(missing_ok=True)
            for folder in (paths.home, *paths.services.glob("*")):
                remove_unfinished(folder, SystemClock().now_s() - _WRITING_MOST_S)
            daemon = build_daemon(paths, make_parts(paths))
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: daemon.stop())
            daemon.run()
    except FlopsError as error:
        _log.exception("NodeEngine did not start")
        if error.code is not ErrorCode.ALREADY_RUNNING:
            write_durably(paths.startup_error, json.dumps(error.to_dict()))
        return error.spec.exit_code
    return 0


def build_daemon(paths: NodePaths, parts: NodeParts) -> NodeDaemon:
    """Join a node's daemon from its configuration.

    Raises:
        FlopsError: ``config_corrupt``, ``file_unreadable``, ``disk_full``.
    """
    conf = NodeConfiguration(node_conf_file(paths).load())
    if conf.prefers_containers:
        os.umask(_UMASK)
    clock = SystemClock()
    services, addon_runtime = node_runtimes(paths, conf)
    gpus = local_gpus(inherited_environment())
    host = LocalHost(
        paths.home,
        conf.cluster_address,
        __version__,
        is_public=conf.is_public,
        gpus=[gpu.model for gpu in gpus],
    )
    name = socket.gethostname() if paths.home.name in {"node", "flops"} else _name_of(paths.home)
    membership = Membership(paths, conf, clock)
    node_id, tls = membership.node_id, membership.tls
    address = host.address()
    certify = membership.certify if membership.authority else None
    addons = _build_addons(paths, conf, address, addon_runtime, parts.open_catalog, certify)
    blobs_url = _blobs_url(paths, conf)
    site = NodeSite(
        name=name,
        host=address,
        blobs_url=blobs_url,
        kit_dir=parts.kit_dir,
        environments_dir=paths.environments,
        images_dir=paths.images,
        inherited=inherited_environment(),
        data_dir=paths.data_server / TAGS_FOLDER,
        cluster=membership.cluster_name,
        authority=membership.authority,
        disclosure=conf.disclosure,
        has_open_network=NodeSettings.read().open_network == "on",
    )
    fetch = HttpBlobClient(blobs_url, verify=tls if tls is not None else True).fetch
    bundles = BundleStore(paths.bundles, fetch)
    access = _data_access(paths.data_server, site.host)
    image_blobs = FileBlobs(paths.images, is_oci_layout=True)
    images = _open_images(paths, image_blobs, conf.cluster, tls) if conf.prefers_containers else None
    bring_image = images.bring if images is not None else None
    preparer = Preparer(site, parts.environments, bundles, fetch, access, bring_image, certify)
    supervisor = Supervisor(paths.services, preparer, services, [gpu.number for gpu in gpus])
    view = NodeView(
        node_id=node_id,
        name=name,
        facts=functools.partial(_facts, host, services, conf),
        load=host.load,
        addons=addons.states,
        data_tags=addons.data_tags,
        clock_s=clock.now_s,
    )
    agent = NodeAgent(membership.dial, view, supervisor, clock, membership.must_redial)
    facts = DaemonFacts(
        node_id=node_id,
        name=name,
        version=__version__,
        cluster_address=conf.cluster,
        active_addons=conf.active_addons,
        report_file=paths.status,
        disclosure=conf.disclosure,
        prefers_containers=conf.prefers_containers,
    )
    caches = NodeCaches(
        (*parts.caches, bundles),
        supervisor.digests_in_use,
        NodeSettings.read().cache_mb * 1024**2,
        paths.home,
        clock,
        _shrinking(parts.shrink_downloads, image_blobs, images, supervisor),
    )
    return NodeDaemon(facts, supervisor, addons, agent, caches, services, clock)


def node_runtimes(paths: NodePaths, conf: NodeConfiguration) -> tuple[Runtime, Runtime]:
    """The runtimes of a node's services, and of its addons."""
    groups = find_control_groups(memory_bytes=memory_bytes())
    output = Path(conf.app_logs) if conf.app_logs else paths.output
    # Not only this node's files: other nodes and the control plane of this machine share the folder of FLOps.
    secrets = [NodeSettings.read().home, paths.home, paths.conf, paths.log]
    secrets += [Path(file) for file in conf.client_certificate if file]
    processes = ProcessRuntime(paths.runtime, output, groups, hidden=secrets)
    engine = ContainerEngine(container_socket())
    containers = ContainerRuntime(paths.container_runtime, output, engine, machine_bytes=memory_bytes())
    addons = ProcessRuntime(paths.addon_runtime, paths.output, groups)
    addon_containers = ContainerRuntime(paths.addon_container_runtime, paths.output, engine)
    return (
        ServiceRuntimes(processes, containers, prefers_containers=conf.prefers_containers),
        ServiceRuntimes(addons, addon_containers, prefers_containers=conf.prefers_containers),
    )


def _open_images(paths: NodePaths, blobs: FileBlobs, cluster: str, tls: ssl.SSLContext | None) -> NodeImages:
    """Images from the cluster's registry, and from others, in the container engine."""
    return NodeImages(
        open_registry(ClusterRegistry(cluster, tls)),
        blobs,
        ImageLayout(paths.images, blobs),
        EngineImages(ContainerEngine(container_socket()), blobs),
        cluster=cluster,
        platform=Platform.of(platform.machine()),
    )


def _shrinking(
    shrink_downloads: Callable[[bool], None],
    blobs: FileBlobs,
    images: NodeImages | None,
    supervisor: Supervisor,
) -> Callable[[bool], None]:
    """What makes downloads and images smaller, and is told whether the disk is low."""
    max_bytes = NodeSettings.read().image_cache_mb * 1024**2

    def shrink(is_disk_low: bool) -> None:
        shrink_downloads(is_disk_low)
        in_use, now_s = supervisor.digests_in_use(), SystemClock().now_s()
        needed = images.parts_in_use(in_use) if images is not None else ()
        shrink_images(blobs, now_s, is_disk_low=is_disk_low, max_bytes=max_bytes, needed=needed)
        if images is not None:
            images.give_up(blobs, in_use, now_s, is_disk_low=is_disk_low)

    return shrink


def end_leftovers(paths: NodePaths) -> int:
    """End what a killed daemon has left running; returns how many services and addons that were."""
    ended = 0
    for runtime in node_runtimes(paths, default_configuration()):
        for service_id in runtime.running():
            runtime.stop(service_id)
            ended += 1
    return ended


def _blobs_url(paths: NodePaths, conf: NodeConfiguration) -> str:
    is_encrypted = conf.is_cluster_tls or paths.identity.exists()
    return f"{'https' if is_encrypted else 'http'}://{conf.cluster}/api/blobs"


def _cluster_options(paths: NodePaths) -> Mapping[str, Any]:
    """Options of an HTTP client that speaks to the cluster as this node."""
    from flops.adapters.node_identity import read_identity

    identity = read_identity(paths.identity)
    return (
        {}
        if identity is None
        else {"verify": cluster_tls(identity.authority, paths.identity, identity.dials)}
    )


def _name_of(home: Path) -> str:
    return f"{socket.gethostname()}-{home.name}"


def _facts(host: LocalHost, runtime: Runtime, conf: NodeConfiguration) -> NodeFacts:
    limits, note = runtime.limits()
    runtimes = (CONTAINER, PROCESS) if conf.prefers_containers else (PROCESS,)
    return host.facts().model_copy(update={"limits": limits, "limits_note": note, "runtimes": runtimes})


def _build_addons(
    paths: NodePaths,
    conf: NodeConfiguration,
    address: str,
    runtime: Runtime,
    open_catalog: Callable[[Path], DataCatalog],
    certify: Callable[[ServiceId, Path], bool] | None,
) -> Addons:
    addons: list[NodeAddon] = []
    if LEARNER_ADDON in conf.active_addons:
        host = address if address.startswith("127.") else "0.0.0.0"  # noqa: S104 (devices send data here)
        identity = paths.data_server / IDENTITY_FILE
        argv = (sys.executable, "-m", "flops.wiring", "data-server", "--dir", str(paths.data_server))
        plan = DataServerPlan(
            argv=(*argv, "--host", host, *(("--identity", str(identity)) if certify is not None else ())),
            env=service_environment(inherited_environment(), Resources()),
            folder=paths.data_server,
            host=host,
            port=NodeSettings.read().data_port,
            certify=None if certify is None else functools.partial(certify, DATA_SERVER, identity),
        )
        addons.append(DataServerAddon(LEARNER_ADDON, plan, runtime, open_catalog))
    else:
        for leftover in runtime.running():
            runtime.stop(leftover)
    if IMAGE_BUILDER_ADDON in conf.active_addons:
        addons.append(ImageBuilder(node_build_tools))
    return Addons(addons)


def _data_access(folder: Path, address: str) -> Callable[[ServiceSpec], tuple[str, str]]:
    """Gives services the address of the data server, and a token for what they need and no more."""

    def access(spec: ServiceSpec) -> tuple[str, str]:
        if spec.kind is ServiceKind.LEARNER:
            scope = Scope(Right.READ, tuple(spec.config["data_tags"]))
        elif spec.kind is ServiceKind.MOCK_DATA_PROVIDER:
            scope = Scope(Right.WRITE, (str(spec.config["configuration"]["data_tag"]),))
        else:
            return "", ""
        port = endpoint_port(folder)
        try:
            token = (folder / TOKEN_FILE).read_text(encoding="ascii").strip()
        except OSError:
            token = ""
        if not port or not token:
            raise FlopsError(ErrorCode.UNREACHABLE, "The ML data server of this node is not ready.")
        return f"{address}:{port}", with_trust(mint_token(token, scope), server_trust(folder))

    return access


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(JsonFormatter())
    logging.getLogger().addHandler(handler)
