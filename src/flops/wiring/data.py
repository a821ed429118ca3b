"""Joins the ML data server, and opens it for others on its node."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flops.ports import DataCatalog
    from flops.wire.server_trust import ServerTrust


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
    parser.add_argument("--identity", type=Path, help="file with key and certificate, to encrypt")
    parser.add_argument("--port", type=int, default=settings.data_port, help="port, 0 for a free one")
    options = parser.parse_args(arguments)
    configure_logging(settings.log_level)
    try:
        identity, trust = _read_identity(options.identity)
        catalogue = Catalogue(ParquetStore(options.dir))
        serve(catalogue, options.dir, options.host, options.port, identity, trust)
    except FlopsError as exc:
        sys.stderr.write(f"{exc}\nHint: {exc.hint}\n")
        return exc.spec.exit_code
    # A client that stalls must not keep the process: the interpreter would wait for gRPC's threads.
    sys.stderr.flush()
    os._exit(0)


def _read_identity(path: Path | None) -> tuple[str, ServerTrust | None]:
    """The text of an identity, and what it is known by; nothing without one.

    Raises:
        FlopsError: ``config_corrupt``, ``file_unreadable``.
    """
    if path is None:
        return "", None
    from flops.adapters.node_identity import read_identity
    from flops.wire.server_trust import ServerTrust

    found = read_identity(path)
    if found is None:
        raise FlopsError(ErrorCode.FILE_UNREADABLE, f"There is no {path}, to encrypt with.")
    return path.read_text(encoding="ascii"), ServerTrust(found.node_id, found.authority)


def server_trust(folder: Path) -> ServerTrust | None:
    """What the data server of a folder is known by; None for one that does not encrypt.

    Raises:
        FlopsError: ``config_corrupt``, ``file_unreadable``.
    """
    import json

    from flops.wire.flight import ENDPOINT_FILE, IDENTITY_FILE

    try:
        endpoint = json.loads((folder / ENDPOINT_FILE).read_text())
    except (OSError, ValueError):  # it does not run: what it showed last
        path = folder / IDENTITY_FILE
        return _read_identity(path)[1] if path.exists() else None
    return _trust_in(endpoint)


def _trust_in(endpoint: Mapping[str, Any]) -> ServerTrust | None:
    from flops.wire.server_trust import ServerTrust

    return ServerTrust(endpoint["name"], endpoint["authority"]) if "authority" in endpoint else None


def open_data_catalog(folder: Path) -> DataCatalog:
    """Connect to the ML data server whose folder it is.

    Raises:
        FlopsError: ``unreachable`` when it is not ready.
    """
    import json

    from flops.adapters.flight_client import FlightDataClient
    from flops.wire.flight import ENDPOINT_FILE, TOKEN_FILE
    from flops.wire.server_trust import with_trust

    try:
        endpoint = json.loads((folder / ENDPOINT_FILE).read_text())
        token = (folder / TOKEN_FILE).read_text().strip()
        address = f"{endpoint['host']}:{endpoint['port']}"
        return FlightDataClient(address, with_trust(token, _trust_in(endpoint)))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise FlopsError(ErrorCode.UNREACHABLE, f"The data server in {folder} is not ready.") from exc
