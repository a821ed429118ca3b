"""A client of ML data servers: sends, lists, reads and drops data over Arrow Flight."""

from __future__ import annotations

import contextlib
import json
import ssl
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
from pyarrow import flight

from flops.core.address import split_port
from flops.core.cluster import DataTag
from flops.core.dataset import Stored, TagDescription, TagLimits
from flops.errors import ErrorCode, FlopsError
from flops.wire.cluster_tls import dialled_in_vain
from flops.wire.flight import (
    DEFAULT_PORT,
    PACED,
    SEALED,
    TAKEN,
    Action,
    Query,
    bearer,
    check_tag,
    fragment_name,
    parse_error,
    seal,
    ticket_for,
)
from flops.wire.keepalive import keep_connections_alive
from flops.wire.server_trust import dial_options, split_trust

ANSWER_TIMEOUT_S = 10.0  # for calls that carry no rows
SCAN_TIMEOUT_S = 600.0  # for statistics over all rows of a tag
_LOOK_S = 3.0  # for what of encryption is wrong
_BATCH_BYTES = 4 * 1_048_576
# What may be on its way to a server that has not taken it in. Without this bound, gRPC's windows grow while a
# busy server does not come to empty them, up to a whole upload.
_AHEAD_BYTES = 4 * _BATCH_BYTES
_FOREIGN_CODES: dict[type[Exception], ErrorCode] = {
    flight.FlightUnavailableError: ErrorCode.UNREACHABLE,
    flight.FlightTimedOutError: ErrorCode.TIMEOUT,
    flight.FlightUnauthenticatedError: ErrorCode.UNAUTHENTICATED,
    flight.FlightUnauthorizedError: ErrorCode.FORBIDDEN,
}


class FlightDataClient:
    """Implements `flops.ports.DataCatalog`, and everything else one can do with a data server.

    The connection is made with the first call. Several threads may use one client.

    Args:
        address: ``host`` or ``host:port`` of the server.
        token: its admin token, or one minted from it, with what the server is known by if it encrypts.
        timeout_s: how long to wait for answers that carry no rows.
    """

    def __init__(self, address: str, token: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self.address = _with_port(address)
        self._host, self._port = split_port(self.address)
        self._token, self._trust = split_trust(token)
        self._timeout_s = timeout_s
        location, options = dial_options(self.address, self._trust)
        try:
            self._client = flight.FlightClient(location, **options)
        except pa.ArrowException as exc:
            raise FlopsError(ErrorCode.USAGE, f"{address!r} is not an address: {exc}.") from exc

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def push(
        self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], tag: str, *, fragment_id: str = ""
    ) -> Stored:
        """Send rows. When this returns, they are durable; when it fails, nothing of them is stored.

        Args:
            schema: of the batches.
            batches: the rows; read one after the other.
            tag: where they belong.
            fragment_id: name of the upload in the tag, replacing an earlier one; named by its content
                without one.

        Raises:
            FlopsError: ``tag_invalid``, ``schema_mismatch``, ``data_empty``, ``quota_exceeded``,
                ``disk_full``, ``upload_incomplete``, ``unreachable``, ``unauthenticated``, ``forbidden``.
        """
        name = fragment_name(check_tag(tag), fragment_id) if fragment_id else check_tag(tag)
        descriptor = flight.FlightDescriptor.for_path(name, SEALED, PACED)
        with self._errors_cross():
            writer, answers = self._client.do_put(descriptor, schema, self._options(None))
            with _closing_also_when_broken(writer):
                rows = 0
                ahead: deque[int] = deque()  # bytes of the batches that the server has not taken in
                for number, piece in enumerate(_pieces(batches)):
                    writer.write_batch(piece)
                    rows += piece.num_rows
                    if number == 0:  # now there is a connection
                        keep_connections_alive(self._port)
                    ahead.append(piece.nbytes)
                    while sum(ahead) > _AHEAD_BYTES:
                        _read_answer(answers)
                        ahead.popleft()
                writer.write_metadata(pa.py_buffer(seal(rows)))
                writer.done_writing()
                answer = TAKEN
                while answer == TAKEN:
                    answer = _read_answer(answers)
        return Stored.model_validate_json(answer)

    def tags(self) -> list[DataTag]:
        """Every tag that the token may read, with its rows, bytes, columns and last write.

        Raises:
            FlopsError: ``unreachable``, ``unauthenticated``, ``forbidden``.
        """
        raw = self._act(Action.STATUS, {})
        return [DataTag.model_validate(tag) for tag in raw["tags"]]

    def describe(self, tag: str, *, is_with_statistics: bool = False) -> TagDescription:
        """Everything known about a tag.

        Args:
            tag: the tag.
            is_with_statistics: have the server scan all rows of the tag.

        Raises:
            FlopsError: ``tag_not_found``.
        """
        timeout_s = SCAN_TIMEOUT_S if is_with_statistics else None
        body = {"tag": tag, "is_with_statistics": is_with_statistics}
        return TagDescription.model_validate(self._act(Action.DESCRIBE, body, timeout_s=timeout_s))

    def read(
        self, tags: Sequence[str], *, part: int = 0, parts: int = 1
    ) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Read the rows of some tags, or the `part`-th of `parts` disjoint parts of them.

        Raises:
            FlopsError: ``tag_not_found`` when no tag has data, ``schema_mismatch`` when the tags do not fit.
        """
        return self._read(ticket_for(Query(tuple(tags), part, parts)))

    def read_fragment(self, tag: str, fragment_id: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Read one upload.

        Raises:
            FlopsError: ``fragment_not_found``, ``fragment_damaged``.
        """
        return self._read(fragment_name(tag, fragment_id).encode())

    def drop_tag(self, tag: str) -> int:
        """Remove all data of a tag, not its limits; returns how many uploads that were.

        Raises:
            FlopsError: ``tag_not_found``.
        """
        return int(self._act(Action.DROP_TAG, {"tag": tag})["fragments"])

    def drop_fragment(self, tag: str, fragment_id: str) -> None:
        """Remove one upload.

        Raises:
            FlopsError: ``fragment_not_found``.
        """
        self._act(Action.DROP_FRAGMENT, {"name": fragment_name(tag, fragment_id)})

    def set_retention(
        self, tag: str, *, max_rows: int | None = None, max_bytes: int | None = None
    ) -> TagLimits:
        """Keep only the newest data of a tag, at once and from now on; none stands for unlimited."""
        body = {"tag": tag, "max_rows": max_rows, "max_bytes": max_bytes}
        return TagLimits.model_validate(self._act(Action.SET_RETENTION, body))

    def set_quota(self, tag: str, *, max_rows: int | None = None, max_bytes: int | None = None) -> TagLimits:
        """Have uploads refused that would make the tag larger than this; none stands for unlimited."""
        body = {"tag": tag, "max_rows": max_rows, "max_bytes": max_bytes}
        return TagLimits.model_validate(self._act(Action.SET_QUOTA, body))

    def _act(self, action: Action, body: Any, *, timeout_s: float | None = None) -> Any:
        with self._errors_cross():
            request = flight.Action(action.value, json.dumps(body).encode())
            answers = list(self._client.do_action(request, self._options(timeout_s or self._timeout_s)))
        return json.loads(answers[0].body.to_pybytes())

    def _read(self, ticket: bytes) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        with self._errors_cross():
            reader = self._client.do_get(flight.Ticket(ticket), self._options(None))
            schema = reader.schema
            keep_connections_alive(self._port)
        return schema, self._batches(reader)

    def _batches(self, reader: flight.FlightStreamReader) -> Iterator[pa.RecordBatch]:
        try:
            with self._errors_cross():
                for chunk in reader:
                    if chunk.data is not None:
                        yield chunk.data
        finally:
            reader.cancel()

    def _options(self, timeout_s: float | None) -> flight.FlightCallOptions:
        return flight.FlightCallOptions(timeout=timeout_s, headers=[bearer(self._token)])

    @contextlib.contextmanager
    def _errors_cross(self) -> Iterator[None]:
        try:
            yield
        except pa.ArrowException as exc:
            raise self._translated(exc) from exc

    def _translated(self, exc: Exception) -> FlopsError:
        found = parse_error(str(exc))
        if found is not None:
            return found
        reason = str(exc).partition(". gRPC client debug context")[0]
        code = next((code for kind, code in _FOREIGN_CODES.items() if isinstance(exc, kind)), None)
        if code is ErrorCode.UNREACHABLE:
            if (problem := self._encryption_problem()) is not None:
                return problem
            return FlopsError(code, f"The data server at {self.address} does not answer: {reason}.")
        if code is None:
            code = ErrorCode.INTERNAL
        return FlopsError(code, f"The data server at {self.address} failed: {reason}.")

    def _encryption_problem(self) -> FlopsError | None:
        """What of encryption is wrong; gRPC says no more than that there is no connection."""
        trust, tls = self._trust, None
        if trust is not None:
            tls = ssl.create_default_context(cadata=trust.authority)
        name, expected = "" if trust is None else trust.name, "the data server that the token is for"
        found = dialled_in_vain(self._host, self._port, tls, name, expected, _LOOK_S)
        if found is not None:
            found.hint = "Use a token that `flops data token` has made on the machine of the node lately."
        return found


@contextlib.contextmanager
def _closing_also_when_broken(writer: flight.FlightStreamWriter) -> Iterator[None]:
    """Close the writer: the server's refusal comes out there, and says more than what a write met before."""
    try:
        yield
    except pa.ArrowException:
        writer.close()
        raise
    except BaseException:
        with contextlib.suppress(pa.ArrowException):
            writer.close()  # without its seal, the server stores nothing
        raise
    else:
        writer.close()


def _read_answer(answers: flight.FlightMetadataReader) -> bytes:
    answer = answers.read()
    if answer is None:  # closing the writer says why
        raise flight.FlightServerError("The upload was ended.")
    return bytes(answer.to_pybytes())


def _pieces(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches, cut where they are too large to be sent and held at once."""
    for batch in batches:
        step = max(1, batch.num_rows * _BATCH_BYTES // max(1, batch.nbytes))
        for start in range(0, batch.num_rows, step):
            yield batch if step >= batch.num_rows else batch.slice(start, step)


def _with_port(address: str) -> str:
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and not (":" in host and not host.startswith("[")):
        return address
    if ":" in address and not address.startswith("["):
        return f"[{address}]:{DEFAULT_PORT}"
    return f"{address}:{DEFAULT_PORT}"
