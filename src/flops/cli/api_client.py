"""Typed client of the manager's REST API (`flops.wire.rest`)."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from flops.core.model import Value
from flops.core.project import Project, ProjectEvent
from flops.errors import ErrorCode, FlopsError
from flops.wire.cluster_tls import manager_tls, speaks_tls, tls_problem

RECONNECT_AFTER_S = 0.5
GIVE_UP_AFTER_S = 60.0
_SILENCE_S = 30.0  # the manager sends a comment every 10 s, also when nothing happens
_CHUNK_BYTES = 1_048_576
_LOOK_S = 3.0  # for whether a port encrypts
_TRUST_HINT = (
    "`flops status --connect` on the machine of the control plane prints a line for `flops connect` here; or "
    "name its https:// address with --url, and the certificate of its authority with --authority-file."
)

M = TypeVar("M", bound=Value)


class ApiClient:
    """Talks to a manager; failures become the `FlopsError` that the manager raised.

    Args:
        url: base URL of the manager.
        token: the admin token.
        authority: certificate that the manager is known by, PEM; "" for one that this machine trusts anyway.
        silence_s: how long to wait for an answer.

    Raises:
        FlopsError: ``usage`` for the URL, ``file_unreadable`` for the certificate.
    """

    def __init__(self, url: str, token: str, *, authority: str = "", silence_s: float = _SILENCE_S) -> None:
        self.url = url.rstrip("/")
        host = host_of(self.url)
        self._http = httpx.Client(
            base_url=f"{self.url}/api/flops",
            headers={"Authorization": f"Bearer {token}"},
            verify=manager_tls(authority) if authority else True,
            timeout=httpx.Timeout(silence_s, connect=min(silence_s, 5.0)),
            trust_env=not _is_this_machine(host),  # a proxy of the environment cannot reach this machine
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

    def post(self, path: str, model: type[M], body: Mapping[str, Any] | None = None) -> M:
        """POST a JSON body and parse the answer; raises as `get`."""
        return self._parse(model, self._request("POST", path, json=body))

    def upload(self, file: Path, model: type[M]) -> M:
        """Send a file as a blob, piece by piece.

        Raises:
            FlopsError: ``file_unreadable``, or as `get`.
        """
        try:
            with file.open("rb") as content:
                pieces: Iterable[bytes] = iter(lambda: content.read(_CHUNK_BYTES), b"")
                return self._parse(model, self._request("POST", "/blobs", content=pieces))
        except OSError as exc:
            raise FlopsError(
                ErrorCode.FILE_UNREADABLE, f"{file} cannot be read: {exc.strerror or exc}."
            ) from exc

    def delete(self, path: str, model: type[M], **query: Any) -> M:
        """DELETE a path and parse the answer; raises as `get`."""
        return self._parse(model, self._request("DELETE", path, params=_given(query)))

    def project(self, project_id: str) -> Project:
        """Load a project; raises as `get`."""
        return self.get(project_path(project_id), Project)

    def history(self, project_id: str) -> list[ProjectEvent]:
        """A project's events so far; raises as `get`."""
        try:
            return list(self._stream(project_id, 0, is_followed=False))
        except httpx.TransportError as exc:
            raise self._unreachable(exc) from exc

    def follow(
        self,
        project_id: str,
        *,
        after: int = 0,
        on_gap: Callable[[FlopsError], None] = lambda _: None,
        on_return: Callable[[], None] = lambda: None,
    ) -> Iterator[ProjectEvent]:
        """Yield a project's events as they happen, until its last one.

        The stream is opened again when the manager restarts; no event is lost or yielded twice.

        Args:
            project_id: the project.
            after: only events with a higher `seq`.
            on_gap: is told once each time the manager stops answering.
            on_return: is called when it answers again.

        Raises:
            FlopsError: ``unreachable`` when the manager stays away for a minute, or what it answered.
        """
        seen, away_since = after, None
        while True:
            try:
                if away_since is not None:
                    self.project(project_id)
                    away_since = None
                    on_return()
                for event in self._stream(project_id, seen):
                    if event.seq > seen:
                        seen = event.seq
                        yield event
                project = self.project(project_id)
                if project.stage.is_final and seen >= project.history_length:
                    return
            except (httpx.TransportError, FlopsError) as exc:
                error = exc if isinstance(exc, FlopsError) else self._unreachable(exc)
                if error.code is not ErrorCode.UNREACHABLE:
                    raise
                if away_since is None:
                    away_since = time.monotonic()
                    on_gap(error)
                if time.monotonic() - away_since > GIVE_UP_AFTER_S:
                    raise error from exc
            time.sleep(RECONNECT_AFTER_S)

    def _stream(self, project_id: str, after: int, *, is_followed: bool = True) -> Iterator[ProjectEvent]:
        path = f"{project_path(project_id)}/events"
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._http.stream(
            "GET", path, params={"follow": str(is_followed).lower()}, headers=headers
        ) as response:
            if response.is_error:
                response.read()
                raise self._error_of(response)
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield ProjectEvent.model_validate_json(line.removeprefix("data:").strip())

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as exc:
            raise self._unreachable(exc) from exc
        if response.is_error:
            raise self._error_of(response)
        return response

    def _parse(self, model: type[M], response: httpx.Response) -> M:
        try:
            return model.model_validate_json(response.content)
        except ValueError as exc:
            raise self._no_manager() from exc

    def _error_of(self, response: httpx.Response) -> FlopsError:
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict) or "code" not in body:
            return self._no_manager()
        error = FlopsError.from_dict(body)
        if error.code is ErrorCode.INTERNAL and body.get("request_id"):
            error.details.setdefault("request_id", body["request_id"])
        return error

    def _no_manager(self) -> FlopsError:
        return FlopsError(
            ErrorCode.UNREACHABLE,
            f"What answers at {self.url} is no FLOps manager of this version.",
            hint="`flops status` says where the manager is; --url and FLOPS_URL name another one.",
        )

    def _unreachable(self, exc: Exception) -> FlopsError:
        url = httpx.URL(self.url)
        where = url.netloc.decode()
        problem = tls_problem(exc, where, expected="the manager that was looked for", hint=_TRUST_HINT)
        if problem is not None:
            return problem
        is_cut_off = isinstance(exc, httpx.RemoteProtocolError | httpx.ReadError)
        if url.scheme == "http" and is_cut_off and speaks_tls(url.host, url.port or 80, _LOOK_S):
            return FlopsError(
                ErrorCode.ENCRYPTION_MISMATCH,
                f"The manager at {where} encrypts, and was spoken to without encryption.",
                hint=_TRUST_HINT,
            )
        return FlopsError(
            ErrorCode.UNREACHABLE,
            f"The manager at {self.url} does not answer: {str(exc) or type(exc).__name__}.",
            hint="Start the control plane with `flops up`, or name another one with --url or FLOPS_URL.",
        )


def project_path(project_id: str) -> str:
    """The path of a project, whatever a user typed as its id."""
    return f"/projects/{quote(project_id, safe='')}"


def _given(query: Mapping[str, Any]) -> dict[str, str | list[str]]:
    return {
        name: value if isinstance(value, list) else str(value)
        for name, value in query.items()
        if value is not None
    }


def host_of(url: str) -> str:
    """The host of a manager's URL.

    Raises:
        FlopsError: ``usage`` for what is none.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise FlopsError(ErrorCode.USAGE, f"{url!r} is no URL: {exc}.") from exc
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise FlopsError(ErrorCode.USAGE, f"{url!r} is no URL of a manager, such as http://127.0.0.1:5072.")
    return parsed.host


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
