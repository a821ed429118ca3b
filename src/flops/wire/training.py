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

Most trainings go out from what was evaluated before. A learner keeps the arrays of an ``evaluate`` until the
next instruction; when that is a ``train`` with the same ones over the same connection, it has none, and says
``"arrays": "kept"``.

The aggregator of a cluster is a learner to the one above it. Its reply has also ``cluster``, its name,
and after ``train`` ``rounds``: the records of the rounds that it ran.

This module is part of the actor kit: it imports the standard library, numpy and pyarrow only.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
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
PIECE_BYTES = 4 * 2**20  # larger arrays are sent in pieces, which gRPC copies in the processor's cache
_SMALL_BYTES = 64 * 2**10  # arrays up to here are copied and share a batch
_KEPT = "kept"
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
    """A header and arrays. Those of a received message are the receiver's, see `Stream.receive`."""

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
        self._sent: Encoded | None = None  # to be evaluated, with the last message: the other side keeps them
        self._kept: list[Array] | None = None  # received to be evaluated, with the last message

    def send(self, message: Message) -> None:
        """Send a message whole."""
        self.send_encoded(message.type, message.header, encode_arrays(message.arrays))

    def send_encoded(self, kind: str, header: dict[str, Any], encoded: Encoded) -> None:
        """Send a message whose arrays are encoded already."""
        with self._sending:
            is_kept = kind == TRAIN and encoded is self._sent
            self._sent = encoded if kind == EVALUATE else None
            specs, batches = (_KEPT, _NO_BATCHES) if is_kept else (encoded.specs, encoded.batches)
            about = {**header, "type": kind, "arrays": specs, "batches": len(batches)}
            first = json.dumps(about).encode()
            for number, batch in enumerate(batches):
                self._writer.write_with_metadata(batch, first if number == 0 else b"{}")

    def receive(self, admit: Callable[[int], None] = lambda _: None) -> Message:
        """Wait for the next message. Its arrays may be changed, but for those of an ``evaluate``.

        Args:
            admit: is told how many bytes the arrays take before they are read, and may let them wait: so
                long, the other side has them.

        Raises:
            EOFError: the other side has ended the stream.
            FlopsError: ``unreachable`` when what came is not a message of this protocol.
        """
        batch, header = self._read()
        try:
            kind, specs, count = str(header.pop("type")), header.pop("arrays"), int(header.pop("batches", 1))
            kept, self._kept = self._kept, None
            if specs == _KEPT and kept is not None:
                return Message(kind, header, kept)
            admit(sum(_size_of(spec) for spec in specs))
            arrays = _decode_arrays(specs, self._rows(batch, count))
        except (KeyError, TypeError, ValueError, MemoryError) as exc:
            raise FlopsError(ErrorCode.UNREACHABLE, f"A training message is malformed: {exc!r}.") from exc
        if kind == EVALUATE:
            self._kept = arrays
        return Message(kind, header, arrays)

    def _rows(self, first: pa.RecordBatch, batches: int) -> Iterator[Array]:
        """The rows of a message's batches, each read when the ones before are done with."""
        yield from _rows_of(first.column(0))
        del first
        for _ in range(batches - 1):
            yield from _rows_of(self._read()[0].column(0))

    def _read(self) -> tuple[pa.RecordBatch, dict[str, Any]]:
        try:
            chunk = self._reader.read_chunk()
        except StopIteration as exc:
            raise EOFError("the stream has ended") from exc
        metadata = chunk.app_metadata
        header = json.loads(metadata.to_pybytes()) if metadata is not None else {}
        return chunk.data, header


def encode_arrays(arrays: Sequence[Array]) -> Encoded:
    """Encode arrays for sending. They are not copied, and must not change until they are sent.

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
        raw = _bytes_of(np.ascontiguousarray(array)).data
        pieces = [raw[start : start + PIECE_BYTES] for start in range(0, len(raw), PIECE_BYTES)]
        specs.append({"dtype": array.dtype.str, "shape": list(array.shape), "pieces": len(pieces)})
        rows.extend(pieces)
    return Encoded(tuple(specs), tuple(_to_batch(group) for group in _groups(rows)) or _NO_BATCHES)


def _groups(rows: list[memoryview]) -> Iterator[list[memoryview]]:
    """Large rows by themselves, small ones together."""
    group: list[memoryview] = []
    size = 0
    for row in rows:
        if group and size + len(row) > _SMALL_BYTES:
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row)
    if group:
        yield group


def _to_batch(rows: list[memoryview]) -> pa.RecordBatch:
    if len(rows) != 1:
        return pa.record_batch([pa.array(rows, type=pa.large_binary())], schema=SCHEMA)
    offsets = pa.py_buffer(np.array([0, len(rows[0])], np.int64))
    column = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(rows[0])])
    return pa.record_batch([column], schema=SCHEMA)


_NO_BATCHES = (_to_batch([]),)


def _decode_arrays(specs: list[dict[str, Any]], rows: Iterator[Array]) -> list[Array]:
    arrays: list[Array] = []
    for spec in specs:
        array = np.empty(spec["shape"], np.dtype(spec["dtype"]))
        raw, position = _bytes_of(array), 0
        for row in itertools.islice(rows, spec["pieces"]):
            raw[position : position + len(row)] = row
            position += len(row)
        if position != len(raw):
            raise ValueError(f"{position} bytes for an array of {len(raw)}")
        arrays.append(array)
    if next(rows, None) is not None:
        raise ValueError("there are more pieces than arrays")
    return arrays


def _size_of(spec: dict[str, Any]) -> int:
    return int(np.dtype(spec["dtype"]).itemsize * math.prod(spec["shape"]))


def _bytes_of(array: Array) -> npt.NDArray[np.uint8]:
    """A view of a contiguous array's bytes."""
    return array.reshape(-1).view(np.uint8)


def _rows_of(column: Any) -> list[Array]:
    """Views of a large_binary column's rows, without copying them."""
    if len(column) == 0:
        return []
    _, offset_buffer, data = column.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    everything = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return [everything[start:end] for start, end in itertools.pairwise(offsets)]
