"""Names of things: one type per kind of identifier, so that they cannot be mixed up."""

from __future__ import annotations

import re
from typing import NewType

ProjectId = NewType("ProjectId", str)  # 12 hex characters, as users of the ancestor know them
NodeId = NewType("NodeId", str)  # made by the node at its first start, kept in its home
ServiceId = NewType(
    "ServiceId", str
)  # <kind>-<project id>[-<n>][-r<attempt>]; the same id is never used twice
Digest = NewType("Digest", str)  # lower-case hex SHA-256 of a blob's bytes
EnvironmentKey = NewType(
    "EnvironmentKey", str
)  # SHA-256 over everything that decides an environment's content


def make_service_id(kind: str, owner: str, number: int | None = None, attempt: int = 1) -> ServiceId:
    """Name a service: the same arguments give the same id, so that starting it twice starts it once.

    Args:
        kind: value of a `flops.core.cluster.ServiceKind`.
        owner: id of the project or mock data provider.
        number: which of several of the same kind, from 1.
        attempt: counts replacements of the service, from 1.
    """
    parts = [kind, owner, *([] if number is None else [str(number)])]
    if attempt > 1:
        parts.append(f"r{attempt}")
    return ServiceId("-".join(parts))


def renewed(service: ServiceId, attempt: int) -> ServiceId:
    """The id of a service's replacement: the same number with another attempt."""
    return ServiceId(f"{re.sub(r'-r[0-9]+$', '', service)}-r{attempt}")
