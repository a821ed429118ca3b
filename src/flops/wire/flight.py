"""How to talk to a node's ML data server over Arrow Flight: names, tickets, actions, tokens, errors.

| call | descriptor, ticket, criteria or body | right |
|---|---|---|
| DoPut | path ``<tag>`` or ``<tag>.<id>.parquet``, then optionally `SEALED`, then `PACED` | write |
| DoGet | `ticket_for`, or ``<tag>.<id>.parquet`` | read |
| ListFlights | `criteria_for`, or nothing for every tag the token may read | read |
| GetFlightInfo, GetSchema | path as for DoPut | read |
| DoAction | an `Action` with a JSON object as body; the answer is one JSON object | see `Action` |

Every call needs the header ``authorization: Bearer <token>``: the server's admin token, or a token minted
from it that is good for some tags only. Errors cross as text that ends in the JSON of `FlopsError.to_dict`.

This module is part of the actor kit: it imports the standard library only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flops.errors import ErrorCode, FlopsError

DEFAULT_PORT = 11_027
# In the server's folder, when it is ready: {"host", "port", "pid"}, and "name", "authority" when it encrypts.
ENDPOINT_FILE = "endpoint.json"
IDENTITY_FILE = "identity.pem"  # there, too: its key and certificate, when it encrypts
TAGS_FOLDER = "tags"  # in the server's folder: a folder for each tag, with the files of its rows
TOKEN_FILE = "token"  # noqa: S105 (a file name) in the server's folder: the admin token, 0600
AUTHORIZATION = "authorization"
DATA_SERVER = "ml-data-server"  # its id, among the services of its node
DIRECTLY = (("grpc.enable_http_proxy", 0),)  # the environment's proxies do not lead to nodes
SEALED = "sealed"  # second item of a DoPut's path: the upload ends with `seal`, or it is incomplete
PACED = "paced"  # third item: the server answers each batch with `TAKEN` when it has taken it in
TAKEN = b"taken"

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_SUFFIX = ".parquet"
_TOKEN_PREFIX = "flops1"  # noqa: S105 (names the token's format)
_MESSAGE_LIMIT = 1_000  # characters; gRPC refuses a call's trailers above 8 KiB
_DETAILS_LIMIT = 3_000


def data_server_name(node_id: str) -> str:
    """The name that a node's ML data server has in its certificate, at whatever address it is dialled."""
    return f"{node_id}.data.flops.internal"


def aggregator_name(project_id: str) -> str:
    """The name that a project's aggregator has in its certificate, at whatever address it is dialled."""
    return f"{project_id}.aggregator.flops.internal"


class Action(StrEnum):
    """Actions of the data server, with the right each needs and its body."""

    STATUS = "status"  # read; {} -> {"tags": [DataTag]}
    LOCATE = "locate"  # read; `ticket_for` -> {"schema", "files": [RowFile as a list]}
    DESCRIBE = "describe"  # read; {"tag", "is_with_statistics"?} -> TagDescription
    DROP_TAG = "drop_tag"  # admin; {"tag"} -> {"fragments": n}
    DROP_FRAGMENT = "drop_fragment"  # admin; {"name"} -> {"fragments": 1}
    DROP_DATASET = "drop_dataset"  # admin; body is the name itself, as the ancestor's clients send it
    SET_RETENTION = "set_retention"  # admin; {"tag", "max_rows", "max_bytes"} -> TagLimits
    SET_QUOTA = "set_quota"  # admin; {"tag", "max_rows", "max_bytes"} -> TagLimits


class Right(StrEnum):
    """What a token is good for. Admin is good for everything."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


@dataclass(frozen=True)
class Scope:
    """What a token may do, and with which tags; no tags stands for all of them."""

    right: Right
    data_tags: tuple[str, ...] = ()

    def check(self, right: Right, tags: Iterable[str] = ()) -> None:
        """Refuse what the token is not good for.

        Raises:
            FlopsError: ``forbidden``.
        """
        if self.right is Right.ADMIN:
            return
        if self.right is not right:
            raise FlopsError(
                ErrorCode.FORBIDDEN,
                f"This needs the right to {right.value}; the token may {self.right.value}.",
            )
        for tag in tags:
            if not self.covers(tag):
                raise FlopsError(
                    ErrorCode.FORBIDDEN,
                    f"The token may {right.value} {', '.join(self.data_tags)}, but not {tag[:80]!r}.",
                )

    def covers(self, tag: str) -> bool:
        """Whether the token is for this tag."""
        return not self.data_tags or tag in self.data_tags


ADMIN = Scope(Right.ADMIN)


def mint_token(admin_token: str, scope: Scope) -> str:
    """Make a token from the admin token that is good for `scope` and no more.

    It is valid as long as the admin token is; nothing needs to be told to the server.
    """
    claim = json.dumps({"right": scope.right.value, "data_tags": sorted(scope.data_tags)}).encode()
    return f"{_TOKEN_PREFIX}.{_encode(claim)}.{_encode(_sign(admin_token, claim))}"


def verify_token(admin_token: str, token: str) -> Scope:
    """Tell what a token is good for.

    Raises:
        FlopsError: ``unauthenticated`` when it is neither the admin token nor minted from it.
    """
    if hmac.compare_digest(token.encode(), admin_token.encode()):
        return ADMIN
    parts = token.split(".")
    if len(parts) == 3 and parts[0] == _TOKEN_PREFIX:
        try:
            claim, signature = _decode(parts[1]), _decode(parts[2])
        except (binascii.Error, ValueError):
            claim, signature = b"", b""
        if hmac.compare_digest(signature, _sign(admin_token, claim)):
            raw = json.loads(claim)
            return Scope(Right(raw["right"]), tuple(raw["data_tags"]))
    raise FlopsError(ErrorCode.UNAUTHENTICATED, "The token is not one of this data server.")


def bearer(token: str) -> tuple[bytes, bytes]:
    """The header of a call that shows the token."""
    return AUTHORIZATION.encode(), f"Bearer {token}".encode()


def check_tag(tag: str) -> str:
    """Return the tag if it is one.

    Raises:
        FlopsError: ``tag_invalid``.
    """
    if not _TAG.fullmatch(tag):
        raise FlopsError(ErrorCode.TAG_INVALID, f"{tag[:80]!r} is not a data tag.")
    return tag


@dataclass(frozen=True)
class UploadName:
    """The name of an upload; without an id, the server names it by its content."""

    tag: str
    id: str = ""


def parse_upload_name(name: str) -> UploadName:
    """Read ``<tag>`` or ``<tag>.<id>.parquet``.

    Raises:
        FlopsError: ``name_invalid``, or ``tag_invalid`` when only the tag is wrong.
    """
    if "." not in name:
        return UploadName(check_tag(name))
    return parse_fragment_name(name)


def parse_fragment_name(name: str) -> UploadName:
    """Read ``<tag>.<id>.parquet``.

    Raises:
        FlopsError: ``name_invalid``, or ``tag_invalid`` when only the tag is wrong.
    """
    tag, dot, fragment_id = name.removesuffix(_SUFFIX).rpartition(".")
    if not (dot and name.endswith(_SUFFIX) and _ID.fullmatch(fragment_id)) or "/" in tag or "\\" in tag:
        raise FlopsError(ErrorCode.NAME_INVALID, f"{name[:120]!r} does not name an upload.")
    return UploadName(check_tag(tag), fragment_id)


def fragment_name(tag: str, fragment_id: str) -> str:
    """``<tag>.<id>.parquet``."""
    return f"{tag}.{fragment_id}{_SUFFIX}"


def seal(rows: int) -> bytes:
    """The last message of a sealed upload: how many rows it has."""
    return json.dumps({"rows": rows}).encode()


def parse_seal(message: bytes) -> int:
    """Read a `seal`; -1, which fits no upload, when it is none."""
    try:
        raw = json.loads(message)
        return int(raw["rows"])
    except (ValueError, KeyError, TypeError):
        return -1


@dataclass(frozen=True)
class Query:
    """Which rows to read: the `part`-th of `parts` disjoint parts of everything under the tags."""

    data_tags: tuple[str, ...]
    part: int = 0
    parts: int = 1


def ticket_for(query: Query) -> bytes:
    """The ticket of a DoGet."""
    return json.dumps({"data_tags": list(query.data_tags), "part": query.part, "parts": query.parts}).encode()


def parse_ticket(ticket: bytes) -> Query | UploadName:
    """Read a ticket: JSON, or the name of a fragment.

    Raises:
        FlopsError: ``usage``, ``tag_invalid``, ``name_invalid``.
    """
    if not ticket.lstrip().startswith(b"{"):
        return parse_fragment_name(decode_text(ticket))
    raw = parse_object(ticket)
    part, parts = raw.get("part", 0), raw.get("parts", 1)
    if not (type(part) is int and type(parts) is int and 0 <= part < parts):
        raise FlopsError(
            ErrorCode.USAGE,
            f"The ticket asks for part {part!r} of {parts!r}; parts are counted from 0.",
            hint='Send {"data_tags": ["…"], "part": 0, "parts": 1}.',
        )
    tags = _parse_tags(raw)
    if not tags:
        raise FlopsError(ErrorCode.USAGE, 'The ticket names no tag in "data_tags".')
    return Query(tags, part, parts)


@dataclass(frozen=True)
class RowFile:
    """A Parquet file of rows on the data server's machine.

    Args:
        path: absolute; "" when there is none.
        first_row: number of its first row: row r belongs to part ``r % parts``.
        rows: how many it has.
    """

    path: str
    first_row: int
    rows: int


def criteria_for(data_tags: Iterable[str]) -> bytes:
    """The criteria of a ListFlights."""
    return json.dumps({"data_tags": list(data_tags)}).encode()


def parse_criteria(criteria: bytes) -> tuple[str, ...]:
    """Tags to list; none stands for all. One tag may stand as plain text in the place of the list.

    Raises:
        FlopsError: ``usage``, ``tag_invalid``.
    """
    return _parse_tags(parse_object(criteria)) if criteria.strip() else ()


def parse_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object; nothing at all stands for an empty one.

    Raises:
        FlopsError: ``usage``.
    """
    try:
        raw = json.loads(body or b"{}")
    except ValueError as exc:
        raise FlopsError(ErrorCode.USAGE, f"{body[:80]!r} is not JSON: {exc}.") from exc
    if not isinstance(raw, dict):
        raise FlopsError(ErrorCode.USAGE, f"{body[:80]!r} is not a JSON object.")
    return raw


def decode_text(raw: bytes) -> str:
    """Read a name.

    Raises:
        FlopsError: ``name_invalid``.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise FlopsError(ErrorCode.NAME_INVALID, f"{raw[:80]!r} is not UTF-8.") from exc


def error_text(error: FlopsError) -> str:
    """The text of a failed call: a sentence for people, then the whole error as JSON."""
    raw = error.to_dict()
    raw["message"] = raw["message"][:_MESSAGE_LIMIT]
    if len(json.dumps(raw["details"])) > _DETAILS_LIMIT:
        raw["details"] = {}
    return f"{raw['message']} {json.dumps(raw)}"


def parse_error(text: str) -> FlopsError | None:
    """Find the error in the text of a failed call; None when the server did not put one there."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r'\{"code": ', text):
        try:
            raw, _ = decoder.raw_decode(text, match.start())
        except ValueError:
            continue
        if raw.keys() >= {"message", "hint", "details"}:
            return FlopsError.from_dict(raw)
    return None


def _parse_tags(raw: Mapping[str, Any]) -> tuple[str, ...]:
    tags = raw.get("data_tags")
    if tags is None:
        return ()
    if isinstance(tags, str):
        return (check_tag(tags),)
    if not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        raise FlopsError(ErrorCode.USAGE, f'"data_tags" is {tags!r:.80}, not a list of tags.')
    return tuple(dict.fromkeys(check_tag(tag) for tag in tags))


def _sign(admin_token: str, claim: bytes) -> bytes:
    return hmac.new(admin_token.encode(), _TOKEN_PREFIX.encode() + claim, hashlib.sha256).digest()


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
