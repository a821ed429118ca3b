"""Measures what two nodes of a site fetch from the package index, by themselves and through their cluster.

Run from the root of the repository: ``.venv/bin/python benchmarks/site_packages.py URL``, with the URL of an
index's simple pages. Both nodes build the environment of an example, each with an empty cache of uv.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import mlflow
import uv

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.http_server import HttpServer
from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.memory_cluster_store import MemoryClusterStore
from flops.adapters.package_index import ClusterPackages, HttpPackageIndex
from flops.adapters.system_clock import SystemClock
from flops.adapters.uv_environments import UvEnvironments
from flops.core.package_page import PackageFile
from flops.orchestrator.app import build_app
from flops.orchestrator.cluster import ClusterOrchestrator
from flops.orchestrator.packages import PackageCache
from flops.settings import inherited_environment
from flops.wiring.site_packages import site_packages

ROOT = Path(__file__).resolve().parents[1]
NODES = 2


class CountedIndex(HttpPackageIndex):
    """The index, with the bytes of the files that it gave."""

    given_bytes = 0

    def chunks(self, file: PackageFile) -> Iterator[bytes]:
        """The bytes of a file, piece by piece."""
        for chunk in super().chunks(file):
            self.given_bytes += len(chunk)
            yield chunk


class Bench:
    """Clusters and nodes in a folder, and a lock."""

    def __init__(self, folder: Path, url: str, parts: ExitStack) -> None:
        self.folder = folder
        self.parts = parts
        self.index = CountedIndex(url)
        parts.callback(self.index.close)
        self.url = url
        example = ROOT / "examples" / "breast_cancer_sklearn"
        self.lock = self._node("resolver", None).lock(example, "sklearn", lambda _: None)[0]

    def _node(self, name: str, site: ClusterPackages | None) -> UvEnvironments:
        own = {"UV_CACHE_DIR": str(self.folder / f"cache-{name}"), "UV_DEFAULT_INDEX": self.url}
        return UvEnvironments(
            self.folder / name,
            uv=Path(uv.find_uv_bin()),
            environ={**inherited_environment(), **own},
            mlflow_version=mlflow.__version__,
            site=site,
        )

    def _cluster(self, name: str) -> ClusterPackages:
        locks = MemoryBlobs()
        locks.put(self.lock.encode())
        cache = PackageCache(self.index, FileBlobs(self.folder / f"packages-{name}"), locks, SystemClock())
        orchestrator = ClusterOrchestrator(MemoryClusterStore(), SystemClock())
        server = HttpServer(build_app(orchestrator, locks, more=cache.routes()), "127.0.0.1", 0)
        server.start()
        self.parts.callback(server.close)
        return site_packages(f"http://127.0.0.1:{server.port}/api/blobs", dict)

    def measure(self, what: str, clusters: int) -> None:
        """Have the nodes build, shared out over so many clusters, and print what the index gave."""
        self.index.given_bytes = 0
        sites = [self._cluster(f"{what}-{number}") for number in range(clusters)]
        start_s = time.monotonic()
        for number in range(NODES):
            self._node(f"{what}-{number}", sites[number % clusters]).materialise(self.lock, lambda _: None)
        took_s = time.monotonic() - start_s
        print(f"{what:<20} {self.index.given_bytes / 1e6:8.1f} MB from the index {took_s:8.1f} s", flush=True)


def main() -> None:
    """Measure both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of an index's simple pages")
    url = parser.parse_args().url
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as folder, ExitStack() as parts:
        bench = Bench(Path(folder), url, parts)
        bench.measure("each by itself", NODES)  # a cluster of its own each: every file, once per node
        bench.measure("through one cluster", 1)


if __name__ == "__main__":
    main()
