"""What a data server holds in memory of an upload, however busy the machine is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from flops.testing.data_server import ServerProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def test_a_large_upload_is_not_held_in_memory(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "dataserver")
    server.start()
    try:
        batch = pa.record_batch({"x": np.random.default_rng(1).random(4_000_000)})  # 32 MB
        process = psutil.Process(server.pid)
        before = process.memory_info().rss
        reader = pa.RecordBatchReader.from_batches(batch.schema, iter([batch] * 16))
        with server.client() as client:
            client.push(reader, "t")
            _, batches = client.stream("t")
            assert sum(batch.num_rows for batch in batches) == 64_000_000
        assert process.memory_info().rss - before < 320_000_000
    finally:
        server.close()
