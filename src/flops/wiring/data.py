"""Joins the ML data server, and opens it for others on its node."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from flops.ports import DataCatalog


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


def open_data_catalog(folder: Path) -> DataCatalog:
    """Connect to the ML data server whose folder it is.

    Raises:
        FlopsError: ``unreachable`` when it is not ready.
    """
    import json

    from flops.adapters.flight_client import FlightDataClient
    from flops.wire.flight import ENDPOINT_FILE, TOKEN_FILE

    try:
        endpoint = json.loads((folder / ENDPOINT_FILE).read_text())
        token = (folder / TOKEN_FILE).read_text().strip()
        return FlightDataClient(f"{endpoint['host']}:{endpoint['port']}", token)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise FlopsError(ErrorCode.UNREACHABLE, f"The data server in {folder} is not ready.") from exc
