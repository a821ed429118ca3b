"""What a running daemon tells the operator about itself, in a file."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from flops.core.cluster import Addon, DataTag, ServiceStatus
from flops.core.model import Value
from flops.disclosure import Disclosure
from flops.node.caches import CacheLine


class ServiceLine(Value):
    """A service of the node, as operators see it."""

    kind: str
    project_id: str
    status: ServiceStatus


class NodeReport(Value):
    """The state of a running daemon."""

    pid: int
    node_id: str
    name: str
    version: str
    started_at_s: float
    written_at_s: float
    cluster_address: str
    is_connected: bool
    link_detail: str  # the cluster's name, or why the node has not joined
    link_since_s: float
    active_addons: tuple[str, ...] = ()  # as this daemon was started with
    addons: tuple[Addon, ...] = ()
    data_tags: tuple[DataTag, ...] = ()
    services: tuple[ServiceLine, ...] = ()
    limits: tuple[str, ...] = ()
    limits_note: str = ""
    disclosure: Disclosure = Disclosure.FULL  # as this daemon was started with
    prefers_containers: bool = False  # likewise
    caches: tuple[CacheLine, ...] = ()
    cache_limit_bytes: int = 0


def read_report(path: Path) -> NodeReport | None:
    """The last report; None when there is none that can be read."""
    try:
        return NodeReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
