"""A node's connection, passed on: what either side says reaches the other, until one of them ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from starlette.websockets import WebSocket, WebSocketDisconnect

from flops.errors import FlopsError
from flops.relay.uplink import Link, Uplink, vouched
from flops.wire.node import Refused

_POLICY_VIOLATION = 1008
_HELLO_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


async def pass_link(websocket: WebSocket, uplink: Uplink, cluster: str) -> None:
    """Pass a node's connection on to the manager until it ends.

    Nothing is kept here: what a node tells, it tells again until the manager has acknowledged it.

    Args:
        websocket: the node's, not accepted yet. Those of web pages are not accepted, as by the manager.
        uplink: the way to the manager.
        cluster: the relay's own.
    """
    if "origin" in websocket.headers:
        await websocket.close(code=_POLICY_VIOLATION)
        return
    await websocket.accept()
    why = ""
    try:
        async with uplink.dial(vouched(websocket.scope, cluster)) as link:
            why = await _pass_both_ways(websocket, link)
    except FlopsError as error:
        _log.info("a node is not connected: %s", error)
        why = error.message
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            await asyncio.wait_for(
                websocket.receive(), _HELLO_TIMEOUT_S
            )  # a node listens when it has said hello
            await websocket.send_text(Refused(error=error.to_dict()).model_dump_json())
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it has closed already
        await websocket.close(code=_POLICY_VIOLATION, reason=why.encode()[:120].decode(errors="ignore"))


async def _pass_both_ways(websocket: WebSocket, link: Link) -> str:
    """Returns why it has ended."""
    ways = {asyncio.create_task(_upwards(websocket, link)), asyncio.create_task(_downwards(websocket, link))}
    done, others = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    for way in others:
        way.cancel()
    await asyncio.wait(ways)
    return "; ".join(way.result() for way in done)


async def _upwards(websocket: WebSocket, link: Link) -> str:
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return "the node closed the connection"
        text = message.get("text")
        if text is None:
            return "the node sent a binary message; messages are JSON texts"
        try:
            await link.send(text)
        except FlopsError as error:
            return error.message


async def _downwards(websocket: WebSocket, link: Link) -> str:
    while True:
        try:
            text = await link.receive()
        except FlopsError as error:
            return error.message
        try:
            await websocket.send_text(text)
        except (WebSocketDisconnect, RuntimeError):
            return "the node closed the connection"
