"""Who we are to a registry: credentials as docker and podman keep them, Basic and Bearer authentication."""

from __future__ import annotations

import base64
import binascii
import json
import re
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from flops.durable_file import file_error
from flops.errors import ErrorCode, FlopsError

_CHALLENGE = re.compile(r"(?P<kind>\w+)\s+(?P<parameters>.*)")
_PARAMETER = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_CLIENT = "flops"


@dataclass(frozen=True)
class Credentials:
    """A user's name and password; as an identity token, when the name is empty."""

    user: str
    password: str = field(repr=False)

    @property
    def basic(self) -> str:
        """Value of the header ``Authorization``."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class DockerCredentials:
    """Credentials by registry, from a ``config.json`` (docker) or ``auth.json`` (podman).

    Credential helpers, which are programs, are not asked.

    Args:
        raw: the file's content.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        auths = raw.get("auths") or {}
        self._found = {_plain(key): _read_entry(key, entry) for key, entry in auths.items()}

    @classmethod
    def load(cls, path: Path) -> DockerCredentials:
        """Read a file; one that does not exist has no credentials.

        Raises:
            FlopsError: ``config_corrupt``, ``file_unreadable``.
        """
        try:
            raw = json.loads(path.read_text())
            return cls(raw)
        except FileNotFoundError:
            return cls({})
        except OSError as exc:
            raise file_error(exc, path) from exc
        except (ValueError, AttributeError) as exc:
            raise FlopsError(
                ErrorCode.CONFIG_CORRUPT,
                f"The credentials in {path} cannot be read: {exc}.",
                hint="Write the file anew with `docker login` or `podman login --authfile`.",
            ) from exc

    def having(self, host: str, credentials: Credentials) -> DockerCredentials:
        """The same, and others for one registry."""
        more = DockerCredentials({})
        more._found = {**self._found, host: credentials}
        return more

    def find(self, host: str, name: str) -> Credentials | None:
        """Credentials for an image: those of the longest part of ``host/name`` that has any."""
        place = f"{host}/{name}"
        while place:
            if (found := self._found.get(place)) is not None:
                return found
            place = place.rpartition("/")[0]
        return None


def _plain(key: str) -> str:
    """``https://host/v2/`` is ``host``, too."""
    found = re.fullmatch(r"https?://([^/]+)(?:/v[12])?/?", key)
    return found[1] if found else key.rstrip("/")


def _read_entry(key: str, entry: Mapping[str, Any]) -> Credentials | None:
    if token := entry.get("identitytoken"):
        return Credentials("", str(token))
    if "username" in entry and "password" in entry:
        return Credentials(str(entry["username"]), str(entry["password"]))
    try:
        user, colon, password = (
            base64.b64decode(entry.get("auth") or "", validate=True).decode().partition(":")
        )
    except (binascii.Error, UnicodeDecodeError) as exc:
        raise ValueError(f"the entry of {key} is no base64") from exc
    return Credentials(user, password) if colon else None


class RegistryAuth(httpx.Auth):
    """Answers a registry's challenges, for one image's name; may be used from several threads.

    Credentials go to the registry's own host and, when it asks for a token, to the server that it names for
    that; nowhere else, and not in the clear unless the registry itself is spoken to in the clear.

    Args:
        origin: scheme, host and port of the registry.
        credentials: what to answer with; None for nobody in particular.
    """

    def __init__(self, origin: httpx.URL, credentials: Credentials | None) -> None:
        self._origin = origin
        self._credentials = credentials
        self._lock = threading.Lock()
        self._header: str | None = None

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send what is known; when that is not enough, ask for a token, and try once more."""
        if not _is_same_origin(request.url, self._origin):
            yield request
            return
        with self._lock:
            header = self._header
        if header is not None:
            request.headers["Authorization"] = header
        response = yield request
        if response.status_code != httpx.codes.UNAUTHORIZED:
            return
        challenge = _CHALLENGE.match(response.headers.get("www-authenticate", ""))
        kind = challenge["kind"].lower() if challenge else ""
        answer: str | None = None
        if kind == "basic" and self._credentials is not None:
            answer = self._credentials.basic
        elif kind == "bearer" and challenge:
            token_response = yield self._token_request(dict(_PARAMETER.findall(challenge["parameters"])))
            token_response.read()
            answer = _read_token(token_response)
        if answer is None or answer == header:
            return
        with self._lock:
            self._header = answer
        request.headers["Authorization"] = answer
        yield request

    def _token_request(self, parameters: Mapping[str, str]) -> httpx.Request:
        realm = httpx.URL(parameters.get("realm", ""))
        if realm.scheme != "https" and self._origin.scheme == "https":
            raise FlopsError(
                ErrorCode.REGISTRY_REFUSED,
                f"{self._origin} wants credentials to be sent to {realm}, which is not encrypted.",
            )
        asked = {name: parameters[name] for name in ("service", "scope") if name in parameters}
        found = self._credentials
        if found is not None and not found.user:
            form = {**asked, "grant_type": "refresh_token", "refresh_token": found.password}
            return httpx.Request("POST", realm, data={**form, "client_id": _CLIENT})
        headers = {} if found is None else {"Authorization": found.basic}
        return httpx.Request("GET", realm.copy_merge_params(asked), headers=headers)


def _read_token(response: httpx.Response) -> str | None:
    if not response.is_success:
        return None
    try:
        answer = response.json()
        token = answer.get("token") or answer.get("access_token")
    except (ValueError, AttributeError):
        return None
    return f"Bearer {token}" if token else None


def _is_same_origin(url: httpx.URL, origin: httpx.URL) -> bool:
    return (url.scheme, url.host, url.port) == (origin.scheme, origin.host, origin.port)
