"""The clusters of a federation: the manager's own, and those that relays run elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flops.core.model import Value
from flops.errors import ErrorCode, FlopsError

DEFAULT_CLUSTER = "default"  # the manager's own
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


class Cluster(Value):
    """A cluster as the manager knows it."""

    name: str
    relay: str = ""  # which installation of a relay it is, told by it; "" for the manager's own
    address: str = ""  # host:port at which its nodes reach it
    version: str = ""  # of FLOps
    joined_at_s: float = 0.0
    last_seen_s: float = 0.0
    is_connected: bool = False


def check_cluster_name(name: str) -> str:
    """Return the name of a cluster that a relay may run.

    Raises:
        FlopsError: ``usage``.
    """
    if name == DEFAULT_CLUSTER or not _NAME.fullmatch(name):
        raise FlopsError(
            ErrorCode.USAGE,
            f"A cluster cannot be called {name[:80]!r}.",
            hint="Give 1 to 40 lower-case letters, digits or '-', such as edge-a; "
            f"{DEFAULT_CLUSTER} is the manager's own.",
        )
    return name


def find_cluster(clusters: Sequence[Cluster], name: str) -> Cluster:
    """The cluster with a name.

    Raises:
        FlopsError: ``cluster_not_found``.
    """
    found = next((cluster for cluster in clusters if cluster.name == name), None)
    if found is None:
        known = ", ".join(cluster.name for cluster in clusters)
        raise FlopsError(
            ErrorCode.CLUSTER_NOT_FOUND, f"There is no cluster {name[:80]!r}; there are: {known}."
        )
    return found
