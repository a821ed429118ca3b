"""The control plane from start to end: one per home, a file that says where it listens, signals."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flops.durable_file import write_durably
from flops.errors import ErrorCode, FlopsError

ENDPOINT_FILE = "endpoint.json"
ADMIN_TOKEN_FILE = "admin.token"  # noqa: S105 (a file's name)
AUTHORITY_FILE = "authority.pem"  # key and certificate of the cluster's authority
AUTHORITY_CERTIFICATE_FILE = "authority.crt"  # what clients trust; no secret
STARTUP_ERROR_FILE = "startup_error.json"
LOCK_FILE = "lock"
SECRET_FILE = "secret"  # noqa: S105 (a file's name)
CLUSTER_FILE = "cluster.sqlite"
PROJECTS_FILE = "projects.sqlite"
TRACKING_FOLDER = "mlflow"
IMAGES_FOLDER = "images"  # what the cluster's registry keeps
PACKAGES_FOLDER = "packages"  # what nodes asked the cluster to fetch from the package index

_log = logging.getLogger(__name__)


def run_until_told(folder: Path, start: Callable[[contextlib.ExitStack], Mapping[str, Any]]) -> int:
    """Run the control plane until SIGTERM or SIGINT.

    Args:
        folder: the control plane's own folder; only one process runs per folder.
        start: starts every part, registers its end on the stack, and returns what ``endpoint.json`` tells
            clients. It is called once, with the folder locked.

    Returns:
        The exit code. An error at the start is left in ``startup_error.json`` for whoever started us.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    try:
        with _only_one(folder / LOCK_FILE), contextlib.ExitStack() as parts:
            (folder / STARTUP_ERROR_FILE).unlink(missing_ok=True)
            endpoint = {"pid": os.getpid(), **start(parts)}
            parts.callback((folder / ENDPOINT_FILE).unlink, missing_ok=True)
            write_durably(folder / ENDPOINT_FILE, json.dumps(endpoint), mode=0o644)
            _log.info("The control plane is ready at %s", endpoint.get("manager_url"))
            told.wait()
            _log.info("The control plane stops")
    except FlopsError as exc:
        _log.exception("The control plane did not start")
        if exc.code is not ErrorCode.ALREADY_RUNNING:
            write_durably(folder / STARTUP_ERROR_FILE, json.dumps(exc.to_dict()), mode=0o644)
        return exc.spec.exit_code
    return 0


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise FlopsError(
                ErrorCode.ALREADY_RUNNING, f"A control plane runs already with its state in {path.parent}."
            ) from exc
        yield
