"""Joins the services that run in our own environment: builder, aggregator, mock data provider."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flops.actor import ActorContext, EventLog
    from flops.builder.images import ImageTools
    from flops.core.ids import Digest
    from flops.image_ports import BaseImages, ContainerBuilds
    from flops.ports import Environments
    from flops.tracker_port import Tracker
    from flops.wire.services import ImageOrder
    from flops.wiring.registries import ClusterRegistry

_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy")


def run_builder(arguments: list[str]) -> int:
    """Run a builder: a service, given its context file."""
    from functools import partial

    builds = _part_and_confine(Path(arguments[0]))

    from flops.actor import run_actor
    from flops.builder.builder import main as build

    return run_actor(
        lambda context, events: build(
            context,
            events,
            partial(
                open_environments, blobs_url=context.blobs_url, options=partial(_cluster_options, context)
            ),
            partial(open_image_tools, context, builds),
            partial(_fetch_blob, context),
        ),
        ["", *arguments],
        has_users_code=False,
    )


def _part_and_confine(file: Path) -> ContainerBuilds | None:
    """Start what runs Dockerfiles, if this service may, and then confine this process.

    Before that, it has read nothing of a user's.
    """
    from flops.adapters.confinement import confine, give_way, told_confinement
    from flops.settings import inherited_environment

    inherited = inherited_environment()
    told = told_confinement(inherited)
    if told is None:
        return None
    from flops.actor import ActorContext
    from flops.adapters.images.buildah import Buildah
    from flops.adapters.images.builds_apart import part_with
    from flops.adapters.process_runtime import FOLDER_VARIABLE, ID_VARIABLE
    from flops.adapters.service_shim import CANNOT_CONFINE

    give_way()
    handed_on = (*_PROXIES, *map(str.upper, _PROXIES), ID_VARIABLE, FOLDER_VARIABLE)
    environ = {name: inherited[name] for name in handed_on if name in inherited}
    root = Path(ActorContext.load(file).images_dir)
    root.mkdir(parents=True, exist_ok=True)
    builds = part_with(lambda: Buildah(environ, hidden=told.hidden), root)
    try:
        confine(told)
    except OSError as exc:
        sys.stderr.write(f"The service cannot be confined: {exc}\n")
        sys.exit(CANNOT_CONFINE)
    return builds


def _fetch_blob(context: ActorContext, url: str, digest: Digest, path: Path) -> None:
    """Bring a verified blob of the cluster into a file, as the service that asks."""
    from flops.adapters.blob_client import HttpBlobClient

    HttpBlobClient(url, **_cluster_options(context)).fetch(digest, path)


def _cluster_options(context: ActorContext) -> dict[str, Any]:
    """Options of an HTTP client that speaks to the cluster as the service."""
    from flops.wire.cluster_tls import http_options

    return http_options(context.authority, context.service_id, context.key, context.cluster)


def run_aggregator(arguments: list[str]) -> int:
    """Run an aggregator: a service, given its context file."""
    import os

    from flops.settings import inherited_environment, quiet_libraries

    quiet_libraries()  # before Flower is imported

    from functools import partial

    from flops.actor import run_actor
    from flops.log import configure_logging
    from flops.trainer.aggregator import main as aggregate

    configure_logging("INFO")
    environ = inherited_environment()
    code = run_actor(
        lambda context, events: aggregate(context, events, partial(_open_tracker, context), environ),
        ["", *arguments],
        has_users_code=False,  # its children do, and tell it no more than may be revealed
    )
    # A learner that hangs must not keep the process: the interpreter would wait for its thread.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _open_tracker(context: ActorContext, uri: str) -> Tracker:
    """The record of experiments at a URI, or where the cluster's port leads, as the service that asks."""
    from flops.adapters.mlflow_tracker import MlflowTracker
    from flops.wire.services import TRACKING_PATH

    public_uri = str(context.config.get("tracking_public_uri", ""))
    if uri != TRACKING_PATH:
        return MlflowTracker(uri, public_uri=public_uri)
    url = urljoin(context.blobs_url, uri)
    return MlflowTracker(url, public_uri=public_uri, **_cluster_options(context))


def run_mock_data_provider(arguments: list[str]) -> int:
    """Run a mock data provider: a service, given its context file."""
    from functools import partial

    import pyarrow as pa

    from flops.actor import run_actor
    from flops.adapters.data_files import open_data
    from flops.adapters.flight_client import FlightDataClient
    from flops.mockdata.hub import load_from_hub
    from flops.mockdata.provider import MockDataProvider

    def read_file(path: Path) -> pa.Table:
        source = open_data(path)
        return pa.Table.from_batches(source.batches, schema=source.schema)

    def provide(context: ActorContext, events: EventLog) -> None:
        MockDataProvider(
            open_sink=FlightDataClient,
            fetch_blob=partial(_fetch_blob, context),
            read_file=read_file,
            load_from_hub=load_from_hub,
        ).run(context, events)

    return run_actor(provide, ["mock-data-provider", *arguments], has_users_code=False)


def open_image_tools(context: ActorContext, builds: ContainerBuilds | None, order: ImageOrder) -> ImageTools:
    """What makes images in a folder of this machine, and pushes them.

    The base is the image that the order names, else one made of Debian's packages.

    Args:
        context: of the builder, which says where they are kept, and where the cluster is.
        builds: runs Dockerfiles.
        order: what is asked for.

    Raises:
        FlopsError: ``image_name_invalid``, ``config_corrupt``.
    """
    from functools import partial

    import uv

    from flops.adapters.file_blobs import FileBlobs
    from flops.adapters.images.assembler import OciAssembler
    from flops.adapters.images.build_tools import runs_here
    from flops.adapters.images.buildah import Buildah
    from flops.adapters.images.debian_base import DebianBase
    from flops.adapters.images.dockerfile_images import DockerfileImages
    from flops.adapters.images.layer_cache import LayerCache
    from flops.adapters.images.pulled_base import PulledBase
    from flops.adapters.images.source_packages import SourcePackages
    from flops.adapters.uv_program import UvProgram
    from flops.builder.images import ImageTools
    from flops.core.image_reference import parse_reference
    from flops.settings import inherited_environment
    from flops.wiring.registries import open_registry
    from flops.wiring.site_packages import site_packages

    environ = inherited_environment()
    root = Path(context.images_dir)
    blobs = FileBlobs(root, is_oci_layout=True)
    registry = open_registry(_cluster_registry(context))
    program = Path(uv.find_uv_bin())
    bases: BaseImages = DebianBase(root / "bases", uv=program, environ=environ)
    if order.base:
        bases = PulledBase(root / "bases", registry, parse_reference(order.base))
    builds = builds or Buildah(environ)
    open_layout = partial(FileBlobs, is_oci_layout=True)
    dockerfiles = DockerfileImages(root / "layers", blobs, registry, builds, open_layout, runs_here=runs_here)
    compilers = DebianBase(root / "bases", uv=program, environ=environ, has_compilers=True)
    sources = SourcePackages(
        LayerCache(root / "layers", blobs),
        builds,
        UvProgram(program, environ),
        open_layout,
        runs_here=runs_here,
        toolchain=None if order.base else compilers,
    )
    site = site_packages(context.blobs_url, partial(_cluster_options, context))
    assembler = OciAssembler(
        root / "layers", blobs, bases, uv=program, environ=environ, site=site, sources=sources
    )
    return ImageTools(assembler, blobs, registry, own_lock(), dockerfiles)


def _cluster_registry(context: ActorContext) -> ClusterRegistry:
    import ssl
    from urllib.parse import urlsplit

    from flops.wire.cluster_tls import cluster_tls
    from flops.wiring.registries import ClusterRegistry

    url = urlsplit(context.blobs_url)
    tls = ssl.create_default_context() if url.scheme == "https" else None
    if context.authority:
        tls = cluster_tls(context.authority, cluster=context.cluster)
    return ClusterRegistry(url.netloc, tls, user=context.service_id, password=context.key)


def own_lock() -> str:
    """The lock of what an aggregator imports beside our own modules."""
    from importlib.resources import files

    return files("flops.builder").joinpath("aggregator.lock").read_text()


def open_environments(root: Path, blobs_url: str, options: Callable[[], Mapping[str, Any]]) -> Environments:
    """The environments in a folder of this machine, built by uv.

    Args:
        root: the folder.
        blobs_url: base URL of the cluster's blobs, which may serve packages as well.
        options: of an HTTP client that speaks to it; see `site_packages`.
    """
    from importlib.metadata import version

    import uv

    from flops.adapters.uv_environments import UvEnvironments
    from flops.settings import inherited_environment
    from flops.wiring.site_packages import site_packages

    return UvEnvironments(
        root,
        uv=Path(uv.find_uv_bin()),
        environ=inherited_environment(),
        mlflow_version=version("mlflow"),
        site=site_packages(blobs_url, options),
    )
