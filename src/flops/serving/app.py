"""The inference server: ``python -m flops.serving.app CONTEXT.json``, in the model's environment.

It answers as ``mlflow models serve`` does: parsing, predicting and answering is MLflow's own scoring code,
but for plain rows of numbers, for which there is a short way with the same result. Errors have the one shape
of FLOps, with the status MLflow gives them.

This module is part of the actor kit. Beside the standard library and numpy it needs what the environment has:
MLflow, Starlette, uvicorn and orjson.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import faulthandler
import json
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import mlflow
import numpy as np
import orjson
import pandas as pd
import uvicorn
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel, scoring_server
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from flops.actor import ActorContext, EventLog, log_failure, run_actor
from flops.disclosure import Disclosure
from flops.errors import ErrorCode, FlopsError

LOAD_TIMEOUT_S = 600.0
BODY_BYTES_MOST = 64 * 2**20
_GRACE_S = 5
_LINGER_S = 1.0  # after it was told to end: who is about to ask is still answered
_ANSWERS_S = 3  # for requests that it works on when it ends; its node waits 5 s in all
_BACKLOG = 2048
_SO_ATTACH_REUSEPORT_CBPF = 51  # of Linux; Python has no name for it
_REASON_CHARACTERS = 300
_NOT_JSON = "The body is not valid JSON."
_ROW_KEYS = frozenset({"inputs", "instances"})
_JSON_TYPES = frozenset(
    {"application/json", "application/json; charset=utf-8", "application/json;charset=utf-8"}
)


class Model:
    """A loaded MLflow model that answers requests.

    Args:
        folder: the model's folder.
        tells_why: whether a client is told why the model refused its input, which may be users' own words.

    Raises:
        FlopsError: ``model_unloadable``.
    """

    def __init__(self, folder: Path, *, tells_why: bool = True) -> None:
        self._tells_why = tells_why
        try:
            self.pyfunc: PyFuncModel = mlflow.pyfunc.load_model(str(folder))
        except Exception as exc:
            raise FlopsError(
                ErrorCode.MODEL_UNLOADABLE,
                f"The model cannot be loaded: {type(exc).__name__}: {exc}",
                hint="A module that is missing must be in the repository or in its dependency file.",
                details={"traceback": traceback.format_exc()},
            ) from exc
        self._schema = self.pyfunc.metadata.get_input_schema()
        self._width, self._dtype = _plain_rows(self._schema)
        self._predict_rows = _row_predictor(self.pyfunc)

    @property
    def expected(self) -> str:
        """What the model takes, for people."""
        if self._schema is None:
            return "The model does not say what it expects: it was saved without a signature."
        if self._width is not None:
            return f"The model expects rows of {self._width} numbers ({self._dtype})."
        return f"The model expects {self._schema}."

    def signature(self) -> dict[str, Any] | None:
        """Inputs and outputs as MLflow describes them."""
        found = self.pyfunc.metadata.signature
        return None if found is None else {k: orjson.loads(v) for k, v in found.to_dict().items() if v}

    def answer(self, body: bytes, content_type: str) -> bytes:
        """Predict; returns the JSON of ``{"predictions": …}``.

        Raises:
            FlopsError: ``input_invalid``.
        """
        if keras := sys.modules.get("keras"):  # it draws a progress bar for every request, thread by thread
            keras.utils.disable_interactive_logging()
        quick = self._answer_rows(body) if content_type.lower() in _JSON_TYPES else None
        if quick is not None:
            return quick
        media_type, _, options = content_type.partition(";")
        if self._width is not None and media_type.strip() == "text/csv":
            body, content_type = self._json_of_csv(body), f"application/json;{options}".rstrip(";")
        try:
            result = scoring_server.invocations(body, content_type, self.pyfunc, self._schema)
        except MlflowException as exc:
            raise self._refusal(_reason_of(exc), exc.get_http_status_code()) from exc
        if result.status != HTTPStatus.OK:
            raise self._refusal(str(result.response), int(result.status))
        return str(result.response).encode()

    def _refusal(self, reason: str, status: int) -> StatusError:
        error = StatusError(ErrorCode.INPUT_INVALID, f"{reason} {self.expected}", status)
        if self._tells_why or reason == _NOT_JSON:
            return error
        log_failure(error)
        message = f"The model refused the input; its node does not reveal why. {self.expected}"
        return StatusError(ErrorCode.INPUT_INVALID, message, status)

    def _json_of_csv(self, body: bytes) -> bytes:
        """A CSV's rows as JSON: MLflow's own server reads a CSV only for models that name their columns."""
        try:
            rows = pd.read_csv(BytesIO(body)).to_numpy(self._dtype)
        except (ValueError, OverflowError) as exc:
            message = f"The CSV cannot be read: {exc}. {self.expected}"
            raise StatusError(ErrorCode.INPUT_INVALID, message, HTTPStatus.BAD_REQUEST) from exc
        return json.dumps({"inputs": rows.tolist()}).encode()

    def _answer_rows(self, body: bytes) -> bytes | None:
        """The short way for plain rows of numbers; None when it is something else, or anything is odd."""
        if self._width is None:
            return None
        try:
            ((key, values),) = orjson.loads(body).items()
            rows = np.asarray(values)
            is_exact = rows.dtype == self._dtype or (rows.dtype.kind in "if" and self._dtype.kind == "f")
            if key not in _ROW_KEYS or not is_exact or rows.shape != (len(rows), self._width):
                return None
            predictions = self._predict_rows(rows.astype(self._dtype, copy=False))
        except Exception:  # noqa: BLE001 (the long way meets it again, and tells it as MLflow does)
            return None
        if not isinstance(predictions, np.ndarray) or predictions.dtype.kind not in "biufU":
            return None
        if predictions.dtype.kind == "f" and not np.isfinite(predictions).all():
            return None  # JSON has no NaN; MLflow writes it nevertheless
        return orjson.dumps({"predictions": predictions.tolist()})


class StatusError(FlopsError):
    """An error with another HTTP status than the catalogue's: the one that MLflow's server gives."""

    def __init__(self, code: ErrorCode, message: str, status: int) -> None:
        super().__init__(code, message)
        self.status = status


def _plain_rows(schema: Any) -> tuple[int | None, np.dtype[Any]]:
    """Width and type of the rows, when the model takes one array of two dimensions; else no width."""
    if schema is not None and schema.is_tensor_spec() and len(schema.inputs) == 1:
        shape, dtype = schema.inputs[0].shape, np.dtype(schema.inputs[0].type)
        if schema.inputs[0].name is None and len(shape) == 2 and shape[1] > 0 and dtype.kind in "if":
            return int(shape[1]), dtype
    return None, np.dtype(float)


def _row_predictor(model: PyFuncModel) -> Callable[[Any], Any]:
    """scikit-learn's own predict, because MLflow's checks cost more than it; other models: MLflow's."""
    conf = model.metadata.flavors.get("python_function", {})
    if "sklearn" in model.metadata.flavors and conf.get("predict_fn", "predict") == "predict":
        return cast(Callable[[Any], Any], model.get_raw_model().predict)
    return cast(Callable[[Any], Any], model.predict)


def _reason_of(exc: MlflowException) -> str:
    """The essence of MLflow's long messages: the innermost reason, one line."""
    trace = str(exc.json_kwargs.get("stack_trace") or "").strip()
    text = str(exc.message).partition(" IMPORTANT:")[0]
    if "valid JSON formatted string" in text:
        return _NOT_JSON
    if trace and "Traceback" in trace:
        errors = [line for line in trace.splitlines() if line and not line.startswith((" ", "Traceback"))]
        text = errors[0] if errors else text
    elif "Error: " in text:
        text = text.rpartition("Error: ")[2]
    line = text.strip().splitlines()[0][:_REASON_CHARACTERS] if text.strip() else "The input was refused."
    return line if line.endswith((".", "!", "?")) else f"{line}."


def application(model: Model, context: ActorContext, on_start: Callable[[], None]) -> Starlette:
    """The routes."""
    config = context.config
    described = {
        "project_id": config.get("project_id", context.project_id),
        "model": {"name": config.get("model_name", ""), "version": config.get("model_version", "")},
        "signature": model.signature(),
        "expected": model.expected,
        "mlflow_version": mlflow.__version__,
        "links": {"predict": "/invocations", "ping": "/ping", "health": "/health", "version": "/version"},
    }
    description = orjson.dumps(described)

    async def invocations(request: Request) -> Response:
        body = await _read_body(request)
        content_type = request.headers.get("content-type", "").strip()
        return _json(await run_in_threadpool(model.answer, body, content_type))

    async def describe(_: Request) -> Response:
        return _json(description)

    async def ping(_: Request) -> Response:
        return _json(b"\n")

    async def version(_: Request) -> Response:
        return _json(mlflow.__version__.encode())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        on_start()
        yield

    return Starlette(
        routes=[
            Route("/", describe),
            Route("/invocations", invocations, methods=["POST"]),
            Route("/ping", ping),
            Route("/health", ping),
            Route("/version", version),
        ],
        exception_handlers={
            FlopsError: _answer_error,
            HTTPException: _answer_http,
            Exception: _answer_defect,
        },
        lifespan=lifespan,
    )


async def _read_body(request: Request) -> bytes:
    chunks = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > BODY_BYTES_MOST:
            message = f"The request is larger than {BODY_BYTES_MOST // 2**20} MiB; send fewer rows at once."
            raise StatusError(ErrorCode.INPUT_INVALID, message, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        chunks.append(chunk)
    return b"".join(chunks)


def _json(content: bytes, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> Response:
    return Response(content, status, headers, media_type="application/json")


def _answer_error(_: Request, exc: Exception) -> Response:
    if not isinstance(exc, FlopsError):
        raise exc
    status = exc.status if isinstance(exc, StatusError) else exc.spec.http_status
    return _json(orjson.dumps(exc.to_dict()), status)


def _answer_http(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, HTTPException):
        raise exc
    code = ErrorCode.NOT_FOUND if exc.status_code == HTTPStatus.NOT_FOUND else ErrorCode.USAGE
    hint = "GET / describes the model and lists the addresses."
    error = FlopsError(code, f"{request.method} {request.url.path}: {exc.detail}.", hint=hint)
    return _json(orjson.dumps(error.to_dict()), exc.status_code, exc.headers)


def _answer_defect(_: Request, exc: Exception) -> Response:
    error = FlopsError(ErrorCode.INTERNAL, f"The prediction failed: {type(exc).__name__}.")
    return _json(orjson.dumps(error.to_dict()), error.spec.http_status)


def listen(host: str, port: int, *, is_fixed: bool = False) -> socket.socket:
    """A listening socket on `port`, or on any free one when it is taken.

    A fixed port may be that of another such service on this node, which this one is to replace.

    Raises:
        FlopsError: ``port_occupied`` when a fixed port is taken by anything else; ``config_invalid`` when
            `host` is not this machine's.
    """
    for candidate in (port,) if is_fixed else (port, 0):
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if is_fixed:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((host, candidate))
            listener.listen(_BACKLOG)
        except OSError as exc:
            listener.close()
            if is_fixed and exc.errno == errno.EADDRINUSE:
                raise FlopsError(ErrorCode.PORT_OCCUPIED, f"Port {port} of {host} is taken.") from exc
            if is_fixed or candidate == 0:
                raise FlopsError(
                    ErrorCode.CONFIG_INVALID, f"The inference server cannot listen on {host}: {exc.strerror}."
                ) from exc
        else:
            return listener
    raise AssertionError("the last candidate returns or raises")


def take_over(listener: socket.socket) -> None:
    """Have new connections come to this one of two services that listen on one port.

    Linux deals connections out to all listeners of a port by chance. A program of one instruction, "return
    1", chooses the second one: this one, as the other came before. When the other is gone, this one is the
    only one, whatever the program says. Where there is no such option, chance decides until the other ends.
    """
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 1))
    program = struct.pack("HP", 1, ctypes.addressof(instruction))
    with suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, program)


class Server(uvicorn.Server):
    """Serves until it is told to end; then it goes on for a moment, for who was about to ask.

    In that moment it closes each connection with its answer: a client that keeps its connections asks the
    service that has replaced this one next.

    Args:
        app: what answers.
        linger_s: how long the moment is.
    """

    def __init__(self, app: Starlette, linger_s: float) -> None:
        self._app = app
        self._linger_s = linger_s
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",  # it does not see that a method is a coroutine function
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=_ANSWERS_S,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, a moment later."""
        await asyncio.sleep(self._linger_s)
        await super().shutdown(sockets)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if self.should_exit and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, send_and_close)


@contextmanager
def load_deadline(events: EventLog, timeout_s: float) -> Iterator[None]:
    """End this process with ``model_unloadable`` when what is within takes longer than `timeout_s`."""

    def give_up() -> None:
        error = FlopsError(ErrorCode.MODEL_UNLOADABLE, f"The model was not loaded within {timeout_s:g} s.")
        events.tell("failed", error=error.to_dict())
        faulthandler.dump_traceback()
        os._exit(error.spec.exit_code)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    # Code that never lets another thread run is ended by a timer that needs no interpreter, without an event.
    faulthandler.dump_traceback_later(timeout_s + _GRACE_S, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def main(context: ActorContext, events: EventLog) -> None:
    """Load the model, listen, tell where, and serve until SIGTERM.

    Raises:
        FlopsError: ``model_unloadable``, ``config_invalid``, ``port_occupied``.
    """
    events.tell("progress", message="Loading the model.")
    with load_deadline(events, LOAD_TIMEOUT_S):
        model = Model(Path(context.repo_dir), tells_why=context.disclosure != Disclosure.NONE)
    is_fixed = bool(context.config.get("is_port_fixed", False))
    listener = listen(context.host, int(context.config.get("port", 8080)), is_fixed=is_fixed)
    if is_fixed:
        take_over(listener)
    host = f"[{context.host}]" if ":" in context.host else context.host
    address = f"{host}:{listener.getsockname()[1]}"
    app = application(model, context, lambda: events.tell("listening", address=address))
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn ends in peace, then raises the signal once more
    Server(app, _LINGER_S if is_fixed else 0.0).run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(run_actor(main))
