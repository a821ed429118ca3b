"""The one place that knows both processes and adapters, and joins them. The only module that reads settings.

Every process of ours is started as ``python -m flops.wiring <process> ARGUMENTS``. Imports stand inside the
functions, so that `flops --help` and `NodeEngine config addon` load nothing they do not need.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flops.errors import FlopsError

if TYPE_CHECKING:
    from flops.adapters.conf_file import ConfFile
    from flops.node.paths import NodePaths
    from flops.ports import DataCatalog, Environments


def main(argv: Sequence[str]) -> int:
    """Start the process named first, with the remaining arguments; returns its exit code."""
    name, *arguments = argv
    return PROCESSES[name](arguments)


def node_paths(home: Path | None = None) -> NodePaths:
    """Where a node's files are: below `home`, else as the settings and the user's rights say."""
    import os

    from flops.node.paths import NodePaths
    from flops.settings import NodeSettings

    settings = NodeSettings.read(node_home=home)
    folder = settings.node_home
    if folder is None and "home" not in settings.model_fields_set and os.geteuid() == 0:
        log = Path("/var/log/oakestra/nodeengine.log")
        return NodePaths(Path("/var/lib/flops"), Path("/etc/oakestra/conf.json"), log, is_system=True)
    folder = (folder or settings.home / "node").expanduser().absolute()
    return NodePaths(folder, folder / "conf.json", folder / "nodeengine.log")


def node_conf_file(paths: NodePaths) -> ConfFile:
    """The file with what a node's operator configured."""
    from flops.adapters.conf_file import ConfFile
    from flops.node.configuration import check_configuration, default_configuration

    return ConfFile(paths.conf, lambda: dict(default_configuration().raw), check_configuration)


def run_control_plane(arguments: list[str]) -> int:
    """Run manager, cluster orchestrator and MLflow server."""
    from flops.wiring_control import run_control_plane_process

    return run_control_plane_process(arguments)


def run_node(arguments: list[str]) -> int:
    """Run the daemon of a node."""
    from flops.wiring_node import run_node_daemon

    return run_node_daemon(arguments)


def open_data_catalog(folder: Path) -> DataCatalog:
    """Connect to the ML data server whose folder it is.

    Raises:
        FlopsError: ``unreachable`` when it is not ready.
    """
    import json

    from flops.adapters.flight_client import FlightDataClient
    from flops.errors import ErrorCode, FlopsError
    from flops.wire.flight import ENDPOINT_FILE, TOKEN_FILE

    try:
        endpoint = json.loads((folder / ENDPOINT_FILE).read_text())
        token = (folder / TOKEN_FILE).read_text().strip()
        return FlightDataClient(f"{endpoint['host']}:{endpoint['port']}", token)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise FlopsError(ErrorCode.UNREACHABLE, f"The data server in {folder} is not ready.") from exc


def end_node_leftovers(paths: NodePaths) -> int:
    """End what a killed daemon left running; returns how many services and addons that were."""
    if not (paths.runtime.is_dir() or paths.addon_runtime.is_dir()):
        return 0
    from flops.wiring_node import end_leftovers

    return end_leftovers(paths)


def open_environments(root: Path) -> Environments:
    """The environments in a folder of this machine, built by uv."""
    from importlib.metadata import version

    import uv

    from flops.adapters.uv_environments import UvEnvironments
    from flops.settings import inherited_environment

    return UvEnvironments(
        root, uv=Path(uv.find_uv_bin()), environ=inherited_environment(), mlflow_version=version("mlflow")
    )


def run_aggregator(arguments: list[str]) -> int:
    """Run an aggregator: a service, given its context file."""
    import os

    from flops.settings import inherited_environment, quiet_libraries

    quiet_libraries()  # before Flower is imported

    from flops.actor import run_actor
    from flops.adapters.mlflow_tracker import MlflowTracker
    from flops.log import configure_logging
    from flops.trainer.aggregator import main as aggregate

    configure_logging("INFO")
    environ = inherited_environment()
    code = run_actor(
        lambda context, events: aggregate(context, events, MlflowTracker, environ), ["", *arguments]
    )
    # A learner that hangs must not keep the process: the interpreter would wait for its thread.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_builder(arguments: list[str]) -> int:
    """Run a builder: a service, given its context file."""
    from flops.actor import run_actor
    from flops.builder.builder import main as build

    return run_actor(lambda context, events: build(context, events, open_environments), ["", *arguments])


def run_data_server(arguments: list[str]) -> int:
    """Run an ML data server until SIGTERM."""
    import argparse
    import os

    from flops.adapters.parquet_store import ParquetStore
    from flops.dataserver.catalogue import Catalogue
    from flops.dataserver.server import serve
    from flops.log import configure_logging
    from flops.settings import NodeSettings

    settings = NodeSettings.read()
    parser = argparse.ArgumentParser(prog="data-server")
    parser.add_argument("--dir", type=Path, required=True, help="where data, token and endpoint are")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=settings.data_port, help="port, 0 for a free one")
    options = parser.parse_args(arguments)
    configure_logging(settings.log_level)
    try:
        serve(Catalogue(ParquetStore(options.dir)), options.dir, options.host, options.port)
    except FlopsError as exc:
        sys.stderr.write(f"{exc}\nHint: {exc.hint}\n")
        return exc.spec.exit_code
    # A client that stalls must not keep the process: the interpreter would wait for gRPC's threads.
    sys.stderr.flush()
    os._exit(0)


def run_mock_data_provider(arguments: list[str]) -> int:
    """Run a mock data provider: a service, given its context file."""
    import pyarrow as pa

    from flops.actor import run_actor
    from flops.adapters.blob_client import HttpBlobClient
    from flops.adapters.data_files import open_data
    from flops.adapters.flight_client import FlightDataClient
    from flops.mockdata.hub import load_from_hub
    from flops.mockdata.provider import MockDataProvider

    def read_file(path: Path) -> pa.Table:
        source = open_data(path)
        return pa.Table.from_batches(source.batches, schema=source.schema)

    provider = MockDataProvider(
        open_sink=FlightDataClient,
        fetch_blob=lambda url, digest, path: HttpBlobClient(url).fetch(digest, path),
        read_file=read_file,
        load_from_hub=load_from_hub,
    )
    return run_actor(provider.run, ["mock-data-provider", *arguments])


PROCESSES: Mapping[str, Callable[[list[str]], int]] = {
    "aggregator": run_aggregator,
    "builder": run_builder,
    "control-plane": run_control_plane,
    "data-server": run_data_server,
    "mock-data-provider": run_mock_data_provider,
    "node": run_node,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
