"""MLflow's REST API: calls, uploads, and the one place where its failures become errors of ours."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx

from flops.errors import ErrorCode, FlopsError

_RETRY_PAUSES_S = (0.1, 0.5, 1.0)
_PASSING = frozenset({429, 502, 503, 504})  # answers of a server that will do better soon
_TAG_CHARACTERS = 5000  # MLflow's limit
_BAD_KEY_CHARACTERS = re.compile(r"[^\w\-. :/]")


class RefusedError(FlopsError):
    """MLflow's answer that it will not do something, with MLflow's own code for why."""

    def __init__(self, message: str, mlflow_code: str) -> None:
        super().__init__(ErrorCode.TRACKING_FAILED, message)
        self.mlflow_code = mlflow_code


class MlflowRest:
    """A client of one MLflow server. Safe to use from several threads.

    Args:
        uri: ``http://host:port`` of the server.
        timeout_s: longest wait for one answer.
        options: of the HTTP client, such as `verify`: how to encrypt.
    """

    def __init__(self, uri: str, timeout_s: float, **options: Any) -> None:
        self._uri = uri
        self._client = httpx.Client(timeout=timeout_s, trust_env=False, **options)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def call(
        self, method: str, path: str, body: Mapping[str, Any], *, is_repeatable: bool = True
    ) -> dict[str, Any]:
        """Call ``/api/2.0/mlflow/<path>``.

        Args:
            method: GET, POST, PATCH or DELETE.
            path: the rest of the path.
            body: the query of a GET, the JSON body of the others.
            is_repeatable: whether it does no harm when the call reaches MLflow twice.

        Raises:
            FlopsError: ``unreachable``, ``timeout``, ``tracking_failed`` (then a `RefusedError`).
        """
        url = f"{self._uri}/api/2.0/mlflow/{path}"
        content = {"params": dict(body)} if method == "GET" else {"json": dict(body)}
        return dict(self._send(method, url, content, is_repeatable=is_repeatable).json())

    def find(self, path: str, query: Mapping[str, Any]) -> dict[str, Any] | None:
        """GET something that may not exist; then None."""
        try:
            return self.call("GET", path, query)
        except RefusedError as exc:
            if exc.mlflow_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def upload(self, uri: str, content: bytes, media_type: str = "application/octet-stream") -> None:
        """Store an artifact under a ``mlflow-artifacts:/…`` URI.

        Raises:
            FlopsError: as `call`; ``tracking_failed`` for a server that keeps artifacts elsewhere.
        """
        scheme, _, path = uri.partition(":/")
        if scheme != "mlflow-artifacts":
            raise FlopsError(
                ErrorCode.TRACKING_FAILED,
                f"MLflow at {self._uri} keeps artifacts at {uri}, where they cannot be sent over HTTP.",
            )
        url = f"{self._uri}/api/2.0/mlflow-artifacts/artifacts/{quote(path.strip('/'))}"
        request = {"content": content, "headers": {"content-type": media_type}}
        self._send("PUT", url, request, is_repeatable=True)

    def _send(
        self, method: str, url: str, request: Mapping[str, Any], *, is_repeatable: bool
    ) -> httpx.Response:
        for pause_s in _RETRY_PAUSES_S:
            try:
                response = self._client.request(method, url, **request)
            except (httpx.ConnectError, httpx.PoolTimeout):
                pass  # it has not reached MLflow
            except httpx.ReadTimeout as exc:
                raise self._unanswered(exc) from exc  # the wait was long enough
            except httpx.TransportError as exc:
                if not is_repeatable:
                    raise self._unanswered(exc) from exc
            else:
                if response.status_code not in _PASSING or not is_repeatable:
                    return self._checked(response)
            time.sleep(pause_s)
        try:
            return self._checked(self._client.request(method, url, **request))
        except httpx.TransportError as exc:
            raise self._unanswered(exc) from exc

    def _unanswered(self, exc: httpx.TransportError) -> FlopsError:
        code = ErrorCode.TIMEOUT if isinstance(exc, httpx.TimeoutException) else ErrorCode.UNREACHABLE
        return FlopsError(
            code, f"The MLflow server at {self._uri} did not answer ({type(exc).__name__}: {exc})."
        )

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        try:
            body = response.json()
            mlflow_code, message = str(body["error_code"]), str(body.get("message", ""))
        except (ValueError, LookupError, TypeError, AttributeError):
            mlflow_code, message = f"HTTP {response.status_code}", response.text[:500]
        what = f"{response.request.method} {response.request.url.path}"
        raise RefusedError(f"MLflow at {self._uri} refused {what}: {mlflow_code}: {message}", mlflow_code)


def json_number(value: float) -> float | str:
    """A number as MLflow's JSON has it."""
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def key_of(name: str) -> str:
    """A name as MLflow takes it for parameters, metrics and tags."""
    return _BAD_KEY_CHARACTERS.sub("_", name)[:250] or "_"


def items(values: Mapping[str, str]) -> list[dict[str, str]]:
    """Tags as MLflow's JSON has them; values that are too long for it are cut."""
    return [{"key": key_of(key), "value": str(value)[:_TAG_CHARACTERS]} for key, value in values.items()]


def now_ms() -> int:
    """Milliseconds since the epoch, as MLflow keeps times."""
    return time.time_ns() // 1_000_000
