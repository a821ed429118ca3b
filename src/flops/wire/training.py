"""How an aggregator and its learners talk: one Arrow Flight `DoExchange` stream per learner.

The learner dials, says hello, and stays. A message is a JSON header with any number of arrays, sent as one or
more record batches with the single column `SCHEMA`: a row is an array, or a piece of a large one; the header
travels as the first batch's application metadata. The aggregator sends ``train``, ``evaluate`` and ``stop``;
a learner sends ``hello`` first, and then one ``reply`` to each ``train`` and ``evaluate``.

| header | sent by | fields |
|---|---|---|
| hello | learner | ``learner``, ``node``, ``rows``; ``error`` when it could not load its data or code |
| hello | learner | ``learner``, ``node``, ``is_loading``: it loads; the connection is for that alone |
| loading | learner | ``rows`` that have come so far; after such a hello, again and again |
| loaded | learner | nothing: its loading is done, whatever came of it |
| train | aggregator | ``id``, ``round``, ``config`` (of the strategy); arrays: the global parameters |
| evaluate | aggregator | ``id``, ``round``, ``config``; arrays: the global parameters |
| reply | learner | ``id``, ``rows``, ``metrics``, ``seconds``, or ``error``; arrays: of ``train`` only |
| stop | aggregator | nothing: the training is over |

The aggregator of a cluster is a learner to the one above it. Its reply has also ``cluster``, its name,
and after ``train`` ``rounds``: the records of the rounds that it ran.

This module is part of the actor kit: it imports the standard library, numpy and pyarrow only.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flops.errors import ErrorCode, FlopsError

Array = npt.NDArray[Any]

HELLO, TRAIN, EVALUATE, REPLY, STOP = "hello", "train", "evaluate", "reply", "stop"
LOADING, LOADED = "loading", "loaded"
DESCRIPTOR = b"flops-training"
SCHEMA = pa.schema([pa.field("array", pa.large_binary(), nullable=False)])
PIECE_BYTES = 64 * 2**20  # larger arrays are sent in pieces: bounded copies, far below gRPC's 2 GiB a message
_NUMERIC_KINDS = "biufc"


class BatchWriter(Protocol):
    """What is needed of `pyarrow.flight.MetadataRecordBatchWriter`."""

    def write_with_metadata(self, batch: pa.RecordBatch, metadata: bytes) -> None:
        """Send a batch with application metadata."""
        ...


class BatchReader(Protocol):
    """What is needed of `pyarrow.flight.MetadataRecordBatchReader`."""

    def read_chunk(self) -> Any:
        """Wait for the next batch with its metadata; StopIteration at the end of the stream."""
        ...


@dataclass
class Message:
    """A header and arrays. Arrays of a received message are read-only views into what was received."""

    type: str
    header: dict[str, Any] = field(default_factory=dict)
    arrays: list[Array] = field(default_factory=list)


@dataclass(frozen=True)
class Encoded:
    """A message's arrays, ready to be sent to many with different headers."""

    specs: tuple[dict[str, Any], ...]
    batches: tuple[pa.RecordBatch, ...]


class Stream:
    """Sends and receives messages over a Flight stream. One thread may send while another one receives."""

    def __init__(self, reader: BatchReader, writer: BatchWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message whole."""
        self.send_encoded(message.type, message.header, encode_arrays(message.arrays))

    def send_encoded(self, kind: str, header: dict[str, Any], encoded: Encoded) -> None:
        """Send a message whose arrays are encoded already."""
        first = json.dumps(
            {**header, "type": kind, "arrays": encoded.specs, "batches": len(encoded.batches)}
        ).encode()
        with self._sending:
            for number, batch in enumerate(encoded.batches):
                self._writer.write_with_metadata(batch, first if number == 0 else b"{}")

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            EOFError: the other side has ended the stream.
            FlopsError: ``unreachable`` when what came is not a message of this protocol.
        """
        batch, header = self._read()
        batches = [batch]
        for _ in range(int(header.get("batches", 1)) - 1):
            batches.append(self._read()[0])
        try:
            kind, specs = str(header.pop("type")), header.pop("arrays")
            return Message(kind, header, _decode_arrays(specs, batches))
        except (KeyError, TypeError, ValueError) as exc:
            raise FlopsError(ErrorCode.UNREACHABLE, f"A training message is malformed: {exc!r}.") from exc

    def _read(self) -> tuple[pa.RecordBatch, dict[str, Any]]:
        try:
            chunk = self._reader.read_chunk()
        except StopIteration as exc:
            raise EOFError("the stream has ended") from exc
        metadata = chunk.app_metadata
        header = json.loads(metadata.to_pybytes()) if metadata is not None else {}
        return chunk.data, header


def encode_arrays(arrays: Sequence[Array]) -> Encoded:
    """Encode arrays for sending; they may be changed afterwards.

    Raises:
        FlopsError: ``aggregation_failed`` when an array is not numeric.
    """
    specs: list[dict[str, Any]] = []
    rows: list[memoryview] = []
    for number, array in enumerate(arrays):
        if array.dtype.kind not in _NUMERIC_KINDS:
            raise FlopsError(
                ErrorCode.AGGREGATION_FAILED,
                f"Array {number} has the type {array.dtype}, which is not numeric.",
                hint="Model parameters are a list of arrays of numbers.",
            )
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        pieces = [raw[start : start + PIECE_BYTES] for start in range(0, len(raw), PIECE_BYTES)]
        specs.append({"dtype": array.dtype.str, "shape": list(array.shape), "pieces": len(pieces)})
        rows.extend(pieces)
    batches = [_to_batch(group) for group in _groups(rows)]
    return Encoded(tuple(specs), tuple(batches or [_to_batch([])]))


def _groups(rows: list[memoryview]) -> Iterator[list[memoryview]]:
    group: list[memoryview] = []
    size = 0
    for row in rows:
        if group and size + len(row) > PIECE_BYTES:
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row)
    if group:
        yield group


def _to_batch(rows: list[memoryview]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(rows, type=pa.large_binary())], schema=SCHEMA)


def _decode_arrays(specs: list[dict[str, Any]], batches: list[pa.RecordBatch]) -> list[Array]:
    rows = [row for batch in batches for row in _rows_of(batch.column(0))]
    arrays: list[Array] = []
    position = 0
    for spec in specs:
        pieces = rows[position : position + spec["pieces"]]
        position += spec["pieces"]
        raw = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.uint8), *pieces])
        arrays.append(raw.view(np.dtype(spec["dtype"])).reshape(spec["shape"]))
    if position != len(rows):
        raise ValueError(f"{len(rows)} rows for {position} pieces of arrays")
    return arrays


def _rows_of(column: Any) -> list[Array]:
    """Views of a large_binary column's rows, without copying them."""
    if len(column) == 0:
        return []
    _, offset_buffer, data = column.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    everything = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return [everything[start:end] for start, end in itertools.pairwise(offsets)]
