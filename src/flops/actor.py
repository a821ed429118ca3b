"""What every service process shares: reading its context, telling events, ending with a clear failure.

A service is started as ``python -m <module> <work_dir>/context.json``. It tells events by appending JSON
lines to ``<work_dir>/events.jsonl``; its node sends them on, in order, also those written while the node's
daemon was away. The events are described in `flops.wire.actor_events`.

This module is part of the actor kit: it imports the standard library only.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flops.disclosure import Disclosure, disclosed
from flops.errors import ErrorCode, FlopsError

EVENTS_FILE = "events.jsonl"
CONTEXT_FILE = "context.json"
_SPACE_PATIENCE_S = 60.0
_SPACE_LOOK_S = 0.2


@dataclass(frozen=True)
class ActorContext:
    """Where a service runs, written by its node next to its configuration.

    Args:
        service_id: the service's own id.
        project_id: the project or mock-data id it belongs to.
        node_name: name of its node.
        work_dir: the folder the service may write to; kept over restarts of the service.
        host: address to listen on and to be reached at.
        blobs_url: base URL of the cluster's blobs: GET and PUT ``<blobs_url>/<sha256>``.
        repo_dir: unpacked bundle (ML repository or model folder), "" when the spec names none.
        kit_dir: folder to put on PYTHONPATH for processes of the project's environments.
        project_python: interpreter of the project's environment, "" when the spec names none.
        model_python: interpreter of the environment that saves and serves models, "" likewise.
        environments_dir: folder of the node's virtual environments, shared by its services.
        images_dir: folder where a builder keeps what images are made of; "" elsewhere.
        data_address: ``host:port`` of the node's ML data server, "" when the node has none.
        data_token: token for it with the rights this service needs, and no more.
        data_dir: folder with a folder of files for each tag of that server, "" when there is none.
        cluster: name of its node's cluster.
        authority: certificate (PEM) of the cluster's authority, "" where the cluster does not encrypt.
        key: what this service shows to the cluster, beside its id; "" likewise.
        identity: file with key and certificate of a service that others dial by TLS; "" without TLS.
        has_open_network: users' code may dial any address.
        disclosure: what the node reveals about failures of users' code, a value of `Disclosure`.
        config: the kind's configuration, one of the models of `flops.wire.services`, as JSON.
    """

    service_id: str
    project_id: str
    node_name: str
    work_dir: str
    host: str = "127.0.0.1"
    blobs_url: str = ""
    repo_dir: str = ""
    kit_dir: str = ""
    project_python: str = ""
    model_python: str = ""
    environments_dir: str = ""
    images_dir: str = ""
    data_address: str = ""
    data_token: str = ""
    data_dir: str = ""
    cluster: str = "default"
    authority: str = ""
    key: str = ""
    identity: str = ""
    has_open_network: bool = False
    disclosure: str = Disclosure.FULL.value
    config: dict[str, Any] = field(default_factory=dict)

    def disclosed(self, error: FlopsError) -> FlopsError:
        """A failure of users' code as it may leave this node; what cannot be read as a choice hides most."""
        known = self.disclosure in set(Disclosure)
        return disclosed(error, Disclosure(self.disclosure) if known else Disclosure.NONE, self.node_name)

    def save(self) -> Path:
        """Write the context into its work folder, readable by the owner only; returns the file's path."""
        path = Path(self.work_dir) / CONTEXT_FILE
        temporary = path.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> ActorContext:
        """Read a context written by `save`."""
        raw = json.loads(path.read_text())
        known = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        return cls(**known)


class EventLog:
    """Appends events to the service's log; every line is whole, also when several threads write."""

    def __init__(self, work_dir: Path) -> None:
        self._path = work_dir / EVENTS_FILE
        self._lock = threading.Lock()
        self._has_failed = False

    def tell(self, kind: str, **fields: Any) -> None:
        """Append one event; when this returns, a kill of the process cannot lose it.

        On a full disk it waits for space, for a minute.

        Raises:
            OSError: there was no space, or the file cannot be written for another reason.
        """
        line = json.dumps({"kind": kind, "time_s": time.time(), **fields}) + "\n"  # noqa: TID251 (stdlib only)
        with self._lock:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                _append_whole(descriptor, line.encode())
            finally:
                os.close(descriptor)

    def tell_failure(self, error: FlopsError) -> None:
        """Tell the reason of the service's end; only the first one is told.

        `run_actor` does it for every failure. A service that takes time to end tells it before.
        """
        if not self._has_failed:
            self._has_failed = True
            self.tell("failed", error=error.to_dict())


def _append_whole(descriptor: int, line: bytes) -> None:
    """Append a line whole; of one that does not fit nothing stays, or it would swallow the next one."""
    deadline_s = time.monotonic() + _SPACE_PATIENCE_S
    size = os.fstat(descriptor).st_size
    while True:
        written = 0
        try:
            written = os.write(descriptor, line)
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
        if written == len(line):
            return
        os.ftruncate(descriptor, size)
        if time.monotonic() > deadline_s:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(_SPACE_LOOK_S)


def log_failure(error: FlopsError) -> None:
    """Write a failure whole to the service's output, which stays on the node."""
    sys.stdout.flush()
    text = f"{error}\nHint: {error.hint}\n{error.details.get('traceback', '')}"
    sys.stderr.write(f"{text.rstrip()}\n")
    sys.stderr.flush()


def tell_parent(error: FlopsError, context: ActorContext | None = None) -> int:
    """End a child of a service: its error as the last line on standard error; returns the exit code.

    Args:
        error: the failure; it is logged whole, and told as far as the node reveals it.
        context: of the service; None when not even that could be read.
    """
    log_failure(error)
    told = error if context is None else context.disclosed(error)
    sys.stderr.write(json.dumps(told.to_dict()) + "\n")
    sys.stderr.flush()
    return error.spec.exit_code


def run_actor(
    main: Callable[[ActorContext, EventLog], None],
    argv: list[str] | None = None,
    *,
    has_users_code: bool = True,
) -> int:
    """Run a service's main function; a failure becomes one ``failed`` event and a non-zero exit code.

    Args:
        main: the service; it returns when its work is done.
        argv: command line, ``sys.argv`` when None; its second item is the context file.
        has_users_code: whether this process runs users' code, so that its failures are the node's to reveal.

    Returns:
        The exit code: 0, or the catalogue's exit code of the failure.
    """
    arguments = sys.argv if argv is None else argv
    context = ActorContext.load(Path(arguments[1]))
    events = EventLog(Path(context.work_dir))
    try:
        main(context, events)
    except FlopsError as exc:
        error = exc
    except KeyboardInterrupt:
        return 130
    except Exception as exc:  # noqa: BLE001 (the last line of defence: whatever it is, the user is told)
        error = FlopsError(
            ErrorCode.INTERNAL,
            f"{context.service_id} on {context.node_name} ended by {type(exc).__name__}: {exc}",
            details={"traceback": traceback.format_exc()},
        )
    else:
        return 0
    log_failure(error)
    told = context.disclosed(error) if has_users_code else error
    events.tell_failure(told)
    return error.spec.exit_code
