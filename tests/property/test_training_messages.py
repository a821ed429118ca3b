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


def test_later_changes_do_not_reach_what_was_encoded() -> None:
    array = np.zeros(3)
    encoded = encode_arrays([array])
    array += 1
    pipe = _Pipe()
    Stream(pipe, pipe).send_encoded("train", {}, encoded)
    np.testing.assert_array_equal(Stream(pipe, pipe).receive().arrays[0], np.zeros(3))


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


def test_what_is_not_a_message_is_refused() -> None:
    pipe = _Pipe()
    pipe.write_with_metadata(encode_arrays([]).batches[0], b'{"arrays": []}')
    with pytest.raises(FlopsError) as caught:
        Stream(pipe, pipe).receive()
    assert caught.value.code is ErrorCode.UNREACHABLE
