"""Typed client of the manager's REST API (`flops.wire.rest`)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx

from flops.core.model import Value
from flops.core.project import Project, ProjectEvent
from flops.errors import ErrorCode, FlopsError

_RECONNECT_AFTER_S = 0.5
_GIVE_UP_AFTER_S = 60.0

M = TypeVar("M", bound=Value)


class ApiClient:
    """Talks to a manager; failures become the `FlopsError` that the manager raised.

    Args:
        url: base URL of the manager.
        token_file: file with the admin token; it is read anew for each client.
    """

    def __init__(self, url: str, token_file: Path) -> None:
        try:
            token = token_file.read_text().strip()
        except OSError as exc:
            raise FlopsError(
                ErrorCode.FILE_UNREADABLE, f"The admin token cannot be read: {token_file}: {exc.strerror}."
            ) from exc
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=f"{self.url}/api/flops",
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(30.0, connect=5.0),
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str, model: type[M], **query: Any) -> M:
        """GET a path and parse the answer.

        Raises:
            FlopsError: ``unreachable``, or what the manager answered.
        """
        return self._parse(model, self._request("GET", path, params=_given(query)))

    def post(self, path: str, model: type[M], body: Mapping[str, Any] | bytes | None = None) -> M:
        """POST a JSON body or bytes and parse the answer; raises as `get`."""
        if isinstance(body, bytes):
            return self._parse(model, self._request("POST", path, content=body))
        return self._parse(model, self._request("POST", path, json=body))

    def delete(self, path: str, model: type[M], **options: Any) -> M:
        """DELETE a path and parse the answer; raises as `get`."""
        return self._parse(model, self._request("DELETE", path, **options))

    def project(self, project_id: str) -> Project:
        """Load a project; raises as `get`."""
        return self.get(f"/projects/{project_id}", Project)

    def history(self, project_id: str) -> list[ProjectEvent]:
        """A project's events so far; raises as `get`."""
        self.project(project_id)
        try:
            return list(self._stream(project_id, 0, is_followed=False))
        except httpx.TransportError as exc:
            raise self._unreachable(exc) from exc

    def follow(self, project_id: str, *, after: int = 0) -> Iterator[ProjectEvent]:
        """Yield a project's events as they happen, until its last one.

        The stream is opened again when the manager restarts; no event is lost or yielded twice.

        Raises:
            FlopsError: ``unreachable`` when the manager stays away, or what the manager answered.
        """
        seen, away_since = after, None
        while True:
            try:
                for event in self._stream(project_id, seen):
                    seen, away_since = event.seq, None
                    yield event
                if self.project(project_id).stage.is_final:
                    return
            except (httpx.TransportError, FlopsError) as exc:
                if isinstance(exc, FlopsError) and exc.code is not ErrorCode.UNREACHABLE:
                    raise
                away_since = away_since if away_since is not None else time.monotonic()
                if time.monotonic() - away_since > _GIVE_UP_AFTER_S:
                    raise self._unreachable(exc) from exc
            time.sleep(_RECONNECT_AFTER_S)

    def _stream(self, project_id: str, after: int, *, is_followed: bool = True) -> Iterator[ProjectEvent]:
        path = f"/projects/{project_id}/events"
        query = {"after": str(after), "follow": str(is_followed).lower()}
        headers = {"Accept": "text/event-stream"}
        timeout = httpx.Timeout(60.0, connect=5.0)
        with self._http.stream("GET", path, params=query, headers=headers, timeout=timeout) as response:
            if response.is_error:
                response.read()
                raise _error_of(response)
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield ProjectEvent.model_validate_json(line.removeprefix("data:").strip())

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as exc:
            raise self._unreachable(exc) from exc
        if response.is_error:
            raise _error_of(response)
        return response

    def _parse(self, model: type[M], response: httpx.Response) -> M:
        try:
            return model.model_validate_json(response.content)
        except ValueError as exc:
            raise FlopsError(
                ErrorCode.UNREACHABLE, f"What answers at {self.url} is no FLOps manager of this version."
            ) from exc

    def _unreachable(self, exc: Exception) -> FlopsError:
        return FlopsError(
            ErrorCode.UNREACHABLE,
            f"The manager at {self.url} does not answer: {exc}.",
            hint="Start the control plane with `flops up`, or give the right --url.",
        )


def _given(query: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in query.items() if value is not None}


def _error_of(response: httpx.Response) -> FlopsError:
    try:
        body = response.json()
    except json.JSONDecodeError:
        body = {"message": f"{response.url} answered {response.status_code} without a reason."}
    return FlopsError.from_dict(body)
