"""The manager's REST application."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path

from flops import __version__
from flops.core.sla import MockDataSla, ProjectSla
from flops.errors import ErrorCode, FlopsError
from flops.manager.cluster_routes import ClusterDesk, build_cluster_routes
from flops.manager.engine import Engine
from flops.manager.gate import Gate, error_response
from flops.manager.images import ImageShelf
from flops.manager.routes import build_authority, build_routes
from flops.ports import BlobStreams
from flops.wire.join import MANAGER_AUTHORITY_PATH
from flops.wire.rest import ControlStatus, ErrorBody, Message

_HINT = "/docs lists every endpoint with its parameters."
_SCHEMA_REF = "#/components/schemas/{model}"


def build_app(
    engine: Engine,
    *,
    token: str,
    status: Callable[[], ControlStatus],
    blobs: BlobStreams,
    images: ImageShelf,
    clusters: ClusterDesk,
    authority: str = "",
) -> FastAPI:
    """Build the REST application.

    Args:
        engine: a started engine. Streams of events end when it is closed: close it before the server waits
            for its connections.
        token: the admin token.
        status: tells the state of the control plane; quick, and called on several threads.
        blobs: take the datasets that users send along.
        images: those in the registry.
        clusters: those that have joined, and how others join.
        authority: certificate that the manager is known by, PEM; "" when there is none of our own.
    """
    app = FastAPI(
        title="FLOps",
        summary="Federated learning operations",
        version=__version__,
        redirect_slashes=False,
        redoc_url=None,
        responses={"default": {"model": ErrorBody, "description": "Any failure"}},
    )

    @app.get("/")
    def answer_ok() -> Message:
        """Says that the manager runs."""
        return Message(message="ok")

    app.include_router(build_routes(engine, status, blobs, images))
    app.include_router(build_cluster_routes(engine, clusters))
    app.include_router(build_authority(authority))
    _describe(app)

    @app.get("/openapi/openapi.json", include_in_schema=False)
    def describe_where_the_ancestor_did() -> JSONResponse:
        return JSONResponse(app.openapi())

    app.add_exception_handler(FlopsError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    app.add_middleware(Gate, token=token)
    return app


def _answer_error(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, FlopsError):
        raise exc
    return error_response(exc, request.state.request_id)


def _answer_http_error(request: Request, exc: Exception) -> Response:
    """The framework's own refusals: no such path, no such method."""
    if not isinstance(exc, HTTPException):
        raise exc
    what = f"{request.method} {request.url.path}"
    headers = dict(exc.headers or {})
    if exc.status_code == 404:
        error = FlopsError(ErrorCode.NOT_FOUND, f"There is no {what}.")
    elif exc.status_code == 405:
        headers["Allow"] = ", ".join(_methods_of(request))
        message = f"There is no {what}; this address takes {headers['Allow']}."
        error = FlopsError(ErrorCode.USAGE, message, hint=_HINT)
    else:
        error = FlopsError(ErrorCode.USAGE, f"{what} was refused: {exc.detail}.", hint=_HINT)
    return error_response(error, request.state.request_id, status=exc.status_code, headers=headers)


def _methods_of(request: Request) -> list[str]:
    """All methods of an address: the framework names those of the first endpoint only."""
    methods: set[str] = set()
    for path, operations in request.app.openapi()["paths"].items():
        if compile_path(path)[0].match(request.url.path):
            methods |= {method.upper() for method in operations}
    return sorted(methods)


def _answer_invalid_request(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, RequestValidationError):
        raise exc
    problems = [
        {"where": ".".join(str(part) for part in error["loc"]), "problem": error["msg"]}
        for error in exc.errors()
    ]
    sentence = "; ".join(f"{p['where']}: {p['problem']}" for p in problems)
    error = FlopsError(
        ErrorCode.USAGE,
        f"{request.method} {request.url.path} was called wrongly: {sentence}.",
        hint=_HINT,
        details={"problems": problems},
    )
    return error_response(error, request.state.request_id)


def _describe(app: FastAPI) -> None:
    """Complete the OpenAPI document by what the framework cannot see: SLAs, token, one shape of errors."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, summary=app.summary, routes=app.routes
            )
            components = document.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            for model in (ProjectSla, MockDataSla):
                schema = model.model_json_schema(ref_template=_SCHEMA_REF, by_alias=True)
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if path not in {"/", MANAGER_AUTHORITY_PATH}:
                        operation["security"] = [{"token": []}]
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
