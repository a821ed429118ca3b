"""Names of things: one type per kind of identifier, so that they cannot be mixed up."""

from __future__ import annotations

from typing import NewType

ProjectId = NewType("ProjectId", str)  # 12 hex characters, as users of the ancestor know them
NodeId = NewType("NodeId", str)  # made by the node at its first start, kept in its home
ServiceId = NewType(
    "ServiceId", str
)  # <kind>-<project id>[-<n>][-<attempt>]; the same id is never used twice
Digest = NewType("Digest", str)  # lower-case hex SHA-256 of a blob's bytes
EnvironmentKey = NewType(
    "EnvironmentKey", str
)  # SHA-256 over everything that decides an environment's content
