"""What a relay needs of its way to the manager, and who it says that its nodes are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from starlette.types import Scope

from flops.core.admission import PeerCertificate
from flops.wire.join import CLUSTER_HEADER, NODE_HEADER, PEER_EXTENSION, node_header

Headers = Sequence[tuple[bytes, bytes]]

# Who somebody is, says the relay alone.
NOT_PASSED_ON = frozenset({b"proxy-connection", CLUSTER_HEADER.encode(), NODE_HEADER.encode()})


class Answer(Protocol):
    """What the manager answers, while it comes."""

    @property
    def status(self) -> int:
        """The status of HTTP."""
        ...

    @property
    def headers(self) -> Headers:
        """All headers, names in lower case."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; raises ``unreachable`` when it breaks off."""
        ...


class Link(Protocol):
    """A node's connection to the manager; all raise ``unreachable`` when it has ended."""

    async def send(self, text: str) -> None:
        """Send a message."""
        ...

    async def receive(self) -> str:
        """The next message."""
        ...


class Uplink(Protocol):
    """The way to the manager.

    Both raise ``unreachable``, ``certificate_refused``, ``encryption_mismatch``.
    """

    def ask(
        self, method: str, target: bytes, headers: Headers, body: AsyncIterator[bytes] | None = None
    ) -> AbstractAsyncContextManager[Answer]:
        """Ask for a path with its query; the answer is there until the end of the block."""
        ...

    def dial(self, headers: Headers) -> AbstractAsyncContextManager[Link]:
        """Open a node's connection, until the end of the block."""
        ...


def vouched(scope: Scope, cluster: str) -> list[tuple[bytes, bytes]]:
    """What a relay says of whoever it passes on: its cluster, and which certificate was shown to it."""
    shown = (scope.get("extensions") or {}).get(PEER_EXTENSION)
    said = [(CLUSTER_HEADER.encode(), cluster.encode())]
    if isinstance(shown, PeerCertificate):
        said.append((NODE_HEADER.encode(), node_header(shown).encode("ascii", "replace")))
    return said
