"""Joins the control plane: manager, cluster orchestrator and MLflow server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.routing import BaseRoute

import flops
from flops.adapters.cluster_register import FileClusterRegister
from flops.adapters.file_blobs import FileBlobs
from flops.adapters.git_repos import GitRepos
from flops.adapters.http_server import HttpServer, listen
from flops.adapters.mlflow_server import MlflowServer
from flops.adapters.mlflow_tracker import MlflowTracker
from flops.adapters.package_index import HttpPackageIndex
from flops.adapters.sql_cluster_store import SqlClusterStore
from flops.adapters.sql_store import SqlProjectStore
from flops.adapters.system_clock import SystemClock
from flops.adapters.uv_environments import this_platform
from flops.control.kept_ports import KeptPorts
from flops.control.lifetime import (
    ADMIN_TOKEN_FILE,
    CLUSTER_FILE,
    CLUSTERS_FILE,
    IMAGES_FOLDER,
    PACKAGES_FOLDER,
    PROJECTS_FILE,
    SECRET_FILE,
    TRACKING_FOLDER,
    run_until_told,
)
from flops.core.address import reached_here, with_port
from flops.core.clusters import DEFAULT_CLUSTER, Cluster
from flops.core.health import is_loopback
from flops.core.sla import Packaging
from flops.durable_file import keep_token, remove_unfinished
from flops.log import configure_logging
from flops.manager.app import build_app as build_manager_app
from flops.manager.engine import Engine
from flops.manager.images import ImageShelf
from flops.manager.options import EngineOptions
from flops.manager.retention import DAY_S, Retention, RetentionOptions
from flops.manager.tracking_door import TrackingDoor
from flops.orchestrator.app import build_app as build_cluster_app
from flops.orchestrator.cluster import ClusterOrchestrator
from flops.orchestrator.clusters import Clusters
from flops.orchestrator.packages import PackageCache
from flops.registry.app import build_registry
from flops.registry.repositories import Repositories
from flops.settings import ControlSettings, inherited_environment
from flops.wire.rest import ControlStatus
from flops.wire.services import TRACKING_PATH
from flops.wiring.cluster_port import guarded, with_registry
from flops.wiring.federation import Federation
from flops.wiring.manager_certificate import ManagerTls, open_manager_tls
from flops.wiring.tracking_proxy import beside_cluster, with_tracking

if TYPE_CHECKING:
    from flops.wiring.cluster_security import ClusterSecurity

_log = logging.getLogger(__name__)
_WRITING_MOST_S = 600.0  # no file takes that long to be written


def run_control_plane(arguments: list[str]) -> int:
    """Run the control plane until it is told to stop; returns its exit code."""
    settings = ControlSettings.from_arguments(arguments)
    configure_logging(settings.log_level)
    return run_until_told(settings.control_dir, lambda parts: _start(settings, parts))


def _open_images(folder: Path) -> tuple[FileBlobs, Repositories]:
    blobs = FileBlobs(folder / "blobs")
    return blobs, Repositories(folder / "names", blobs)


def _open_repos(folder: Path, blobs: FileBlobs) -> GitRepos:
    return GitRepos(
        blobs,
        folder / "repositories",
        environ=inherited_environment(),
        mlflow_version=version("mlflow"),
        platform=this_platform(),
    )


def _open_packages(
    settings: ControlSettings, blobs: FileBlobs, parts: ExitStack
) -> tuple[Sequence[BaseRoute], Sequence[Callable[[], None]]]:
    """What is served of packages, and what is to be swept; nothing unless an index is given."""
    if not settings.package_index:
        return (), ()
    index = HttpPackageIndex(settings.package_index)
    parts.callback(index.close)
    cache = PackageCache(index, FileBlobs(settings.control_dir / PACKAGES_FOLDER), blobs, SystemClock())
    return cache.routes(), (cache.shrink,)


def _open_shelf(
    settings: ControlSettings,
    store: SqlProjectStore,
    images: Repositories,
    engine: Engine,
    orchestrator: ClusterOrchestrator,
) -> ImageShelf:
    return ImageShelf(
        store,
        orchestrator,
        images,
        SystemClock(),
        max_bytes=settings.registry_mb * 1024**2,
        deploying=engine.deployments.lock,
    )


def _engine_options(settings: ControlSettings, tracking_uri: str, public_uri: str) -> EngineOptions:
    is_near = not _leads_to_tracking(settings)
    return EngineOptions(
        tracking_uri=tracking_uri if is_near else TRACKING_PATH,
        tracking_public_uri=public_uri,
        secret=keep_token(settings.control_dir / SECRET_FILE).encode(),
        packaging=Packaging(settings.packaging),
        registry=settings.registry or "",
        base_image=settings.base_image or "",
        inference_port=settings.inference_port,
        load_timeout_s=settings.load_timeout_s,
    )


def _start(settings: ControlSettings, parts: ExitStack) -> Mapping[str, Any]:
    folder = settings.control_dir
    clock = SystemClock()
    started_at_s = clock.now_s()
    token = keep_token(folder / ADMIN_TOKEN_FILE)
    ports = KeptPorts(folder)

    tracking = _start_tracking(settings, ports, parts)
    blobs = FileBlobs(folder / "blobs")
    tls = open_manager_tls(settings, clock, parts)
    listener = parts.enter_context(listen(settings.host, ports.wanted("manager", settings.manager_port)))
    manager_url = _manager_url(settings, tls, listener.getsockname()[1])
    tracking_url = tracking.url if is_loopback(settings.host) else f"{manager_url}{TRACKING_PATH}"
    security = _open_security(settings, parts, clock)
    orchestrator = _open_orchestrator(folder, clock, security)
    packages, sweeps = _open_packages(settings, blobs, parts)
    image_blobs, images = _open_images(folder / IMAGES_FOLDER)
    registry = build_registry(image_blobs, images, clock)
    served = (orchestrator, blobs, packages, registry, tracking.url)
    cluster, clusters = _serve_cluster(settings, ports, served, security)
    parts.callback(cluster.close)

    store = SqlProjectStore(folder / PROJECTS_FILE)
    repos = _open_repos(folder, blobs)
    engine = Engine(
        store=store,
        orchestrator=orchestrator,
        repos=repos,
        blobs=blobs,
        clock=clock,
        options=_engine_options(settings, tracking.url, tracking_url),
        tracker=MlflowTracker(tracking.url),
    )

    def status() -> ControlStatus:
        nodes = orchestrator.nodes()
        projects = engine.projects()
        is_ready = tracking.is_ready()
        return ControlStatus(
            version=flops.__version__,
            manager_url=manager_url,
            manager_host=settings.host,
            authority_file=tls.authority_file,
            cluster_address=f"{settings.cluster_host}:{cluster.port}",
            is_cluster_encrypted=security is not None,
            tracking_url=tracking_url,
            tracking_loopback_url=tracking.url,
            is_tracking_ready=is_ready,
            tracking_detail="" if is_ready else f"not ready yet; its log is {tracking.log_path}",
            home=str(settings.home),
            started_at_s=started_at_s,
            nodes_connected=sum(node.is_connected for node in nodes),
            nodes_total=len(nodes),
            projects_active=sum(not project.stage.is_final for project in projects),
            projects_total=len(projects),
        )

    shelf = _open_shelf(settings, store, images, engine, orchestrator)
    app = build_manager_app(
        engine,
        token=token,
        status=status,
        blobs=blobs,
        images=shelf,
        clusters=Federation(settings, clusters, orchestrator.admission, cluster.port),
        authority=tls.authority,
    )
    safe = with_tracking(app, tracking.url, partial(TrackingDoor, token=token))
    manager = HttpServer(safe, settings.host, 0, tls=tls.context, listener=listener)
    parts.callback(manager.close)
    engine.start()
    parts.callback(engine.close)  # before the server waits for its connections: it ends their streams
    others = [repos.sweep, shelf.tidy, *sweeps]
    retention = _build_retention(settings, (store, orchestrator, blobs, clock), others)
    parts.callback(retention.close)
    retention.start()
    manager.start()
    ports.keep({"manager": manager.port, "cluster": cluster.port, "tracking": tracking.port})
    return status().model_dump()


def _start_tracking(settings: ControlSettings, ports: KeptPorts, parts: ExitStack) -> MlflowServer:
    port = ports.wanted("tracking", settings.tracking_port)
    folder = settings.control_dir / TRACKING_FOLDER
    tracking = MlflowServer(folder, port, inherited_environment())
    tracking.start()
    parts.callback(tracking.stop)
    return tracking


def _manager_url(settings: ControlSettings, tls: ManagerTls, port: int) -> str:
    scheme = "http" if tls.context is None else "https"
    return f"{scheme}://{with_port(reached_here(settings.host), port)}"


def _leads_to_tracking(settings: ControlSettings) -> bool:
    """Whether aggregators track by the cluster's port: MLflow itself is reached by this machine only."""
    return settings.encrypts(settings.cluster_host) or not is_loopback(settings.cluster_host)


def _open_orchestrator(
    folder: Path, clock: SystemClock, security: ClusterSecurity | None
) -> ClusterOrchestrator:
    admission = security.admission if security is not None else None
    return ClusterOrchestrator(SqlClusterStore(folder / CLUSTER_FILE), clock, admission=admission)


def _own_cluster(settings: ControlSettings, port: int) -> Cluster:
    return Cluster(
        name=DEFAULT_CLUSTER,
        address=f"{settings.cluster_host}:{port}",
        version=flops.__version__,
        last_seen_s=SystemClock().now_s(),
        is_connected=True,
    )


def _serve_cluster(
    settings: ControlSettings,
    ports: KeptPorts,
    served: tuple[ClusterOrchestrator, FileBlobs, Sequence[BaseRoute], Starlette, str],
    security: ClusterSecurity | None,
) -> tuple[HttpServer, Clusters]:
    """Serve nodes, further clusters, blobs and the registry of images on the port that nodes dial."""
    orchestrator, blobs, packages, registry, tracking_url = served

    def own() -> Cluster:
        return _own_cluster(settings, cluster.port)

    register = FileClusterRegister(settings.control_dir / CLUSTERS_FILE)
    clusters = Clusters(register, orchestrator, SystemClock(), own)
    max_bytes = settings.max_blob_mb * 1024**2
    app = build_cluster_app(
        orchestrator, blobs, max_blob_bytes=max_bytes, more=[*packages, *clusters.routes()]
    )
    app = with_registry(app, registry)
    if _leads_to_tracking(settings):
        app = with_tracking(app, tracking_url, beside_cluster)
    if security is not None:
        app = guarded(app, security.admission, orchestrator)
    tls = security.tls if security is not None else None
    cluster = HttpServer(app, settings.cluster_host, ports.wanted("cluster", settings.cluster_port), tls=tls)
    cluster.start()
    return cluster, clusters


def _open_security(settings: ControlSettings, parts: ExitStack, clock: SystemClock) -> ClusterSecurity | None:
    """What makes the cluster's port safe; None where it is not encrypted."""
    if not settings.encrypts(settings.cluster_host):
        if not is_loopback(settings.cluster_host):
            _log.warning("The cluster's port is open to other machines, without encryption.")
        return None
    from flops.wiring.cluster_security import ClusterSecurity

    secret = keep_token(settings.control_dir / SECRET_FILE).encode()
    life_s = settings.certificate_hours * 3600
    security = ClusterSecurity(settings.control_dir, clock, secret=secret, life_s=life_s)
    parts.callback(security.close)
    security.start()
    return security


def _build_retention(
    settings: ControlSettings,
    parts: tuple[SqlProjectStore, ClusterOrchestrator, FileBlobs, SystemClock],
    others: Sequence[Callable[[], None]],
) -> Retention:
    folder = settings.control_dir
    clock = parts[-1]

    def remove_leftovers() -> None:
        for place in (folder, folder / TRACKING_FOLDER):
            remove_unfinished(place, clock.now_s() - _WRITING_MOST_S)

    options = RetentionOptions(settings.keep_logs_projects, settings.keep_logs_days * DAY_S)
    return Retention(*parts, options, (*others, remove_leftovers))
