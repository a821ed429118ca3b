"""``flops connect``: this machine's `flops` speaks to a control plane on another one.

The control plane's machine prints one line with the manager's address, the fingerprint of the authority that
it is known by, and the admin token. Nothing is told to a manager that does not prove to be that one.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from flops.cli.connection import (
    CONNECTION_FILE,
    Manager,
    client_settings,
    find_manager,
    global_options,
    refuse_plain,
)
from flops.cli.output import FormatOption, OutputFormat, print_data, say
from flops.errors import ErrorCode, FlopsError

_PREFIX = "flopsc1."


def connect(
    line: Annotated[
        str, typer.Argument(help="What `flops status --connect` printed; - reads it from stdin.")
    ],
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Have `flops` on this machine speak to a control plane on another one, from now on."""
    from flops.cli.control import read_endpoint
    from flops.durable_file import write_durably

    settings = client_settings()
    if read_endpoint(settings.control_dir) is not None:
        raise FlopsError(
            ErrorCode.CONFLICT,
            f"A control plane runs with its state in {settings.control_dir}, and `flops` speaks to it.",
            hint="Connect in another home: flops --home DIR connect LINE.",
        )
    manager = _reach(sys.stdin.readline() if line == "-" else line)
    kept = {"url": manager.url, "token": manager.token, "authority": manager.authority}
    write_durably(settings.home / CONNECTION_FILE, json.dumps(kept))
    say(f"Connected to the control plane at {manager.url}; kept in {settings.home / CONNECTION_FILE}.")
    print_data({"manager_url": manager.url}, output_format, lambda: None)


def disconnect(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Forget what `flops connect` has kept."""
    path = client_settings().home / CONNECTION_FILE
    if not path.exists():
        raise FlopsError(
            ErrorCode.NOT_FOUND, f"There is no connection in {path}.", hint="`flops connect LINE` makes one."
        )
    path.unlink()
    say("The connection is forgotten; its token stays valid.")
    print_data({"forgotten": str(path)}, output_format, lambda: None)


def connection_line(home: Path | None, address: str | None) -> str:
    """What another machine is connected by: address, fingerprint and token in one line.

    Args:
        home: of the control plane.
        address: at which the other machine reaches the manager; where it listens if not given.

    Raises:
        FlopsError: ``conflict`` for a manager that no other machine reaches; ``usage`` when the address has
            to be said; and as `find_manager`.
    """
    from flops.cli.connection import connected
    from flops.core.address import reached_elsewhere, with_port
    from flops.core.health import is_loopback
    from flops.wire.rest import ControlStatus
    from flops.wire.token_text import write_line

    manager = find_manager(client_settings(home))
    with connected(home) as api:
        listening = api.get("/status", ControlStatus).manager_host
    host = reached_elsewhere(listening, address, "The manager")
    if address is None and is_loopback(host):
        raise FlopsError(
            ErrorCode.CONFLICT,
            f"The manager listens on {host}: other machines do not reach it.",
            hint="`flops down`, then `flops up --host ADDRESS` with an address of this machine.",
        )
    parts = urlsplit(manager.url)
    url = f"{parts.scheme}://{with_port(host, parts.port or 443)}"
    fingerprint = ""
    if manager.authority:
        fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(manager.authority)).hexdigest()
    return write_line(_PREFIX, url, fingerprint, manager.token)


def _reach(line: str) -> Manager:
    """The manager of a line, when it is there and proves to be that one."""
    from flops.adapters.node_identity import trusted_authority
    from flops.cli.api_client import ApiClient
    from flops.wire.join import MANAGER_AUTHORITY_PATH
    from flops.wire.rest import ControlStatus
    from flops.wire.token_text import read_line

    try:
        url, fingerprint, token = read_line(_PREFIX, line)
    except ValueError as exc:
        raise FlopsError(
            ErrorCode.USAGE,
            "That is no line that connects, or not a whole one.",
            hint=f"Copy the whole line that `flops status --connect` printed; it begins with {_PREFIX}",
        ) from exc
    if not global_options().insecure:
        refuse_plain(url)
    authority = ""
    if fingerprint:
        authority = trusted_authority(url + MANAGER_AUTHORITY_PATH, fingerprint, "the manager of the line")
    api = ApiClient(url, token, authority=authority)
    try:
        api.get("/status", ControlStatus)  # the token is the right one, too
    finally:
        api.close()
    return Manager(url, token, authority)
