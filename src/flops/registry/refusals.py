"""What the registry answers when it does not do what was asked: codes that clients of registries know."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse, Response

from flops.errors import ErrorCode, FlopsError

# Our own errors as clients of registries understand them: HTTP status and code of the distribution's.
_OF_ERRORS: Mapping[ErrorCode, tuple[int, str]] = {
    ErrorCode.NOT_FOUND: (404, "BLOB_UNKNOWN"),
    ErrorCode.UPLOAD_INCOMPLETE: (400, "DIGEST_INVALID"),
    ErrorCode.IMAGE_DAMAGED: (400, "MANIFEST_INVALID"),
    ErrorCode.DISK_FULL: (507, "DENIED"),
}


class RefusedError(Exception):
    """A request that is not met.

    Args:
        status: HTTP status.
        code: one of the distribution specification's error codes.
        message: one sentence for people.
        headers: of the answer.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})


def answer_refusal(error: RefusedError) -> Response:
    """The answer to a request that is not met."""
    body = {"errors": [{"code": error.code, "message": error.message, "detail": {}}]}
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def answer_error(error: FlopsError) -> Response:
    """The answer when one of our own parts refuses."""
    status, code = _OF_ERRORS.get(error.code, (500, "UNKNOWN"))
    return answer_refusal(RefusedError(status, code, error.message))
