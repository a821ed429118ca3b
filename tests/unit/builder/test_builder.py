"""The builder stores both locks before it tells the environment, and tells what went wrong."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import pytest

from flops.actor import ActorContext, EventLog
from flops.builder.builder import main
from flops.core.ids import Digest, EnvironmentKey
from flops.core.project import Environment
from flops.errors import ErrorCode, FlopsError
from flops.wire.actor_events import EnvironmentLocked, Progress, parse_actor_event
from flops.wire.services import ImageOrder


class FixedEnvironments:
    """Locks to fixed texts."""

    def __init__(self, error: FlopsError | None = None) -> None:
        self._error = error
        self.built: list[str] = []

    def lock(
        self, repo: Path, flavor: str, report: Callable[[str], None], *, needs_gpu: bool = False
    ) -> tuple[str, str, Environment]:
        report(f"Resolving {repo.name} for {flavor}{', with CUDA' if needs_gpu else ''}.")
        texts = ("# python 3.11\na\n", "# python 3.11\nb\n")
        lock, model_lock = (Digest(hashlib.sha256(text.encode()).hexdigest()) for text in texts)
        return *texts, Environment(
            key=EnvironmentKey("another"), lock=lock, model_lock=model_lock, notes=("x was loosened",)
        )

    def materialise(self, lock: str, report: Callable[[str], None]) -> Path:
        if self._error is not None:
            raise self._error
        report("Building.")
        self.built.append(lock)
        return Path("python")


class BlobServer(ThreadingHTTPServer):
    """Takes blobs by PUT; the first requests may fail."""

    def __init__(self, failures: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, bytes] = {}
        self.failures = failures


class _Handler(BaseHTTPRequestHandler):
    server: BlobServer

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.failures > 0:
            self.server.failures -= 1
            self.send_error(503)
            return
        self.server.blobs[self.path] = body
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[BlobServer]:
    with BlobServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def context_in(folder: Path, port: int, **config: object) -> ActorContext:
    return ActorContext(
        service_id="builder-p1",
        project_id="p1",
        node_name="n1",
        work_dir=str(folder),
        blobs_url=f"http://127.0.0.1:{port}/api/blobs",
        repo_dir=str(folder / "repository"),
        environments_dir=str(folder / "environments"),
        config={"flavor": "sklearn", "environment_key": "the-key", **config},
    )


def no_images(order: ImageOrder) -> NoReturn:
    raise AssertionError(order)


def no_fetch(url: str, digest: Digest, _path: Path) -> NoReturn:
    raise AssertionError(f"{url}/{digest}")


def events_in(folder: Path) -> list[object]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [parse_actor_event(json.loads(line)) for line in lines]


@pytest.mark.parametrize("failures", [0, 2])
def test_the_environment_is_told_when_its_locks_are_stored(
    tmp_path: Path, server: BlobServer, failures: int
) -> None:
    server.failures = failures
    environments = FixedEnvironments()
    roots: list[Path] = []

    def open_environments(root: Path) -> FixedEnvironments:
        roots.append(root)
        return environments

    main(context_in(tmp_path, server.server_port), EventLog(tmp_path), open_environments, no_images, no_fetch)
    *progress, last = events_in(tmp_path)
    assert isinstance(last, EnvironmentLocked)
    assert last.environment.key == "the-key"
    for text, digest in (
        ("# python 3.11\na\n", last.environment.lock),
        ("# python 3.11\nb\n", last.environment.model_lock),
    ):
        assert server.blobs[f"/api/blobs/{digest}"] == text.encode()
    assert {event.message for event in progress if isinstance(event, Progress)} == {
        "Resolving repository for sklearn.",
        "x was loosened",
        "Building.",
    }
    assert sorted(environments.built) == ["# python 3.11\na\n", "# python 3.11\nb\n"]
    assert roots == [tmp_path / "environments"]


def test_cuda_comes_along_where_gpus_are_asked_for(tmp_path: Path, server: BlobServer) -> None:
    context = context_in(tmp_path, server.server_port, needs_gpu=True)
    main(context, EventLog(tmp_path), lambda _: FixedEnvironments(), no_images, no_fetch)
    messages = [event.message for event in events_in(tmp_path) if isinstance(event, Progress)]
    assert "Resolving repository for sklearn, with CUDA." in messages


def test_what_cannot_be_built_is_not_told_as_an_environment(tmp_path: Path, server: BlobServer) -> None:
    broken = FixedEnvironments(FlopsError(ErrorCode.DISK_FULL, "full"))
    with pytest.raises(FlopsError) as caught:
        main(
            context_in(tmp_path, server.server_port),
            EventLog(tmp_path),
            lambda _: broken,
            no_images,
            no_fetch,
        )
    assert caught.value.code is ErrorCode.DISK_FULL
    assert not [event for event in events_in(tmp_path) if isinstance(event, EnvironmentLocked)]
    assert len(server.blobs) == 2  # the cluster serves packages of locks that it has; nothing refers to them


def test_a_cluster_that_is_away_is_told(tmp_path: Path) -> None:
    with pytest.raises(FlopsError) as caught:
        main(context_in(tmp_path, 1), EventLog(tmp_path), lambda _: FixedEnvironments(), no_images, no_fetch)
    assert caught.value.code is ErrorCode.UNREACHABLE
    assert "127.0.0.1:1" in caught.value.message
