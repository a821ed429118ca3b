"""Measures the ML data server: uploads, listing, and reading, against the disk and plain pyarrow.

Run from the root of the repository: ``.venv/bin/python benchmarks/data.py``, or ``make bench-data``. The
server is the real process. What an upload is compared with copies the same bytes, as the fragment holds
them, into a file that is synced to the disk; what reading is compared with reads the same Parquet files
with pyarrow in this process. Rates are of the rows' bytes in memory. Data is written to a folder below the
current one, so that it is a disk and no memory.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from harness import Figure, Report, alternate, arguments, timed

from flops.testing.data_server import ServerProcess
from flops_utils.local_data import DataSource, use_source
from flops_utils.ml_repo_building_blocks import load_table

MB = 1_000_000
COLUMNS = 64
DEVICES = 8  # that send at once, when uploads are small


class Server(ServerProcess):
    """A data server that is measured, for as long as a block runs."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fragments(self, tag: str) -> list[Path]:
        """A tag's fragments."""
        return sorted(self.folder.glob(f"tags/{tag}/*.parquet"))

    @contextmanager
    def peak_memory(self) -> Iterator[list[float]]:
        """The most memory the server has of its own while the block runs, in MB, when it is done."""
        found: list[float] = []
        process = psutil.Process(self.pid)
        is_done = False

        def watch() -> float:
            peak = 0.0
            while not is_done:
                info = process.memory_info()
                peak = max(peak, (info.rss - info.shared) / MB)
                time.sleep(0.01)
            return peak

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            try:
                yield found
            finally:
                is_done = True
                found.append(watching.result())


def rows_of(size: int, seed: int, *, is_text_like: bool) -> pa.Table:
    """A table of `size` bytes: random numbers, which do not compress, or few different ones, which do."""
    random = np.random.default_rng(seed)
    rows = max(1, size // (8 * COLUMNS))
    if is_text_like:
        return pa.table({f"c{n}": random.integers(0, 16, rows) for n in range(COLUMNS)})
    return pa.table({f"c{n}": random.random(rows) for n in range(COLUMNS)})


def ingest(server: Server, tables: list[pa.Table], tag: str, at_once: int) -> float:
    """Seconds until all uploads are acknowledged, which means durable."""
    with server.client() as client, ThreadPoolExecutor(at_once) as pool:
        return timed(lambda: list(pool.map(lambda table: client.push(table, tag), tables)))


def copy_durably(files: list[Path], target: Path, at_once: int) -> float:
    """Seconds to write the same bytes to other files, each synced."""
    contents = [file.read_bytes() for file in files]

    def write(numbered: tuple[int, bytes]) -> None:
        number, content = numbered
        with (target / f"{number}").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(at_once) as pool:
        took_s = timed(lambda: list(pool.map(write, enumerate(contents))))
    for file in target.iterdir():
        file.unlink()
    return took_s


def measure_ingest(
    report: Report, folder: Path, name: str, tables: list[pa.Table], at_once: int, runs: int
) -> None:
    """Add a row on uploading."""
    size = sum(table.nbytes for table in tables)
    copies = folder / "copies"
    copies.mkdir(exist_ok=True)
    tags = iter(f"t{number}" for number in range(runs))
    with Server(folder / name.replace(" ", "-").replace(",", "")) as server:
        ingest(server, tables, "first", at_once)  # pays for imports, and says how large the fragments are
        files = server.fragments("first")
        written = sum(file.stat().st_size for file in files)
        works: dict[str, Callable[[], float]] = {
            "flops": lambda: ingest(server, tables, next(tags), at_once),
            "copy": partial(copy_durably, files, copies, at_once),
        }
        with server.peak_memory() as peak:
            found = alternate(works, runs)
    what = f"{size / MB:.0f} MB ({written / MB:.0f} on disk)"
    add_rates(report, name, what, size, (found["flops"], found["copy"]), peak[0])


def measure_reading(report: Report, folder: Path, table: pa.Table, parts: int, runs: int) -> None:
    """Add rows on reading a tag, as learners in processes do, and through the server."""
    step = -(-table.num_rows // parts)
    with Server(folder / "reading") as server, server.client() as client:
        for start in range(0, table.num_rows, step):
            client.push(table.slice(start, step), "t")

        def load() -> None:
            use_source(DataSource(server.address, server.token, ("t",)))
            assert load_table().num_rows == table.num_rows

        def read() -> None:
            schema, batches = client.stream("t")
            assert pa.Table.from_batches(batches, schema).num_rows == table.num_rows

        def plain() -> None:
            found = pa.concat_tables(pq.read_table(file) for file in server.fragments("t"))
            assert found.num_rows == table.num_rows

        read()
        kinds = {"by a learner on the node": load, "through the server": read}
        works = {name: partial(timed, work) for name, work in {**kinds, "pyarrow": plain}.items()}
        with server.peak_memory() as peak:
            found = alternate(works, runs)
    what, size = f"{table.nbytes / MB:.0f} MB", table.nbytes
    for kind in kinds:
        name = f"read {parts} fragments, {kind}"
        add_rates(report, name, what, size, (found[kind], found["pyarrow"]), peak[0])


def add_rates(
    report: Report, name: str, what: str, size: int, times: tuple[Figure, Figure], peak_mb: float
) -> None:
    """Add a row with the rates of FLOps and of its limit, for their times."""
    own, limit = (size / figure.median / MB for figure in times)
    report.add(
        [name, what, f"{own:.0f} MB/s", f"{limit:.0f} MB/s", f"{own / limit:.2f}", f"{peak_mb:.0f} MB"],
        case=name,
        bytes=float(size),
        peak_mb=peak_mb,
        flops_s=times[0],
        limit_s=times[1],
    )


def measure_listing(report: Report, folder: Path, fragments: int, runs: int) -> None:
    """Add rows on listing."""
    tiny = [pa.table({"x": [number]}) for number in range(fragments)]
    with Server(folder / "listing") as server:
        ingest(server, tiny, "t", DEVICES)
        with server.client() as client:
            works = {
                "list": lambda: timed(client.tags),
                "describe": lambda: timed(lambda: client.describe("t")),
            }
            found = alternate(works, runs)
    for what, figure in found.items():
        name = f"{what}, {fragments:,} fragments"
        report.add([name, "", f"{1_000 * figure.median:.0f} ms", "", "", ""], case=name, flops_s=figure)


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    large, count, small, many, fragments, runs = 64 * MB, 4, 64_000, 400, 10_000, 5
    if options.smoke:
        large, count, small, many, fragments, runs = MB, 2, 6_400, 8, 20, 1
    report = Report("data", ("what", "rows", "FLOps", "limit", "FLOps / limit", "memory of the server"))
    with tempfile.TemporaryDirectory(prefix=".bench-data-", dir=Path.cwd()) as name:
        folder = Path(name)
        for word, is_text_like in (("random", False), ("compressible", True)):
            tables = [rows_of(large, seed, is_text_like=is_text_like) for seed in range(count)]
            measure_ingest(report, folder, f"{count} large uploads, {word}", tables, 1, runs)
        tables = [rows_of(small, seed, is_text_like=False) for seed in range(many)]
        measure_ingest(report, folder, f"{many} small uploads, {DEVICES} devices", tables, DEVICES, runs)
        measure_reading(report, folder, rows_of(large * count, 0, is_text_like=False), count, runs)
        measure_listing(report, folder, fragments, runs)
    report.print()


if __name__ == "__main__":
    main()
