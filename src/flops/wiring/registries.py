"""Joins the client of registries with who we are to them."""

from __future__ import annotations

import ssl
from pathlib import Path

from flops.adapters.registry_client.auth import DockerCredentials
from flops.adapters.registry_client.client import OciRegistry
from flops.settings import inherited_environment


def open_registry(plain_http: frozenset[str], tls: ssl.SSLContext | None = None) -> OciRegistry:
    """A client of registries with the credentials that ``docker login`` has left.

    Args:
        plain_http: hosts, with their ports, that are spoken to in the clear.
        tls: how to encrypt; None for the default.

    Raises:
        FlopsError: ``config_corrupt``, ``file_unreadable``.
    """
    environ = inherited_environment()
    folder = environ.get("DOCKER_CONFIG") or Path(environ.get("HOME", "/"), ".docker")
    return OciRegistry(DockerCredentials.load(Path(folder, "config.json")), tls=tls, plain_http=plain_http)
