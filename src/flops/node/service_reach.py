"""What each kind of service may use of its node's files, beside its work folder, and of the network."""

from __future__ import annotations

import contextlib
import ipaddress
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import flops
from flops.actor import EVENTS_FILE, ActorContext
from flops.core.cluster import ServiceKind
from flops.core.reach import Reach
from flops.node.event_log import last_address
from flops.wire.flight import check_tag

_USUAL_PORTS = {"http": 80, "https": 443}
_OWN_PROGRAMS = (sys.prefix, sys.base_prefix, str(Path(flops.__file__).resolve().parents[1]))


def service_reach(
    kind: ServiceKind, context: ActorContext, environ: Mapping[str, str], image: str = ""
) -> Reach:
    """What a service may use.

    All read their own bundle, our modules and the environments; with an image, those of the image. Builders
    also write environments and uv's cache, mock data providers the cache of Hugging Face. Builders of images
    confine themselves, after they have parted with the process that runs Dockerfiles: a confined one could
    not mount anything.

    Learners read the files of their tags, so that rows need not go through the data server.

    Learners dial their aggregator and the node's data server, inference services nobody. An aggregator's own
    process is ours, and holds its children with users' code to no port at all. In an image, the interpreter
    and libraries it runs on may be of a user's making: there it dials the cluster, MLflow, and the aggregator
    above, unless one of them has a name, which is to be looked up.

    Args:
        kind: of the service.
        context: of the service.
        environ: the service's environment variables.
        image: that it runs in; "" for none.
    """
    dials, listens = (None, ()) if context.has_open_network else _ports(kind, context, image)
    if image:
        return Reach(dials=dials, listens=listens, image=image)
    bundle = (context.repo_dir,) if context.repo_dir else ()
    readable = (*_OWN_PROGRAMS, context.kit_dir, context.environments_dir, *bundle, *_data(kind, context))
    writable: tuple[str, ...] = ()
    if kind is ServiceKind.BUILDER:
        writable = (context.environments_dir, context.images_dir, _cache(environ, "UV_CACHE_DIR", "uv"))
    elif kind is ServiceKind.MOCK_DATA_PROVIDER:
        writable = (_cache(environ, "HF_HOME", "huggingface"),)
    makes_images = kind is ServiceKind.BUILDER and context.config.get("images") is not None
    return Reach(
        readable=readable, writable=writable, dials=dials, listens=listens, confines_itself=makes_images
    )


def _data(kind: ServiceKind, context: ActorContext) -> tuple[str, ...]:
    """The folders of a learner's tags. Each is checked to be one name: a path would lead elsewhere."""
    if kind is not ServiceKind.LEARNER or not context.data_dir:
        return ()
    return tuple(str(Path(context.data_dir) / check_tag(tag)) for tag in context.config["data_tags"])


def _ports(
    kind: ServiceKind, context: ActorContext, image: str
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """The ports that a service dials, None for any, and those that it listens at."""
    if kind is ServiceKind.LEARNER:
        return _ports_of(context.config.get("aggregator"), context.data_address), ()
    if kind is ServiceKind.INFERENCE:
        return (), _ports_of(context.config.get("port"))
    if kind is ServiceKind.AGGREGATOR and image:
        return _aggregators_ports(context)
    return None, ()


def _aggregators_ports(context: ActorContext) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Likewise, of one in an image: it listens where it did before, if it is started again."""
    urls = [context.blobs_url]
    if "://" in (tracking := str(context.config.get("tracking_uri"))):  # else it is behind the cluster's port
        urls.append(tracking)
    parts = [urlsplit(url) for url in urls]
    above = str((context.config.get("parent") or {}).get("address", ""))
    hosts = [*(part.hostname for part in parts), *([above.rpartition(":")[0].strip("[]")] if above else ())]
    if not all(map(_is_address, hosts)):
        return None, ()
    dials = tuple(part.port or _USUAL_PORTS.get(part.scheme, 0) for part in parts)
    return (*dials, *_ports_of(above)), _ports_of(last_address(Path(context.work_dir) / EVENTS_FILE))


def _is_address(host: str | None) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host or ""))
    return False


def _ports_of(*addresses: object) -> tuple[int, ...]:
    """Ports of addresses as ``host:port``; what is none is for the service to refuse."""
    ports = (str(address).rpartition(":")[2] for address in addresses)
    return tuple(int(port) for port in ports if port.isdecimal() and int(port) < 65_536)


def _cache(environ: Mapping[str, str], variable: str, name: str) -> str:
    caches = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".cache")
    return environ.get(variable) or str(Path(caches) / name)
