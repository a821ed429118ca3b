"""The aggregator's end of the connections to its learners: who is joined, is busy, has answered what."""

from __future__ import annotations

import contextlib
import hmac
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import flight

from flops.errors import ErrorCode, FlopsError
from flops.wire.cluster_tls import key_and_certificate
from flops.wire.flight import AUTHORIZATION
from flops.wire.keepalive import keep_connections_alive
from flops.wire.training import (
    HELLO,
    LOADED,
    REPLY,
    SCHEMA,
    STOP,
    Encoded,
    Message,
    Stream,
    encode_arrays,
)

_LOST = (flight.FlightError, pa.ArrowException, EOFError, OSError, FlopsError)
_NOTHING = encode_arrays([])
_HELD_BYTES = 256 * 2**20  # of answers in memory; further ones are left with their learners


@dataclass(frozen=True)
class Instruction:
    """What one learner is asked; `encoded` may be shared by many."""

    kind: str
    header: dict[str, Any]
    encoded: Encoded


@dataclass(eq=False)
class Link:
    """A joined learner, one object per connection. Its fields are guarded by the server's condition."""

    learner: str
    node: str
    rows: int
    stream: Stream
    is_open: bool = True
    asked: int | None = None  # id of the instruction that is not answered yet
    is_awaited: bool = False  # whether anybody still waits for that answer
    to_send: tuple[int, Instruction] | None = None
    sender_wakes: threading.Event = field(default_factory=threading.Event)  # only it: there are many
    answers: dict[int, Message] = field(default_factory=dict)
    held_bytes: int = 0  # that its answer takes here
    waits_for_room: bool = False
    left_because: str = ""


@dataclass
class Loader:
    """A learner that loads its code and data, and has not joined."""

    learner: str
    node: str
    rows: int = 0  # that have come so far
    progressed_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Request:
    """An instruction on its way to one learner, over the connection it had then."""

    link: Link
    number: int

    @property
    def is_settled(self) -> bool:
        """Whether it is answered, or never will be; looked at under the server's condition."""
        return not self.link.is_open or self.number in self.link.answers


class LearnerServer:
    """Where learners join. All methods may be called from any thread.

    Args:
        host: address to listen on.
        port: port to listen on, 0 for any.
        token: what learners must show.
        identity: file with key and certificate to encrypt with; "" not to.
        on_join: called when a learner has joined.
        on_leave: called when a learner's connection has ended, with the reason.
        on_lost_loader: called when a learner has gone while it loaded.

    Raises:
        FlopsError: ``port_occupied``.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: str,
        *,
        identity: str = "",
        on_join: Callable[[Link], None] = lambda _: None,
        on_leave: Callable[[Link, str], None] = lambda _link, _reason: None,
        on_lost_loader: Callable[[Loader], None] = lambda _: None,
    ) -> None:
        self._changed = threading.Condition()  # re-entrant: conditions may call methods
        self._links: dict[str, Link] = {}
        self._loaders: dict[str, Loader] = {}
        self._refusals: dict[str, tuple[str, FlopsError]] = {}
        self._known: set[str] = set()
        self._ids = itertools.count(1)
        self._is_over = False
        self._is_closing = False
        self._on_join = on_join
        self._on_leave = on_leave
        self._on_lost_loader = on_lost_loader
        try:
            self._server = _FlightServer((host, port, identity), token, self._host_learner)
        except (pa.ArrowException, flight.FlightError, OSError) as exc:
            raise FlopsError(
                ErrorCode.PORT_OCCUPIED, f"The aggregator cannot listen on {host}:{port}: {exc}."
            ) from exc
        self.port = int(self._server.port)

    def joined(self) -> list[Link]:
        """The learners that are joined now, by service id."""
        with self._changed:
            return [self._links[name] for name in sorted(self._links)]

    def idle(self) -> list[Link]:
        """The joined learners that have answered everything they were asked."""
        with self._changed:
            return [link for link in self._in_order() if link.asked is None]

    def loaders(self) -> list[Loader]:
        """The learners that load now, as they stand now."""
        with self._changed:
            return [replace(self._loaders[name]) for name in sorted(self._loaders)]

    def refusals(self) -> dict[str, tuple[str, FlopsError]]:
        """Learners that could not load code or data: their node and error, until they join after all."""
        with self._changed:
            return dict(self._refusals)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition on the learners holds; returns whether it does."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def wake(self) -> None:
        """Have waiting conditions looked at anew."""
        with self._changed:
            self._changed.notify_all()

    def away(self) -> set[str]:
        """The learners that were joined and may come back."""
        with self._changed:
            return self._known - set(self._links) - set(self._refusals)

    def send(self, instructions: Iterable[tuple[Link, Instruction]]) -> list[Request]:
        """Have learners sent their instructions; each is busy until it answers."""
        requests = []
        with self._changed:
            for link, instruction in instructions:
                request = Request(link, next(self._ids))
                link.asked, link.to_send = request.number, (request.number, instruction)
                link.sender_wakes.set()
                link.answers.clear()
                link.held_bytes, link.is_awaited = 0, True
                requests.append(request)
            self._changed.notify_all()
        return requests

    def take(self, request: Request) -> tuple[Message | None, str]:
        """The answer to a request, or None with the reason.

        The reason is empty when it is not settled. Then nobody waits for it any more, and it will be dropped.
        """
        with self._changed:
            link = request.link
            answer = link.answers.pop(request.number, None)
            link.is_awaited = False
            self._changed.notify_all()
            return answer, link.left_because if answer is None and not link.is_open else ""

    def free(self, learner: str) -> None:
        """Count a learner's answer as gone from memory, or as nobody's to wait for."""
        with self._changed:
            if learner in self._links:
                self._links[learner].held_bytes = 0
                self._changed.notify_all()

    def is_crowded(self) -> bool:
        """Whether answers wait for memory that others take."""
        with self._changed:
            return any(link.waits_for_room for link in self._links.values())

    def stop(self, *, is_over: bool = True, grace_s: float = 2.0) -> None:
        """Stop listening.

        Args:
            is_over: tell all learners that the training is over, so that they end. Otherwise they stay and
                dial again, for an aggregator that is started anew.
            grace_s: how long the learners' and the server's end are waited for.
        """
        with self._changed:
            self._is_over, self._is_closing = is_over, True
            for link in self._links.values():
                link.sender_wakes.set()
            self._changed.notify_all()
            if is_over:
                self._changed.wait_for(lambda: not self._links, grace_s)
        # A connection that does not end would keep `shutdown` waiting for good.
        closer = threading.Thread(target=self._server.shutdown, name="stop-listening", daemon=True)
        closer.start()
        closer.join(grace_s)

    def _in_order(self) -> Iterable[Link]:
        return [self._links[name] for name in sorted(self._links)]

    def _host_learner(self, stream: Stream) -> None:
        """Serve one connection, in the thread of its call, until it ends."""
        keep_connections_alive(self.port)
        with contextlib.suppress(*_LOST):
            hello = stream.receive()
            if hello.type != HELLO:
                return
            if hello.header.get("error"):
                self._take_refusal(hello.header)
                stream.send(Message(STOP))
                return
            if hello.header.get("is_loading"):
                self._host_loader(Loader(str(hello.header["learner"]), str(hello.header["node"])), stream)
                return
            link = Link(
                str(hello.header["learner"]), str(hello.header["node"]), int(hello.header["rows"]), stream
            )
            sender = threading.Thread(
                target=self._send_to, args=(link,), name=f"send-{link.learner}", daemon=True
            )
            self._join(link)
            sender.start()
            reason = "its connection ended"
            try:
                while link.is_open:
                    self._take_answer(link, stream.receive(partial(self._await_room, link)))
            except _LOST as exc:
                reason = "its connection ended" if isinstance(exc, EOFError) else _short(exc)
            finally:
                self._leave(link, reason)
                sender.join()  # Flight frees the stream as soon as its call returns

    def _host_loader(self, loader: Loader, stream: Stream) -> None:
        """Follow the heartbeats of a loading learner, until it has loaded or is gone."""
        with self._changed:
            if self._is_closing or loader.learner in self._links:
                return  # a dial that took longer than the loading itself
            self._loaders[loader.learner] = loader
            self._changed.notify_all()
        is_lost = True
        try:
            while is_lost and not self._is_closing:
                message = stream.receive()
                is_lost = message.type != LOADED
                rows = int(message.header.get("rows", loader.rows))
                with self._changed:
                    if rows != loader.rows:
                        loader.rows, loader.progressed_s = rows, time.monotonic()
        finally:
            with self._changed:
                if self._loaders.get(loader.learner) is loader:
                    del self._loaders[loader.learner]
                    if is_lost and not self._is_closing:
                        self._on_lost_loader(loader)
                self._changed.notify_all()

    def _take_refusal(self, header: dict[str, Any]) -> None:
        with self._changed:
            error = FlopsError.from_dict(header["error"])
            self._refusals[str(header["learner"])] = (str(header["node"]), error)
            self._changed.notify_all()

    def _join(self, link: Link) -> None:
        with self._changed:
            earlier = self._links.pop(link.learner, None)
            if earlier is not None:
                earlier.is_open, earlier.left_because = False, "it joined anew"
                earlier.sender_wakes.set()
            self._links[link.learner] = link
            if self._is_closing:
                link.sender_wakes.set()
            self._known.add(link.learner)
            self._refusals.pop(link.learner, None)
            self._on_join(link)
            self._changed.notify_all()

    def _take_answer(self, link: Link, message: Message) -> None:
        with self._changed:
            number = link.asked
            if number is None or message.type != REPLY or message.header.get("id") != number:
                return
            link.asked = None
            if link.is_awaited:
                link.answers[number] = message
            else:
                link.held_bytes = 0
            self._changed.notify_all()

    def _await_room(self, link: Link, size: int) -> None:
        """Have an answer wait on its way while those that are here take too much memory."""
        with self._changed:
            if not self._has_room(link, size):
                link.waits_for_room = True
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: not link.is_open or self._is_closing or self._has_room(link, size)
                )
                link.waits_for_room = False
            link.held_bytes = size

    def _has_room(self, link: Link, size: int) -> bool:
        held = sum(other.held_bytes for other in self._links.values())
        # Of those that are awaited, on their way, or here and not freed, the first is never kept waiting: the
        # others are held for it. A late answer, which nobody waits for, is none of them.
        unfinished = [
            name
            for name, other in self._links.items()
            if other.is_awaited or (other.held_bytes and other.asked is None)
        ]
        is_first = link.is_awaited and link.learner == min(unfinished)
        return not held or held + size <= _HELD_BYTES or is_first

    def _leave(self, link: Link, reason: str) -> None:
        with self._changed:
            is_replaced = self._links.get(link.learner) is not link
            if not is_replaced:
                del self._links[link.learner]
            if link.is_open:
                link.is_open, link.left_because = False, reason
                link.sender_wakes.set()
            if not is_replaced and not self._is_closing:
                self._on_leave(link, reason)
            self._changed.notify_all()

    def _send_to(self, link: Link) -> None:
        """Send a learner's instructions in a thread of its own: a slow network holds up nobody else."""
        while True:
            link.sender_wakes.wait()
            with self._changed:
                link.sender_wakes.clear()
                work, link.to_send = link.to_send, None
                is_idle = work is None and not self._is_over
                if not link.is_open or (is_idle and self._is_closing):
                    return
            if is_idle:
                continue
            try:
                if work is None:
                    link.stream.send_encoded(STOP, {}, _NOTHING)
                    return
                number, instruction = work
                header = {**instruction.header, "id": number}
                link.stream.send_encoded(instruction.kind, header, instruction.encoded)
                del work, instruction  # its arrays are not kept while the learner works
            except _LOST as exc:
                self._leave(link, _short(exc))
                return


def _short(exc: Exception) -> str:
    """The essence of a transport error: gRPC's texts are long and name sources of gRPC."""
    text = str(exc).split("gRPC client debug context")[0].split(". Detail:")[0].strip()
    return f"its connection broke: {text[:200]}"


class _FlightServer(flight.FlightServerBase):  # type: ignore[misc]  # pyarrow has no types
    def __init__(self, where: tuple[str, int, str], token: str, serve: Callable[[Stream], None]) -> None:
        # FlightServerBase listens already inside its constructor.
        self._serve = serve
        host, port, identity = where
        scheme = "grpc+tls" if identity else "grpc"
        certificates = [key_and_certificate(Path(identity).read_text(encoding="ascii"))] if identity else None
        super().__init__(
            f"{scheme}://{host}:{port}",
            tls_certificates=certificates,
            middleware={"token": _TokenCheck(token)},
        )

    def do_exchange(self, _context: Any, _descriptor: Any, reader: Any, writer: Any) -> None:
        writer.begin(SCHEMA)
        self._serve(Stream(reader, writer))


class _TokenCheck(flight.ServerMiddlewareFactory):  # type: ignore[misc]  # pyarrow has no types
    def __init__(self, token: str) -> None:
        super().__init__()
        self._expected = f"Bearer {token}".encode()

    def start_call(self, _info: Any, headers: Any) -> None:
        shown = [value for key, value in headers.items() if key.lower() == AUTHORIZATION]
        value = shown[0][0] if shown and shown[0] else ""
        raw = value if isinstance(value, bytes) else str(value).encode()
        if not hmac.compare_digest(raw, self._expected):
            raise flight.FlightUnauthenticatedError("the learner's token is not the aggregator's")
