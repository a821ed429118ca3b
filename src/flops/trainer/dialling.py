"""The way to an aggregator: dialled, greeted, and dialled anew whenever it is gone.

This module is part of the actor kit: it imports the standard library, numpy and pyarrow only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import flight

from flops.errors import ErrorCode, FlopsError
from flops.wire.flight import aggregator_name, bearer
from flops.wire.keepalive import keep_connections_alive
from flops.wire.server_trust import ServerTrust, dial_options
from flops.wire.training import DESCRIPTOR, HELLO, SCHEMA, Message, Stream

LOST = (flight.FlightError, pa.ArrowException, EOFError, OSError)  # what a broken connection raises
FIRST_BACK_OFF_S = 0.05
_LONGEST_BACK_OFF_S = 1.0
_TELL_FAILURE_S = 5.0  # how long an aggregator is looked for to tell it that nobody will join


@dataclass(frozen=True)
class Dial:
    """How to reach the aggregator, and who says hello."""

    address: str
    token: str
    learner: str
    node: str
    project_id: str = ""
    authority: str = ""  # of the cluster, PEM; "" where it does not encrypt

    def _client(self) -> flight.FlightClient:
        """By TLS, the aggregator is known by its project's name, signed by the cluster, at any address."""
        trust = ServerTrust(aggregator_name(self.project_id), self.authority) if self.authority else None
        location, options = dial_options(self.address, trust)
        return flight.FlightClient(location, **options)

    @contextlib.contextmanager
    def connect(self, hello: dict[str, Any]) -> Iterator[Stream]:
        """Open the stream and say hello."""
        options = flight.FlightCallOptions(headers=[bearer(self.token)])
        with self._client() as client:
            writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(DESCRIPTOR), options)
            try:
                stream = Stream(reader, writer)
                try:
                    writer.begin(SCHEMA)
                    stream.send(Message(HELLO, {"learner": self.learner, "node": self.node, **hello}))
                except LOST:
                    stream.receive()  # raises why the aggregator has ended the call
                    raise
                keep_connections_alive(int(self.address.rpartition(":")[2]))
                yield stream
            finally:
                with contextlib.suppress(*LOST):
                    reader.cancel()
                with contextlib.suppress(*LOST):
                    writer.close()

    def stay(self, hello: Callable[[], dict[str, Any]], serve: Callable[[Stream], None]) -> None:
        """Serve the aggregator over one connection after the other, until `serve` returns.

        Args:
            hello: further fields of the greeting, asked for with every dial.
            serve: answers over a connection; a broken one is its to raise.

        Raises:
            FlopsError: ``unauthenticated`` when the aggregator refuses the token.
        """
        back_off_s = FIRST_BACK_OFF_S
        while True:
            started = time.monotonic()
            try:
                with self.connect(hello()) as stream:
                    serve(stream)
                return
            except flight.FlightUnauthenticatedError as exc:
                raise FlopsError(
                    ErrorCode.UNAUTHENTICATED,
                    f"The aggregator at {self.address} refuses the token of {self.learner}.",
                    hint="Another project's aggregator may have taken the address; "
                    "this learner is started anew.",
                ) from exc
            except LOST:
                if time.monotonic() - started > _LONGEST_BACK_OFF_S:
                    back_off_s = FIRST_BACK_OFF_S
            time.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, _LONGEST_BACK_OFF_S)

    def tell_failure(self, error: FlopsError) -> None:
        """Tell the aggregator, if it is there, why nobody will join: it may be waiting."""
        deadline = time.monotonic() + _TELL_FAILURE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(*LOST), self.connect({"rows": 0, "error": error.to_dict()}) as stream:
                stream.receive()  # the aggregator's answer: it has taken it in
                return
            time.sleep(FIRST_BACK_OFF_S * 4)
