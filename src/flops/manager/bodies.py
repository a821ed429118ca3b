"""Reads the bodies of requests: JSON objects, and blobs that are too large for memory."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, NoReturn

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from flops.core.ids import Digest
from flops.errors import ErrorCode, FlopsError
from flops.ports import BlobStreams

MAX_JSON_BYTES = 1_048_576
MAX_BLOB_BYTES = 4 * 1024**3
_HINT = "Send the file's bytes as the body, as they are."


async def read_json_object(request: Request) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises:
        FlopsError: ``sla_unreadable``: it is empty, too large, malformed, or no object.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_JSON_BYTES:
            raise _unreadable(f"it is larger than {MAX_JSON_BYTES} bytes")
    if not data.strip():
        raise _unreadable("it is empty")
    try:
        content = json.loads(bytes(data), parse_constant=_refuse_number, parse_float=_finite)
    except (ValueError, RecursionError) as exc:
        raise _unreadable(str(exc)) from exc
    if not isinstance(content, dict):
        raise _unreadable(f"it is not an object but {type(content).__name__}")
    return content


async def receive_blob(request: Request, blobs: BlobStreams) -> Digest:
    """Store the request's body as a blob.

    Raises:
        FlopsError: ``usage`` when it is empty or too large; ``upload_incomplete``; ``disk_full``.
    """
    upload = await run_in_threadpool(blobs.upload)
    digest = hashlib.sha256()
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_BLOB_BYTES:
                raise FlopsError(
                    ErrorCode.USAGE, f"The blob is larger than {MAX_BLOB_BYTES} bytes.", hint=_HINT
                )
            digest.update(chunk)
            await run_in_threadpool(upload.write, chunk)
        if size == 0:
            raise FlopsError(
                ErrorCode.USAGE, "The request has no body, a blob has at least one byte.", hint=_HINT
            )
        name = Digest(digest.hexdigest())
        await run_in_threadpool(upload.commit, name)
        return name
    except ClientDisconnect as exc:
        raise FlopsError(ErrorCode.UPLOAD_INCOMPLETE, "The upload broke off.") from exc
    finally:
        await run_in_threadpool(upload.discard)


def _unreadable(reason: str) -> FlopsError:
    return FlopsError(
        ErrorCode.SLA_UNREADABLE,
        f"The request's body cannot be read as JSON: {reason}.",
        hint="Send one JSON object; docs/sla.md has examples.",
    )


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large a number")
    return number
