"""A container engine of this machine (Docker or Podman), by its Docker Engine API on a UNIX socket."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from flops.errors import ErrorCode, FlopsError
from flops.network_rules import can_restrict

TIMEOUT_S = 60.0
_PULL_TIMEOUT_S = 600.0  # without any news
_FRAME_HEAD_BYTES = 8
_LANDLOCK_SINCE = 23  # Docker's version; with Podman, since the oldest that is used


class EngineRefusedError(Exception):
    """The engine answered, and did not do it.

    Args:
        status: HTTP status.
        message: the engine's own words, in one line.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class EngineFacts:
    """What an engine is, and what it can.

    Args:
        name: "docker" or "podman".
        version: of the engine.
        cgroup_version: 1 or 2; 0 when it does not say.
        is_rootless: it runs without root's rights.
        limits: which of "memory", "cpu" and "pids" it enforces.
    """

    name: str
    version: str
    cgroup_version: int
    is_rootless: bool
    limits: tuple[str, ...]

    @property
    def can_restrict_network(self) -> bool:
        """Whether services can be held to ports: the kernel can, and the engine's filter lets them ask."""
        return can_restrict() and (self.name != "docker" or self.is_at_least(_LANDLOCK_SINCE))

    def is_at_least(self, *version: int) -> bool:
        """Whether the engine's version is this or newer; what cannot be read counts as new."""
        numbers = tuple(int(part) for part in re.findall(r"\d+", self.version))
        return numbers >= version or not numbers


class ContainerEngine:
    """Talks to one engine; thread-safe. Nothing is kept here: the engine knows its containers.

    All methods raise `FlopsError` ``unreachable`` or ``timeout`` when the engine does not answer, and
    `EngineRefusedError` when it refuses.

    Args:
        path: of the engine's socket.
    """

    def __init__(self, path: Path) -> None:
        self.socket = path  # its paths name no version of the API: each engine serves its newest

    def facts(self) -> EngineFacts:
        """What the engine is."""
        version, info = self._json("GET", "/version"), self._json("GET", "/info")
        components = [str(part.get("Name", "")) for part in version.get("Components") or ()]
        has = {
            "memory": info.get("MemoryLimit"),
            "cpu": info.get("CpuCfsQuota"),
            "pids": info.get("PidsLimit"),
        }
        groups = int(str(info.get("CgroupVersion") or 0))
        options = " ".join(map(str, info.get("SecurityOptions") or ()))
        is_rootless = bool(info.get("Rootless")) or "rootless" in options  # as Podman and Docker say it
        return EngineFacts(
            name="podman" if any("Podman" in name for name in components) else "docker",
            version=str(version.get("Version", "")),
            cgroup_version=groups,
            is_rootless=is_rootless,
            limits=() if is_rootless and groups == 1 else tuple(name for name in has if has[name]),
        )

    def create(self, name: str, body: Mapping[str, Any]) -> str:
        """Make a container; returns its id."""
        return str(self._json("POST", "/containers/create", params={"name": name}, body=body)["Id"])

    def start(self, name: str) -> None:
        """Start a container; one that runs is left alone."""
        self._call("POST", f"/containers/{name}/start")

    def inspect(self, name: str) -> dict[str, Any] | None:
        """What a container is and how it stands; None when there is none of this name."""
        try:
            return dict(self._json("GET", f"/containers/{name}/json"))
        except EngineRefusedError as exc:
            if exc.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    def list(self, label: str, *, only_running: bool = False) -> list[dict[str, Any]]:
        """All containers with a label ``name=value``."""
        filters: dict[str, list[str]] = {"label": [label]}
        if only_running:
            filters["status"] = ["running"]
        params = {"all": "true", "filters": json.dumps(filters)}
        found = self._json("GET", "/containers/json", params=params)
        return [entry for entry in found or () if isinstance(entry, dict)]

    def stop(self, name: str, grace_s: float) -> None:
        """Ask a container to end, kill it after a while, and wait; one that does not run is no error."""
        with self._if_there():
            params = {"t": str(max(0, round(grace_s)))}
            self._call("POST", f"/containers/{name}/stop", params=params, timeout_s=TIMEOUT_S + grace_s)

    def signal(self, name: str, signal_name: str) -> None:
        """Send a signal to a container's main process; one that does not run is no error."""
        with contextlib.suppress(EngineRefusedError):
            self._call("POST", f"/containers/{name}/kill", params={"signal": signal_name})

    def wait(self, name: str, timeout_s: float) -> bool:
        """Wait for a container's end; whether it came."""
        try:
            with self._if_there():
                self._call("POST", f"/containers/{name}/wait", timeout_s=timeout_s)
        except FlopsError as error:
            if error.code is not ErrorCode.TIMEOUT:
                raise
            return False
        return True

    def remove(self, name: str) -> None:
        """Kill and remove a container with its anonymous volumes; an unknown one is no error."""
        with self._if_there():
            self._call("DELETE", f"/containers/{name}", params={"force": "true", "v": "true"})

    def logs(self, name: str, since_s: int) -> Iterator[tuple[int, bytes]]:
        """What a container has written since a second of the epoch: pairs of the second, and the bytes.

        A line longer than the engine's buffer comes in several pieces.
        """
        params = {"stdout": "true", "stderr": "true", "timestamps": "true", "since": str(since_s)}
        with self._answer("GET", f"/containers/{name}/logs", params) as answer:
            for frame in _frames(answer.read):
                stamp, _, data = frame.partition(b" ")
                with contextlib.suppress(ValueError):  # what has no time has no place
                    yield int(datetime.fromisoformat(stamp.decode()).timestamp()), data

    def has_image(self, reference: str) -> bool:
        """Whether an image is here."""
        return self.image(reference) is not None

    def image(self, reference: str) -> dict[str, Any] | None:
        """What an image is; None when it is not here."""
        try:
            return dict(self._json("GET", f"/images/{reference}/json"))
        except EngineRefusedError as exc:
            if exc.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    def images(self, label: str) -> Sequence[str]:
        """Ids of all images with a label, whatever its value."""
        params = {"filters": json.dumps({"label": [label]})}
        found = self._json("GET", "/images/json", params=params)
        return [str(entry["Id"]) for entry in found or () if isinstance(entry, dict) and entry.get("Id")]

    def import_root(self, reference: str, archive: bytes) -> None:
        """Make an image of one layer from a tar archive."""
        params = {"fromSrc": "-", "repo": reference}
        self._read_progress("/images/create", params, archive)
        if not self.has_image(reference):
            raise EngineRefusedError(500, f"{reference} was taken in, but is not there")

    def load(self, archive: Iterator[bytes]) -> None:
        """Take in images from an archive, as ``docker save`` or an OCI layout in a tar."""
        self._read_progress("/images/load", {"quiet": "true"}, archive)

    def remove_image(self, reference: str) -> None:
        """Remove an image; an unknown one is no error.

        Raises:
            EngineRefusedError: a container uses it.
        """
        with self._if_there():
            self._call("DELETE", f"/images/{reference}")

    def _read_progress(self, path: str, params: Mapping[str, str], content: bytes | Iterator[bytes]) -> None:
        headers = {"Content-Type": "application/x-tar"}
        with self._answer("POST", path, params, content, headers, timeout_s=_PULL_TIMEOUT_S) as answer:
            for line in answer:
                news = None
                with contextlib.suppress(ValueError):
                    news = json.loads(line)
                if isinstance(news, dict) and news.get("error"):
                    raise EngineRefusedError(HTTPStatus.BAD_GATEWAY, _one_line(str(news["error"])))

    @contextlib.contextmanager
    def _if_there(self) -> Iterator[None]:
        try:
            yield
        except EngineRefusedError as exc:
            if exc.status != HTTPStatus.NOT_FOUND:
                raise

    def _json(self, method: str, path: str, **options: Any) -> Any:
        answer = self._call(method, path, **options)
        try:
            return json.loads(answer)
        except ValueError as exc:
            raise self._away(f"what it says about {path} is no JSON") from exc

    def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> bytes:
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        with self._answer(method, path, params or {}, content, headers, timeout_s=timeout_s) as answer:
            return answer.read()

    @contextlib.contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        content: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> Iterator[HTTPResponse]:
        """Send a request on a connection of its own; the answer can be read within."""
        target = f"{urllib.parse.quote(path, safe='/:@')}?{urllib.parse.urlencode(params)}"
        with contextlib.closing(_SocketConnection(self.socket, timeout_s)) as connection:
            try:
                connection.request(method, target, body=content, headers=dict(headers or {}))
                answer = connection.getresponse()
                if answer.status >= HTTPStatus.BAD_REQUEST:
                    raise EngineRefusedError(answer.status, _message_of(answer.read()))
                yield answer
            except TimeoutError as exc:
                raise FlopsError(
                    ErrorCode.TIMEOUT, f"The container engine at {self.socket} did not answer {path} in time."
                ) from exc
            except (OSError, HTTPException) as exc:
                raise self._away(str(exc) or type(exc).__name__) from exc

    def _away(self, why: str) -> FlopsError:
        return FlopsError(
            ErrorCode.UNREACHABLE,
            f"The container engine at {self.socket} does not answer: {why}.",
            hint="Start it: `systemctl start docker`, or `systemctl start podman.socket`.",
        )


class _SocketConnection(HTTPConnection):
    """HTTP on a UNIX socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("engine", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _message_of(answer: bytes) -> str:
    message = answer.decode(errors="replace")
    with contextlib.suppress(ValueError):
        parsed = json.loads(answer)
        if isinstance(parsed, dict):
            message = str(parsed.get("message") or message)
    return _one_line(message)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500].rstrip(".")


def _frames(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """The pieces of a multiplexed stream, each behind a head of 8 bytes that ends with its length."""
    while len(head := read(_FRAME_HEAD_BYTES)) == _FRAME_HEAD_BYTES:
        size = int.from_bytes(head[4:], "big")
        frame = read(size)
        if len(frame) == size:
            yield frame
