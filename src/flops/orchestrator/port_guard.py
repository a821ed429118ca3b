"""What an encrypted cluster's port asks of those who knock: a node's certificate, or a service's key.

Open are only the sign of life, the authority's certificate, and joining, which asks for a token.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from flops.core.admission import Caller, PeerCertificate, is_relay
from flops.core.cluster import Service, ServiceKind
from flops.core.clusters import DEFAULT_CLUSTER, check_cluster_name
from flops.core.model import Value
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.admission import Admission
from flops.wire.flight import DATA_SERVER
from flops.wire.http_credentials import basic_credentials
from flops.wire.join import (
    AUTHORITY_PATH,
    CLUSTER_HEADER,
    CLUSTER_JOIN_PATH,
    CLUSTER_RENEWAL_PATH,
    JOIN_PATH,
    NODE_HEADER,
    PEER_EXTENSION,
    PRESENCE_PATH,
    RENEWAL_PATH,
    SERVICE_PATH,
    AuthorityShown,
    CertificateSigned,
    ClusterJoinRequest,
    JoinRequest,
    RenewalRequest,
    ServiceCertificateRequest,
    read_node_header,
)
from flops.wire.services import TRACKING_PATH

_OPEN = frozenset({"/", AUTHORITY_PATH, JOIN_PATH})
_FOR_SERVICES = ("/api/blobs/", "/api/packages/", "/v2/")
_LONGEST_REQUEST = 64 * 1024

_log = logging.getLogger(__name__)

M = TypeVar("M", bound=Value)
_Sign = Callable[[Any, Caller], str]  # a certificate for who asks by a model, PEM


def caller_of(scope: Scope) -> Caller:
    """Who is at the other side of a connection; of what a relay passes on, the node behind it.

    What stands in the headers of anybody else than a relay counts only where no certificates are asked for.

    Raises:
        FlopsError: ``usage`` for a cluster that cannot have that name.
    """
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    cluster = headers.get(CLUSTER_HEADER.encode(), DEFAULT_CLUSTER)
    cluster = cluster if cluster == DEFAULT_CLUSTER else check_cluster_name(cluster)
    shown = peer_of(scope)
    if shown is None or not is_relay(shown.name):
        return Caller(peer=shown, cluster=cluster)
    behind = read_node_header(headers.get(NODE_HEADER.encode(), ""))
    return Caller(peer=None if behind is None or is_relay(behind.name) else behind, relay=shown)


def peer_of(scope: Scope) -> PeerCertificate | None:
    """The certificate that the other side of a connection has shown."""
    found = (scope.get("extensions") or {}).get(PEER_EXTENSION)
    return found if isinstance(found, PeerCertificate) else None


class PortGuard:
    """ASGI middleware around everything on the cluster's port.

    Args:
        app: what it guards.
        admission: decides.
        running: the service of an id, unless it has ended or there is none.
        call: runs a function in a thread, so that the loop never waits for the disk.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        running: Callable[[str], Service | None],
        call: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._app = app
        self._admission = admission
        self._running = running
        self._call = call
        self._signs: Mapping[str, tuple[type[Value], _Sign]] = {
            JOIN_PATH: (JoinRequest, lambda wanted, caller: admission.join(wanted, caller).pem),
            RENEWAL_PATH: (
                RenewalRequest,
                lambda wanted, caller: admission.renew(caller, wanted.signing_request).pem,
            ),
            CLUSTER_JOIN_PATH: (ClusterJoinRequest, lambda wanted, _: admission.join_relay(wanted).pem),
            CLUSTER_RENEWAL_PATH: (
                RenewalRequest,
                lambda wanted, caller: admission.renew_relay(caller, wanted.signing_request).pem,
            ),
            SERVICE_PATH: (ServiceCertificateRequest, self._certify),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or pass it on. A node's link is checked where it says who it is."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            answer = await self._answer(scope, receive)
        except FlopsError as error:
            client = (scope.get("client") or ("?",))[0]
            _log.warning("%s %s of %s is refused: %s", scope["method"], scope["path"], client, error)
            answer = JSONResponse(error.to_dict(), status_code=error.spec.http_status)
            if error.code is ErrorCode.UNAUTHENTICATED:
                answer.headers["WWW-Authenticate"] = 'Basic realm="flops"'
        await (answer or self._app)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Response | None:
        """The answer to what is about certificates; None for what is let through."""
        method, path, caller = scope["method"], scope["path"], caller_of(scope)
        if (method, path) == ("GET", AUTHORITY_PATH):
            return JSONResponse(AuthorityShown(certificate=self._admission.authority_pem).model_dump())
        if method == "POST" and path in self._signs:
            kind, sign = self._signs[path]
            wanted = await read_body(kind, scope, receive)
            certificate = await self._call(lambda: sign(wanted, caller))
            return JSONResponse(CertificateSigned(certificate=certificate).model_dump())
        if path not in _OPEN:
            await self._check(scope, caller)
        return None

    def _certify(self, wanted: ServiceCertificateRequest, caller: Caller) -> str:
        if wanted.service_id == DATA_SERVER:
            return self._admission.certify_data_server(caller, wanted.signing_request)
        service = self._running(wanted.service_id)
        return self._admission.certify_service(caller, service, wanted.signing_request)

    async def _check(self, scope: Scope, caller: Caller) -> None:
        if scope["path"] == PRESENCE_PATH:
            await self._call(lambda: self._admission.check_relay(caller))
            return
        is_tracking = scope["path"].startswith(f"{TRACKING_PATH}/")
        if not is_tracking and (caller.peer is not None or not scope["path"].startswith(_FOR_SERVICES)):
            await self._call(lambda: self._admission.check(caller))
            return
        await self._call(lambda: self._admission.cluster_of(caller))
        service_id, key = basic_credentials(scope)
        if not key:
            raise FlopsError(
                ErrorCode.UNAUTHENTICATED,
                f"{scope['method']} {scope['path']} needs a node's certificate or a service's key.",
                hint="Only nodes of this cluster, and services on them, are served here.",
            )
        service = self._running(service_id) if self._admission.is_service_key(service_id, key) else None
        if service is None:
            raise FlopsError(
                ErrorCode.FORBIDDEN,
                f"The key shown for service {service_id[:80]!r} is not valid, or the service has ended.",
                hint="Keys are good while their service runs.",
            )
        if is_tracking and service.spec.kind is not ServiceKind.AGGREGATOR:
            raise FlopsError(
                ErrorCode.FORBIDDEN,
                f"Service {service_id} is a {service.spec.kind.value}, which has nothing to do in MLflow.",
                hint="Aggregators track; people use the manager's port.",
            )


async def read_body(model: type[M], scope: Scope, receive: Receive) -> M:
    """The body of a request, as a model.

    Raises:
        FlopsError: ``usage``.
    """
    body = b""
    async for piece in Request(scope, receive).stream():
        body += piece
        if len(body) > _LONGEST_REQUEST:
            raise FlopsError(ErrorCode.USAGE, "The node's request is too long.")
    try:
        return model.model_validate_json(body)
    except ValidationError as exc:
        raise invalid_from_node(exc, "The node's request", whole="it") from exc


def invalid_from_node(exc: ValidationError, what: str, *, whole: str) -> FlopsError:
    """The error of what a node sent and no model takes.

    Args:
        exc: why not.
        what: it was, as the beginning of a sentence.
        whole: what stands for the place when it is not in a part of it.
    """
    first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or whole
    return FlopsError(
        ErrorCode.USAGE,
        f"{what} is invalid at {where}: {first['msg']}.",
        hint="Install the same FLOps version on the node and on the cluster.",
    )
