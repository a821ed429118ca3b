"""A node's WebSocket connection: messages in, in order and one at a time; messages out, from any thread."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from threading import Lock
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from flops.core.admission import Caller
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.cluster import ClusterOrchestrator, NodeSession
from flops.orchestrator.port_guard import caller_of, invalid_from_node
from flops.wire.node import FROM_NODE, FromCluster, FromNode, Hello, Refused

HELLO_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 10.0  # a node that takes no message for so long is cut off
QUEUE_LIMIT = 1000  # messages waiting for a slow node; more of them end the connection
_POLICY_VIOLATION = 1008

_log = logging.getLogger(__name__)

T = TypeVar("T")
Call = Callable[[Callable[[], T]], Awaitable[T]]  # runs a function in a thread


class SocketLink:
    """Implements `flops.orchestrator.cluster.NodeLink`; the task `pump` does the sending, and ends with it.

    Args:
        websocket: an accepted connection, on the running loop.
        limit: how many messages may wait.
    """

    def __init__(self, websocket: WebSocket, limit: int = QUEUE_LIMIT) -> None:
        self._websocket = websocket
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._lock = Lock()
        self._waiting: deque[str] = deque()
        self._close_reason: str | None = None
        self._changed = asyncio.Event()
        self.pump = asyncio.create_task(self._send_all())

    def send(self, message: FromCluster) -> None:
        """Queue a message; nothing happens when the connection is closing."""
        text = message.model_dump_json()
        with self._lock:
            if self._close_reason is not None:
                return
            is_full = len(self._waiting) >= self._limit
            if is_full:
                self._close_reason = f"the node does not take its messages ({self._limit} wait)"
                self._waiting.clear()
                _log.warning("a connection is cut off: %s", self._close_reason)
            else:
                self._waiting.append(text)
        self._call_soon(self.pump.cancel if is_full else self._changed.set)

    def close(self, reason: str) -> None:
        """End the connection after what is queued has been sent."""
        with self._lock:
            if self._close_reason is None:
                self._close_reason = reason
        self._call_soon(self._changed.set)

    async def _send_all(self) -> None:
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                if await self._drain():
                    return
        except (WebSocketDisconnect, TimeoutError):
            return

    async def _drain(self) -> bool:
        while True:
            with self._lock:
                text = self._waiting.popleft() if self._waiting else None
                reason = self._close_reason
            if text is not None:
                await asyncio.wait_for(self._websocket.send_text(text), SEND_TIMEOUT_S)
            elif reason is not None:
                closing = self._websocket.close(code=_POLICY_VIOLATION, reason=_close_text(reason))
                await asyncio.wait_for(closing, SEND_TIMEOUT_S)
                return True
            else:
                return False

    def _call_soon(self, callback: Callable[[], object]) -> None:
        # The loop may be closed already while threads still talk to a node: then nobody listens any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)


async def serve_node(websocket: WebSocket, orchestrator: ClusterOrchestrator, call: Call[Any]) -> None:
    """Serve a node's connection until it ends.

    Connections of web pages are not accepted: a browser would let any page join as a node.

    Args:
        websocket: the connection, not accepted yet.
        orchestrator: takes in what the node says.
        call: runs a function in a thread, so that the loop never waits for the disk.
    """
    if "origin" in websocket.headers:
        await websocket.close(code=_POLICY_VIOLATION)
        return
    await websocket.accept()
    link = SocketLink(websocket)
    session: NodeSession | None = None
    try:
        hello = await _next_message(websocket, link.pump, timeout_s=HELLO_TIMEOUT_S)
        if hello is not None:
            caller = caller_of(websocket.scope)
            session = await call(functools.partial(_connect, orchestrator, hello, link, caller))
            await _take_messages(websocket, link.pump, orchestrator, session, call)
    except FlopsError as error:
        _log.warning("the connection of a node is refused: %s", error)
        link.send(Refused(error=error.to_dict()))
        link.close(error.message)
    except WebSocketDisconnect:
        link.close("the node closed the connection")
    except Exception:  # noqa: BLE001 (one node's defect must not reach the others; it is logged whole)
        _log.exception("the connection of a node ends by a defect")
        link.close("internal error")
    finally:
        if session is not None:
            await call(functools.partial(orchestrator.disconnect, session))
        link.close("the connection has ended")
        await asyncio.wait({link.pump})


async def _take_messages(
    websocket: WebSocket,
    pump: asyncio.Task[None],
    orchestrator: ClusterOrchestrator,
    session: NodeSession,
    call: Call[Any],
) -> None:
    while (message := await _next_message(websocket, pump)) is not None:
        await call(functools.partial(orchestrator.receive, session, message))


async def _next_message(
    websocket: WebSocket, pump: asyncio.Task[None], *, timeout_s: float | None = None
) -> FromNode | None:
    """The node's next message; None when our side has closed the connection."""
    receive = asyncio.create_task(websocket.receive())
    done, _ = await asyncio.wait({receive, pump}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if receive not in done:
        receive.cancel()
        if pump in done:
            return None
        raise FlopsError(ErrorCode.TIMEOUT, f"The node said no hello within {timeout_s} s.")
    raw = receive.result()
    if raw["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(raw.get("code", 1006))
    return _parse(raw.get("text"))


def _parse(text: str | None) -> FromNode:
    if text is None:
        raise FlopsError(ErrorCode.USAGE, "The node sent a binary message; messages are JSON texts.")
    try:
        return FROM_NODE.validate_json(text)
    except ValidationError as exc:
        raise invalid_from_node(exc, "The node sent a message that", whole="the message") from exc


def _connect(
    orchestrator: ClusterOrchestrator, message: FromNode, link: SocketLink, caller: Caller
) -> NodeSession:
    if not isinstance(message, Hello):
        raise FlopsError(ErrorCode.USAGE, f"The node's first message is {message.type}, not hello.")
    return orchestrator.connect(message, link, caller)


def _close_text(reason: str) -> str:
    """A close frame holds at most 123 bytes of reason."""
    return reason.encode()[:120].decode(errors="ignore")
