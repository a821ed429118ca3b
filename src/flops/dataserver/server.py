"""The ML data server: the catalogue over Arrow Flight, as `flops.wire.flight` describes it."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import dataclasses
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import flight

from flops.core.dataset import Bounds, Fragment
from flops.core.health import is_loopback
from flops.dataserver.catalogue import Catalogue, Upload
from flops.dataserver.endpoint import admin_token, announced, check_address
from flops.errors import ErrorCode, FlopsError
from flops.wire.cluster_tls import key_and_certificate
from flops.wire.flight import (
    AUTHORIZATION,
    PACED,
    SEALED,
    TAKEN,
    Action,
    Query,
    Right,
    Scope,
    UploadName,
    check_tag,
    decode_text,
    error_text,
    fragment_name,
    parse_criteria,
    parse_fragment_name,
    parse_object,
    parse_seal,
    parse_ticket,
    parse_upload_name,
    ticket_for,
    verify_token,
)
from flops.wire.keepalive import keep_connections_alive
from flops.wire.server_trust import ServerTrust, split_trust

STOP_GRACE_S = 5.0  # how long calls in progress may take when the server is asked to end
_LOOK_S = 1.0  # how soon a signal is seen that has come to another thread
_AUTHENTICATION = "authentication"
_M_ARENA_MAX = -8  # malloc.h
_log = logging.getLogger(__name__)
_TITLES = {
    Action.STATUS: "Tags with rows, bytes, columns and last write.",
    Action.LOCATE: "The files of a ticket's rows, for readers on the node that may open them.",
    Action.DESCRIBE: "A tag with its fragments, limits and, if asked for, statistics.",
    Action.DROP_TAG: "Remove all data of a tag.",
    Action.DROP_FRAGMENT: "Remove one upload.",
    Action.DROP_DATASET: "Remove one upload; the body is its name.",
    Action.SET_RETENTION: "Keep only the newest data of a tag.",
    Action.SET_QUOTA: "Refuse uploads beyond a size of the tag.",
}


class DataServer(flight.FlightServerBase):  # type: ignore[misc]  # pyarrow has no types
    """Serves a catalogue. It listens when the constructor returns; `shutdown` ends it.

    Args:
        catalogue: what is served.
        token: the admin token.
        host: address to listen on.
        port: port to listen on, 0 for a free one.
        identity: key and certificate to show, PEM, beginning with the key; "" not to encrypt.

    Raises:
        FlopsError: ``port_occupied``, or ``config_invalid`` when the host is not an address of this machine.
    """

    def __init__(self, catalogue: Catalogue, token: str, host: str, port: int, identity: str = "") -> None:
        self._catalogue = catalogue
        self._actions: Mapping[Action, Callable[[Scope, bytes], Any]] = {
            Action.STATUS: self._status,
            Action.LOCATE: self._locate,
            Action.DESCRIBE: self._describe,
            Action.DROP_TAG: self._drop_tag,
            Action.DROP_FRAGMENT: self._drop_fragment,
            Action.DROP_DATASET: self._drop_dataset,
            Action.SET_RETENTION: self._set_retention,
            Action.SET_QUOTA: self._set_quota,
        }
        check_address(host, port)
        make = flight.Location.for_grpc_tls if identity else flight.Location.for_grpc_tcp
        location = make(f"[{host}]" if ":" in host else host, port)
        certificates = [key_and_certificate(identity)] if identity else None
        try:
            # Requests can come in before this returns: everything they need is set above.
            super().__init__(
                location,
                tls_certificates=certificates,
                middleware={_AUTHENTICATION: _Authentication(token)},
            )
        except pa.ArrowException as exc:
            raise FlopsError(ErrorCode.PORT_OCCUPIED, f"Cannot listen on {host}:{port}: {exc}.") from exc

    def do_put(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.FlightMetadataWriter,
    ) -> None:
        """Store an upload. It is durable when the call succeeds, and leaves nothing when it fails."""
        with _errors_cross():
            name, promises = _upload_of(descriptor)
            _scope(context).check(Right.WRITE, [name.tag])
            keep_connections_alive(self.port)  # a device that vanishes would hold its upload open for good
            upload = self._catalogue.open_upload(name, reader.schema)
            try:
                sealed_rows = _receive(reader, upload, writer if PACED in promises else None)
                upload.seal()
                # The stream of a client that dies ends like that of one that is done; gRPC tells soon after.
                if context.is_cancelled() or (SEALED in promises and sealed_rows != upload.rows):
                    raise _incomplete(name, upload.rows)
                stored = upload.commit()
            except pa.ArrowException as exc:
                raise _incomplete(name, upload.rows) from exc
            finally:
                upload.discard()
            writer.write(pa.py_buffer(stored.model_dump_json().encode()))

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.FlightDataStream:
        """Stream the rows of a part of some tags, or of one fragment."""
        with _errors_cross():
            asked = parse_ticket(ticket.ticket)
            keep_connections_alive(self.port)
            if isinstance(asked, Query):
                _scope(context).check(Right.READ, asked.data_tags)
                schema, batches = self._catalogue.read(asked)
            else:
                _scope(context).check(Right.READ, [asked.tag])
                schema, batches = self._catalogue.read_fragment(asked)
            return flight.GeneratorStream(schema, _guarded(batches))

    def list_flights(self, context: flight.ServerCallContext, criteria: bytes) -> Iterator[flight.FlightInfo]:
        """One flight per fragment, of the tags in the criteria or of all that the token may read."""
        with _errors_cross():
            scope = _scope(context)
            tags = parse_criteria(criteria) or scope.data_tags
            scope.check(Right.READ, tags)
            found = self._catalogue.fragments(tags)
        return (_flight_of(fragment, schema) for fragment, schema in found)

    def get_flight_info(
        self, context: flight.ServerCallContext, descriptor: flight.FlightDescriptor
    ) -> flight.FlightInfo:
        """The flight of one fragment, or of a whole tag."""
        with _errors_cross():
            name, _ = _upload_of(descriptor)
            _scope(context).check(Right.READ, [name.tag])
            if name.id:
                return _flight_of(*self._catalogue.fragment(name))
            tag = self._catalogue.describe(name.tag).tag
            schema = self._catalogue.schema([name.tag])
            endpoint = flight.FlightEndpoint(ticket_for(Query((name.tag,))), [])
            path = flight.FlightDescriptor.for_path(name.tag)
            return flight.FlightInfo(schema, path, [endpoint], tag.rows, tag.size_bytes)

    def get_schema(
        self, context: flight.ServerCallContext, descriptor: flight.FlightDescriptor
    ) -> flight.SchemaResult:
        """The schema of a tag."""
        with _errors_cross():
            name, _ = _upload_of(descriptor)
            _scope(context).check(Right.READ, [name.tag])
            return flight.SchemaResult(self._catalogue.schema([name.tag]))

    def list_actions(self, context: flight.ServerCallContext) -> list[tuple[str, str]]:
        """Names and purposes of the actions."""
        with _errors_cross():
            _scope(context)
            return [(action.value, title) for action, title in _TITLES.items()]

    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> list[bytes]:
        """Run an action; the answer is one JSON object."""
        with _errors_cross():
            try:
                run = self._actions[Action(action.type)]
            except ValueError:
                raise FlopsError(
                    ErrorCode.USAGE,
                    f"There is no action {action.type!r:.80}.",
                    hint=f"The actions are {', '.join(self._actions)}.",
                ) from None
            return [json.dumps(run(_scope(context), action.body.to_pybytes())).encode()]

    def _status(self, scope: Scope, body: bytes) -> Any:
        scope.check(Right.READ)
        parse_object(body)
        tags = [tag for tag in self._catalogue.tags() if scope.covers(tag.name)]
        return {"tags": [tag.model_dump(mode="json") for tag in tags]}

    def _locate(self, scope: Scope, body: bytes) -> Any:
        asked = parse_ticket(body)
        if not isinstance(asked, Query):
            raise FlopsError(ErrorCode.USAGE, "Only the rows of tags can be located, not a fragment's.")
        scope.check(Right.READ, asked.data_tags)
        schema, files = self._catalogue.locate(asked)
        encoded = base64.b64encode(schema.serialize()).decode()
        return {"schema": encoded, "files": [dataclasses.astuple(file) for file in files]}

    def _describe(self, scope: Scope, body: bytes) -> Any:
        raw = parse_object(body)
        tag = _tag_in(raw)
        scope.check(Right.READ, [tag])
        is_with_statistics = raw.get("is_with_statistics") is True
        return self._catalogue.describe(tag, is_with_statistics=is_with_statistics).model_dump(mode="json")

    def _drop_tag(self, scope: Scope, body: bytes) -> Any:
        scope.check(Right.ADMIN)
        return {"fragments": self._catalogue.drop_tag(_tag_in(parse_object(body)))}

    def _drop_fragment(self, scope: Scope, body: bytes) -> Any:
        return self._drop_dataset(scope, str(parse_object(body).get("name", "")).encode())

    def _drop_dataset(self, scope: Scope, body: bytes) -> Any:
        scope.check(Right.ADMIN)
        self._catalogue.drop_fragment(parse_fragment_name(decode_text(body)))
        return {"fragments": 1}

    def _set_retention(self, scope: Scope, body: bytes) -> Any:
        scope.check(Right.ADMIN)
        raw = parse_object(body)
        return self._catalogue.set_retention(_tag_in(raw), _bounds_in(raw)).model_dump(mode="json")

    def _set_quota(self, scope: Scope, body: bytes) -> Any:
        scope.check(Right.ADMIN)
        raw = parse_object(body)
        return self._catalogue.set_quota(_tag_in(raw), _bounds_in(raw)).model_dump(mode="json")


def serve(
    catalogue: Catalogue,
    folder: Path,
    host: str,
    port: int,
    identity: str = "",
    trust: ServerTrust | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. The endpoint file is there as long as requests are answered.

    Args:
        catalogue: what is served.
        folder: where token and endpoint are.
        host: address to listen on.
        port: port to listen on, 0 for a free one.
        identity: see `DataServer`.
        trust: what that is known by, for programs of this machine.

    Raises:
        FlopsError: ``port_occupied``, ``config_invalid``, ``config_corrupt``.
    """
    _share_memory_between_threads()
    is_asked_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_asked_to_end.set())
    server = DataServer(catalogue, admin_token(folder), host, port, identity)
    if not identity and not is_loopback(host):
        _log.warning("The data server is open to other machines, without encryption.")
    with announced(folder, host, server.port, trust):
        _log.info("The data server listens on %s:%d", host, server.port)
        # The interpreter acts on a signal when this thread runs, and the system may give it to another one.
        while not is_asked_to_end.wait(_LOOK_S):
            pass
    # Shutting down waits for the calls in progress, also for a client that sends nothing any more. What it
    # has sent so far is not stored: the next start removes it.
    ending = threading.Thread(target=server.shutdown, daemon=True)
    ending.start()
    ending.join(STOP_GRACE_S)


def _share_memory_between_threads() -> None:
    """Have glibc use few arenas: each of gRPC's threads would keep its own, and double the memory held."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


class _Authentication(flight.ServerMiddlewareFactory):  # type: ignore[misc]  # pyarrow has no types
    """Finds out, for every call, what its token is good for; without one there is no call."""

    def __init__(self, token: str) -> None:
        self._token = token

    def start_call(self, info: flight.CallInfo, headers: Mapping[str, list[str]]) -> _Authenticated:
        del info
        with _errors_cross():
            for value in headers.get(AUTHORIZATION, []):
                scheme, _, token = value.partition(" ")
                if scheme.lower() == "bearer" and token:
                    return _Authenticated(verify_token(self._token, split_trust(token.strip())[0]))
            raise FlopsError(
                ErrorCode.UNAUTHENTICATED,
                "The call shows no token of this data server.",
                hint="Send the header 'authorization: Bearer …'; the token is in the file `token` of the "
                "data server's folder, and `flops data token` makes one for some tags only.",
            )


class _Authenticated(flight.ServerMiddleware):  # type: ignore[misc]  # pyarrow has no types
    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.scope = scope


def _scope(context: flight.ServerCallContext) -> Scope:
    scope: Scope = context.get_middleware(_AUTHENTICATION).scope
    return scope


@contextlib.contextmanager
def _errors_cross() -> Iterator[None]:
    """Have errors reach the client with code and hint; unexpected ones are logged whole and told briefly."""
    try:
        yield
    except FlopsError as exc:
        raise _flight_error(exc) from exc
    except flight.FlightError:
        raise
    except Exception as exc:
        _log.exception("A call has failed")
        error = FlopsError(
            ErrorCode.INTERNAL, "The data server has met an unexpected error; its log says more."
        )
        raise _flight_error(error) from exc


def _flight_error(error: FlopsError) -> Exception:
    kinds = {
        ErrorCode.UNAUTHENTICATED: flight.FlightUnauthenticatedError,
        ErrorCode.FORBIDDEN: flight.FlightUnauthorizedError,
    }
    crossing: Exception = kinds.get(error.code, flight.FlightServerError)(error_text(error))
    return crossing


def _guarded(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    with _errors_cross():
        yield from batches


def _receive(
    reader: flight.MetadataRecordBatchReader, upload: Upload, answers: flight.FlightMetadataWriter | None
) -> int:
    """Take in what is sent, and say so of each batch; returns the rows that the seal says, -1 without one."""
    sealed_rows = -1
    for chunk in reader:
        if chunk.data is not None:
            upload.write(chunk.data)
            if answers is not None:
                answers.write(pa.py_buffer(TAKEN))
        if chunk.app_metadata is not None:
            sealed_rows = parse_seal(chunk.app_metadata.to_pybytes())
    return sealed_rows


def _incomplete(name: UploadName, rows: int) -> FlopsError:
    label = fragment_name(name.tag, name.id) if name.id else name.tag
    return FlopsError(ErrorCode.UPLOAD_INCOMPLETE, f"The upload {label} broke off after {rows} rows.")


def _upload_of(descriptor: flight.FlightDescriptor) -> tuple[UploadName, tuple[str, ...]]:
    """What an upload is called, and what its client promises of how it sends it."""
    path = descriptor.path or []
    promises = tuple(decode_text(item) for item in path[1:])
    if not path or promises not in {(), (SEALED,), (SEALED, PACED)}:
        raise FlopsError(ErrorCode.NAME_INVALID, "The descriptor has no path of one name.")
    return parse_upload_name(decode_text(path[0])), promises


def _flight_of(fragment: Fragment, schema: pa.Schema) -> flight.FlightInfo:
    name = fragment_name(fragment.tag, fragment.id)
    endpoint = flight.FlightEndpoint(name, [])
    descriptor = flight.FlightDescriptor.for_path(name)
    return flight.FlightInfo(schema, descriptor, [endpoint], fragment.rows, fragment.size_bytes)


def _tag_in(raw: Mapping[str, Any]) -> str:
    return check_tag(str(raw.get("tag", "")))


def _bounds_in(raw: Mapping[str, Any]) -> Bounds:
    given = {key: raw.get(key) for key in ("max_rows", "max_bytes")}
    try:
        return Bounds.model_validate(given)
    except ValueError as exc:
        raise FlopsError(
            ErrorCode.USAGE,
            f"The limits {given} are not valid.",
            hint="Give whole numbers of 1 or more; none stands for unlimited.",
        ) from exc
