"""Blobs of the cluster, fetched over HTTP."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any

import httpx

from flops.core.ids import Digest
from flops.durable_file import file_error
from flops.errors import ErrorCode, FlopsError

_TIMEOUT_S = 30.0  # without a single byte
_CHUNK_BYTES = 1_048_576


class HttpBlobClient:
    """Fetches blobs into files.

    Args:
        url: base URL of the blobs.
        options: of the HTTP client, such as `verify`: how to encrypt.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._url = url
        self._options = options

    def fetch(self, digest: Digest, path: Path) -> None:
        """Bring a blob's verified bytes into a file; it is whole or it is not there.

        Raises:
            FlopsError: ``unreachable``, ``not_found``, ``disk_full``, ``file_unreadable``, or
                ``upload_incomplete`` when the bytes are others than asked for.
        """
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            self._download(digest, temporary)
            temporary.replace(path)
        except httpx.HTTPError as exc:
            raise FlopsError(
                ErrorCode.UNREACHABLE, f"Blob {digest[:12]} cannot be fetched from {self._url}: {exc}."
            ) from exc
        except OSError as exc:
            raise file_error(exc, path) from exc
        finally:
            temporary.unlink(missing_ok=True)

    def _download(self, digest: Digest, path: Path) -> None:
        seen = hashlib.sha256()
        # The environment's proxies do not lead to the cluster.
        with (
            httpx.Client(trust_env=False, timeout=_TIMEOUT_S, **self._options) as client,
            client.stream("GET", f"{self._url}/{digest}") as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise _refused(digest, response)
            with path.open("xb") as file:
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    seen.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        if seen.hexdigest() != digest:
            raise FlopsError(
                ErrorCode.UPLOAD_INCOMPLETE,
                f"Blob {digest[:12]} arrived with other bytes than it should have.",
                hint="Look at the blobs of the control plane: the disk may be damaged.",
            )


def _refused(digest: Digest, response: httpx.Response) -> FlopsError:
    response.read()
    try:
        error = FlopsError.from_dict(response.json())
    except (ValueError, AttributeError):
        error = FlopsError(ErrorCode.UNREACHABLE, f"The cluster answered {response.status_code}")
    if response.status_code >= 500 and error.code is not ErrorCode.INTERNAL:
        return FlopsError(ErrorCode.UNREACHABLE, f"Blob {digest[:12]} cannot be fetched: {error.message}")
    return error
