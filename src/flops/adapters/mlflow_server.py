"""The MLflow server with its GUI, as a child of the control plane that is brought back when it dies."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import psutil

from flops.durable_file import write_durably
from flops.errors import ErrorCode, FlopsError

PID_FILE = "mlflow.pid"
LOG_FILE = "mlflow.log"
DATABASE_FILE = "mlflow.db"
ARTIFACT_FOLDER = "artifacts"
ARTIFACT_ROOT = "mlflow-artifacts:/"  # clients send artifacts to the server, which stores them
_LOG_BYTES = 5_000_000  # of one log file; two are kept
_GRACE_S = 5.0
_POLL_S = 0.05
_RETRY_FIRST_S = 0.2
_RETRY_MOST_S = 30.0
_STABLE_S = 60.0  # a server that lived this long starts anew without delay
_START_PATIENCE_S = 300.0  # of a child that has not answered yet
_LOOK_S = 10.0  # how often is looked whether it answers
_BACKLOG = 512
_HOST = "127.0.0.1"  # it asks nobody who they are; others reach it by the manager's port
_NAMES = ("127.0.0.1", "localhost")  # MLflow refuses every other one: no foreign page can reach it by DNS

_logger = logging.getLogger(__name__)


class MlflowServer:
    """Runs the MLflow server; `flops.adapters.mlflow_process` is its code.

    The listening socket belongs to this object, not to the child: the port is never lost, and who calls
    while a new child starts waits for it instead of being refused. The child ends when this process ends. A
    child that was left over by a killed control plane is ended before a new one starts.

    Args:
        home: folder of the database, the artifacts and the log; made when it does not exist.
        port: port to listen on; 0 for a free one, see `port`.
        environ: environment the child starts from; MLflow's own variables in it are left out.
        answer_patience_s: a child that has not answered for this long hangs, and is replaced.
    """

    def __init__(
        self,
        home: Path,
        port: int,
        environ: Mapping[str, str],
        *,
        answer_patience_s: float = 120.0,
    ) -> None:
        self._home = home.absolute()
        self._answer_patience_s = answer_patience_s
        self._port = port
        self._environ = environ
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._socket: socket.socket | None = None
        self._pipe: tuple[int, int] | None = None  # its end tells the child that this process is gone
        self._child: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None
        self._answered_s = -math.inf  # when it did last
        self.restarts = 0

    @property
    def port(self) -> int:
        """The port listened on, once started."""
        return self._port

    @property
    def url(self) -> str:
        """Where programs of this machine find it."""
        return f"http://{_HOST}:{self._port}"

    @property
    def log_path(self) -> Path:
        """The server's output."""
        return self._home / LOG_FILE

    @property
    def pid(self) -> int | None:
        """The child's process id; None when it does not run."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def start(self) -> None:
        """Listen and start the child; does not wait until it is ready.

        Raises:
            FlopsError: ``port_occupied``, ``config_invalid`` (a port that needs root), ``already_running``,
                ``file_unreadable``.
        """
        if self._socket is not None:
            raise FlopsError(ErrorCode.ALREADY_RUNNING, f"The MLflow server runs already, at {self.url}.")
        try:
            (self._home / ARTIFACT_FOLDER).mkdir(parents=True, exist_ok=True)
            end_left_over(self._home)
        except OSError as exc:
            raise FlopsError(
                ErrorCode.FILE_UNREADABLE, f"The folder {self._home} of MLflow cannot be used: {exc}."
            ) from exc
        self._socket = _listen(self._port)
        self._port = int(self._socket.getsockname()[1])
        self._pipe = os.pipe()
        self._stopping.clear()
        self._launch()
        self._watcher = threading.Thread(target=self._watch, name="mlflow-watch", daemon=True)
        self._watcher.start()

    def is_ready(self) -> bool:
        """Whether it answers right now."""
        if self._socket is None or self.pid is None:
            return False
        try:
            answer = httpx.get(f"{self.url}/health", timeout=2.0, trust_env=False)
        except httpx.HTTPError:
            return False
        if answer.status_code != httpx.codes.OK:
            return False
        self._answered_s = time.monotonic()
        return True

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until it answers.

        Raises:
            FlopsError: ``tracking_failed`` with the end of its log after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if time.monotonic() > deadline or self._stopping.is_set():
                raise FlopsError(
                    ErrorCode.TRACKING_FAILED,
                    f"The MLflow server at {self.url} did not become ready within {timeout_s:.0f} s.",
                    hint=f"Its log is {self.log_path}.",
                    details={"log": self._log_end(), "restarts": self.restarts},
                )
            self._stopping.wait(_POLL_S)

    def stop(self) -> None:
        """End the child with all its children and free the port; nothing happens when it does not run."""
        with self._lock:
            self._stopping.set()
            child = self._child
        if child is not None:
            _end(child.pid)
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._pipe is not None:
            for descriptor in self._pipe:
                os.close(descriptor)
            self._pipe = None
        self._child = None
        (self._home / PID_FILE).unlink(missing_ok=True)

    def _watch(self) -> None:
        delay_s = _RETRY_FIRST_S
        while not self._stopping.is_set():
            started = time.monotonic()
            child = self._child
            code = self._await_end(child) if child is not None else None
            if self._stopping.is_set():
                return
            if time.monotonic() - started > _STABLE_S:
                delay_s = _RETRY_FIRST_S
            _logger.warning("MLflow server ended with code %s; it starts again in %.1f s", code, delay_s)
            if self._stopping.wait(delay_s):
                return
            delay_s = min(2 * delay_s, _RETRY_MOST_S)
            self.restarts += 1
            try:
                self._launch()
            except OSError:
                _logger.exception("MLflow server could not be started")
                self._child = None

    def _await_end(self, child: subprocess.Popen[bytes]) -> int:
        """Wait until the child has ended, and end it when it hangs; returns its exit code."""
        started_s = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(min(_LOOK_S, self._answer_patience_s / 4))
            if self.is_ready():
                continue
            has_answered = self._answered_s > started_s
            silent_s = time.monotonic() - (self._answered_s if has_answered else started_s)
            if silent_s > (self._answer_patience_s if has_answered else _START_PATIENCE_S):
                _logger.warning("MLflow server has not answered for %.0f s and is ended", silent_s)
                _end(child.pid)

    def _launch(self) -> None:
        with self._lock:
            if self._stopping.is_set() or self._socket is None or self._pipe is None:
                return
            database = f"sqlite:///{self._home / DATABASE_FILE}"
            descriptors = (self._socket.fileno(), self._pipe[0])
            argv = [sys.executable, "-m", "flops.adapters.mlflow_process"]
            argv += [str(descriptors[0]), str(descriptors[1]), database, ARTIFACT_ROOT]
            argv.append(str(self._home / ARTIFACT_FOLDER))
            with self._log() as log:
                self._child = subprocess.Popen(
                    argv,
                    cwd=self._home,
                    env=self._child_environment(database),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=descriptors,
                    start_new_session=True,
                )
            _write_pid(self._home, self._child.pid)

    def _child_environment(self, database: str) -> dict[str, str]:
        """The names with an underscore are those by which ``mlflow server`` tells its own workers."""
        inherited = {
            key: value
            for key, value in self._environ.items()
            if not key.startswith(("MLFLOW_", "_MLFLOW_", "prometheus_multiproc_dir"))
        }
        return inherited | {
            "_MLFLOW_SERVER_FILE_STORE": database,
            "_MLFLOW_SERVER_REGISTRY_STORE": database,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": ARTIFACT_ROOT,
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(self._home / ARTIFACT_FOLDER),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "_MLFLOW_SGI_NAME": "uvicorn",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join([*_NAMES, *(f"{name}:*" for name in _NAMES)]),
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}:{self._port}" for name in _NAMES),
            "MALLOC_ARENA_MAX": "2",  # fewer heaps for its worker threads: less memory
        }

    @contextlib.contextmanager
    def _log(self) -> Iterator[int]:
        path = self.log_path
        if path.exists() and path.stat().st_size > _LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _log_end(self) -> str:
        try:
            return self.log_path.read_bytes()[-2000:].decode(errors="replace")
        except OSError:
            return ""


def end_left_over(home: Path) -> psutil.Process | None:
    """End the server that a killed control plane left in `home`; returns its process, None if there is none.

    A process is only taken for it when it has the id and the start time that were written down.
    """
    path = home / PID_FILE
    try:
        written = json.loads(path.read_text())
        process = psutil.Process(int(written["pid"]))
        is_left_over = abs(process.create_time() - float(written["started_at_s"])) < 1.0
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        is_left_over = False
    if is_left_over:
        _end(process.pid)
    path.unlink(missing_ok=True)
    return process if is_left_over else None


def _write_pid(home: Path, pid: int) -> None:
    try:
        started_at_s = psutil.Process(pid).create_time()
    except psutil.Error:
        return  # it has ended already; the watcher sees to that
    try:
        write_durably(home / PID_FILE, json.dumps({"pid": pid, "started_at_s": started_at_s}))
    except FlopsError as exc:  # the child runs: to fail here would start a second one beside it
        _logger.warning("MLflow server runs without its pid file: %s", exc)


def _end(pid: int) -> None:
    """End a process with all its descendants: first politely, after some seconds for good."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
        root.terminate()
    except psutil.NoSuchProcess:
        return
    psutil.wait_procs([root], timeout=_GRACE_S)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=_GRACE_S)


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        if exc.errno == errno.EADDRINUSE:
            raise FlopsError(
                ErrorCode.PORT_OCCUPIED, f"Port {port} on {_HOST} is in use; the MLflow server needs it."
            ) from exc
        raise FlopsError(
            ErrorCode.CONFIG_INVALID, f"The MLflow server cannot listen on {_HOST}:{port}: {exc.strerror}."
        ) from exc
    return listener
