"""What makes two uploads the same: their columns and rows, however they were cut into batches or compressed.

A data server names an upload without a name by it, so that the same content sent twice is stored once.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_ALL_VALID = memoryview(b"\1" * 65_536)


class ContentDigest:
    """SHA-256 over the values of record batches. Metadata does not count, nor does what null slots hold.

    Each kind of byte of each column (validity, lengths, values) has its own hash, so that it makes no
    difference where one batch ends and the next begins.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._columns = [f"{field.name}: {field.type}" for field in schema]
        self._hashes: dict[str, Any] = {}
        self._rows = 0

    def update(self, batch: pa.RecordBatch) -> None:
        """Take in the next rows."""
        self._rows += batch.num_rows
        for index, column in enumerate(batch.columns):
            self._feed(str(index), column)

    def hexdigest(self) -> str:
        """The digest of all rows so far, 64 hex characters."""
        whole = hashlib.sha256(repr((self._columns, self._rows)).encode())
        for path in sorted(self._hashes):
            whole.update(path.encode() + b"=" + self._hashes[path].digest())
        return whole.hexdigest()

    def _feed(self, path: str, array: pa.Array) -> None:
        array = _plain(array)
        has_nulls = array.null_count > 0
        if has_nulls:
            self._add(f"{path}.valid", _fixed_bytes(pc.is_valid(array).cast(pa.uint8())))
        else:  # what that would say, without asking row by row
            for start in range(0, len(array), len(_ALL_VALID)):
                self._add(f"{path}.valid", _ALL_VALID[: len(array) - start])
        if pa.types.is_struct(array.type):
            for index, child in enumerate(array.flatten()):
                self._feed(f"{path}.{index}", child)
            return
        values = array.drop_null() if has_nulls else array
        if len(values) == 0:
            return
        if _is_list(values.type):
            self._add(f"{path}.lengths", _fixed_bytes(pc.list_value_length(values).cast(pa.int64())))
            self._feed(f"{path}.items", values.flatten())
        elif pa.types.is_large_binary(values.type):
            self._add(f"{path}.lengths", _fixed_bytes(pc.binary_length(values)))
            self._add(f"{path}.bytes", _variable_bytes(values))
        else:
            self._add(f"{path}.bytes", _fixed_bytes(values))

    def _add(self, path: str, data: memoryview) -> None:
        self._hashes.setdefault(path, hashlib.sha256()).update(data)


def _plain(array: pa.Array) -> pa.Array:
    """Take off what only says how the values are encoded."""
    while True:
        kind = array.type
        if pa.types.is_floating(kind) or pa.types.is_integer(kind):
            return array
        if isinstance(kind, pa.BaseExtensionType):
            array = array.storage
        elif pa.types.is_dictionary(kind):
            array = array.dictionary_decode()
        elif pa.types.is_run_end_encoded(kind):
            array = pc.run_end_decode(array)
        elif pa.types.is_map(kind):
            entries = pa.struct([("key", kind.key_type), ("value", kind.item_type)])
            array = array.cast(pa.list_(entries))
        elif pa.types.is_boolean(kind):
            array = array.cast(pa.uint8())
        elif _is_text(kind):
            array = array.cast(pa.large_binary())
        else:
            return array


def _is_text(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_binary_view,
    )
    return any(test(kind) for test in tests)


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests)


def _fixed_bytes(array: pa.Array) -> memoryview:
    values = array.buffers()[1]
    if values is None or len(array) == 0:
        return memoryview(b"")
    width = array.type.bit_width // 8
    return memoryview(values)[array.offset * width : (array.offset + len(array)) * width]


def _variable_bytes(array: pa.Array) -> memoryview:
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    return memoryview(data)[int(ends[0]) : int(ends[-1])] if data is not None else memoryview(b"")
