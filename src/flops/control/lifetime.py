"""A server of ours from start to end: one per folder, a file that says where it listens, signals."""

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
CLUSTERS_FILE = "clusters.json"  # the further ones
PROJECTS_FILE = "projects.sqlite"
TRACKING_FOLDER = "mlflow"
IMAGES_FOLDER = "images"  # what the cluster's registry keeps
PACKAGES_FOLDER = "packages"  # what nodes asked the cluster to fetch from the package index

_log = logging.getLogger(__name__)


def run_until_told(
    folder: Path,
    start: Callable[[contextlib.ExitStack], Mapping[str, Any]],
    what: str = "control plane",
) -> int:
    """Run the control plane, or another such server, until SIGTERM or SIGINT.

    Args:
        folder: its own; only one process runs per folder.
        start: starts every part, registers its end on the stack, and returns what ``endpoint.json`` tells
            clients. It is called once, with the folder locked.
        what: runs, in sentences.

    Returns:
        The exit code. An error at the start is left in ``startup_error.json`` for whoever started us.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    try:
        with _only_one(folder / LOCK_FILE, what), contextlib.ExitStack() as parts:
            (folder / STARTUP_ERROR_FILE).unlink(missing_ok=True)
            endpoint = {"pid": os.getpid(), **start(parts)}
            parts.callback((folder / ENDPOINT_FILE).unlink, missing_ok=True)
            write_durably(folder / ENDPOINT_FILE, json.dumps(endpoint), mode=0o644)
            _log.info("The %s is ready: %s", what, endpoint)
            told.wait()
            _log.info("The %s stops", what)
    except FlopsError as exc:
        _log.exception("The %s did not start", what)
        if exc.code is not ErrorCode.ALREADY_RUNNING:
            write_durably(folder / STARTUP_ERROR_FILE, json.dumps(exc.to_dict()), mode=0o644)
        return exc.spec.exit_code
    return 0


@contextlib.contextmanager
def _only_one(path: Path, what: str) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise FlopsError(
                ErrorCode.ALREADY_RUNNING, f"A {what} runs already with its state in {path.parent}."
            ) from exc
        yield
