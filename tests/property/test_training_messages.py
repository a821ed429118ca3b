"""What is sent arrives: all numeric arrays of all shapes, whole or in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from flops.errors import ErrorCode, FlopsError
from flops.wire import training
from flops.wire.training import Array, Message, Stream, encode_arrays

arrays = st.lists(
    numpy_st.arrays(
        st.one_of(
            numpy_st.floating_dtypes(),
            numpy_st.integer_dtypes(),
            numpy_st.unsigned_integer_dtypes(),
            numpy_st.boolean_dtypes(),
            numpy_st.complex_number_dtypes(),
        ),
        numpy_st.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    ),
    max_size=5,
)


class _Chunk:
    def __init__(self, data: pa.RecordBatch, app_metadata: pa.Buffer) -> None:
        self.data = data
        self.app_metadata = app_metadata


class _Pipe:
    """A stream that comes back, through Arrow's own format."""

    def __init__(self) -> None:
        self._chunks: list[_Chunk] = []

    def write_with_metadata(self, batch: pa.RecordBatch, metadata: bytes) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        with pa.ipc.open_stream(sink.getvalue()) as reader:
            self._chunks.append(_Chunk(reader.read_next_batch(), pa.py_buffer(metadata)))

    def waiting_bytes(self) -> int:
        return sum(chunk.data.nbytes for chunk in self._chunks)

    def read_chunk(self) -> _Chunk:
        if not self._chunks:
            raise StopIteration
        return self._chunks.pop(0)


def sent(message: Message) -> Message:
    pipe = _Pipe()
    Stream(pipe, pipe).send(message)
    return Stream(pipe, pipe).receive()


@given(arrays, st.integers(1, 64))
@settings(deadline=None)
def test_arrays_arrive_as_they_were(given_arrays: list[Array], piece_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PIECE_BYTES", piece_bytes)
        received = sent(Message("train", {"round": 3, "config": {"mu": 0.5}}, given_arrays))
    assert received.type == "train"
    assert (received.header["round"], received.header["config"]) == (3, {"mu": 0.5})
    assert len(received.arrays) == len(given_arrays)
    for array, expected in zip(received.arrays, given_arrays, strict=True):
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(array, expected)


def test_strided_arrays_arrive_as_they_look() -> None:
    array = np.arange(24.0).reshape(4, 6)[::2, ::-1]
    np.testing.assert_array_equal(sent(Message("reply", {}, [array, array.T])).arrays[1], array.T)


def test_large_arrays_are_not_copied_to_be_sent() -> None:
    array = np.zeros(2 * training.PIECE_BYTES, np.uint8)
    first, second = (batch.column(0).buffers()[2] for batch in encode_arrays([array]).batches)
    assert (first.address, second.address) == (array.ctypes.data, array.ctypes.data + training.PIECE_BYTES)


def test_a_training_from_what_was_evaluated_has_no_arrays() -> None:
    encoded, other = encode_arrays([np.arange(1000.0)]), encode_arrays([np.ones(1000)])
    pipe = _Pipe()
    stream = Stream(pipe, pipe)
    told = [
        ("evaluate", encoded),
        ("train", encoded),
        ("train", encoded),
        ("evaluate", encoded),
        ("train", other),
    ]
    sizes = []
    for kind, arrays in told:
        stream.send_encoded(kind, {}, arrays)
        sizes.append(pipe.waiting_bytes())
        received = stream.receive()
        assert received.type == kind
        np.testing.assert_array_equal(
            received.arrays[0], np.ones(1000) if arrays is other else np.arange(1000.0)
        )
    assert [size >= 8000 for size in sizes] == [True, False, True, True, True]


def test_arrays_that_nobody_kept_are_refused() -> None:
    encoded = encode_arrays([np.ones(3)])
    pipe, empty = _Pipe(), _Pipe()
    sender = Stream(empty, pipe)
    sender.send_encoded("evaluate", {}, encoded)
    sender.send_encoded("train", {}, encoded)
    pipe.read_chunk()
    with pytest.raises(FlopsError) as caught:
        Stream(pipe, empty).receive()
    assert caught.value.code is ErrorCode.UNREACHABLE


def test_the_size_is_told_before_the_arrays_are_read() -> None:
    pipe = _Pipe()
    Stream(pipe, pipe).send(Message("reply", {}, [np.ones(2 * training.PIECE_BYTES, np.uint8), np.ones(5)]))
    seen: list[tuple[int, bool]] = []
    received = Stream(pipe, pipe).receive(lambda size: seen.append((size, pipe.waiting_bytes() > 0)))
    assert seen == [(2 * training.PIECE_BYTES + 40, True)]
    received.arrays[0] += 1  # it is the receiver's
    assert pipe.waiting_bytes() == 0


@pytest.mark.parametrize(
    "array", [np.array(["a"]), np.array([None]), np.array(["2020-01-01"], "datetime64[D]")]
)
def test_arrays_without_numbers_are_refused(array: Any) -> None:
    with pytest.raises(FlopsError) as caught:
        encode_arrays([array])
    assert caught.value.code is ErrorCode.AGGREGATION_FAILED


def test_the_end_of_the_stream_is_not_a_message() -> None:
    pipe = _Pipe()
    with pytest.raises(EOFError):
        Stream(pipe, pipe).receive()


@pytest.mark.parametrize(
    "header",
    [
        b'{"arrays": []}',
        b'{"type": "reply", "arrays": [{"dtype": "<f8", "shape": [4], "pieces": 1}]}',
        b'{"type": "reply", "arrays": [{"dtype": "<f8", "shape": [-1], "pieces": 1}]}',
        b'{"type": "reply", "arrays": [{"dtype": "<f8", "shape": [9223372036854775807], "pieces": 1}]}',
        b'{"type": "reply", "arrays": []}',
    ],
)
def test_what_is_not_a_message_is_refused(header: bytes) -> None:
    pipe = _Pipe()
    pipe.write_with_metadata(encode_arrays([np.ones(3)]).batches[0], header)
    with pytest.raises(FlopsError) as caught:
        Stream(pipe, pipe).receive()
    assert caught.value.code is ErrorCode.UNREACHABLE
