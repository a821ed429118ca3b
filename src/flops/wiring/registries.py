"""Joins the client of registries with who we are to them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from flops.adapters.registry_client.auth import Credentials, DockerCredentials
from flops.adapters.registry_client.client import OciRegistry
from flops.settings import inherited_environment


@dataclass(frozen=True)
class ClusterRegistry:
    """The registry of a cluster, and who we are to it.

    Args:
        host: ``host:port`` of the cluster.
        tls: how to encrypt; None not to.
        user: a service's id, "" for a node, which shows its certificate.
        password: the service's key.
    """

    host: str
    tls: ssl.SSLContext | None
    user: str = ""
    password: str = field(default="", repr=False)


def open_registry(cluster: ClusterRegistry) -> OciRegistry:
    """A client of registries with the credentials that ``docker login`` has left, and those for the cluster.

    Raises:
        FlopsError: ``config_corrupt``, ``file_unreadable``.
    """
    environ = inherited_environment()
    folder = environ.get("DOCKER_CONFIG") or Path(environ.get("HOME", "/"), ".docker")
    credentials = DockerCredentials.load(Path(folder, "config.json"))
    if cluster.tls is None:
        return OciRegistry(credentials, plain_http=frozenset({cluster.host}))
    if cluster.password:
        credentials = credentials.having(cluster.host, Credentials(cluster.user, cluster.password))
    return OciRegistry(credentials, own_tls={cluster.host: cluster.tls})
