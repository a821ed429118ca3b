"""The builder: locks the environments of a repository, and builds them once where problems show."""

from __future__ import annotations

import contextvars
import hashlib
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from flops.actor import ActorContext, EventLog
from flops.command import StoppedError, stopped_when
from flops.core.ids import Digest, EnvironmentKey
from flops.errors import ErrorCode, FlopsError
from flops.ports import Environments
from flops.wire.services import BuilderConfig

_UPLOAD_TIMEOUT_S = 60.0
_UPLOAD_ATTEMPTS = 5


def main(context: ActorContext, events: EventLog, open_environments: Callable[[Path], Environments]) -> None:
    """Lock the environments of the bundle's repository, store both locks as blobs, and tell the environment.

    Both environments are built here first: what cannot be built is known before any learner is placed, and a
    learner on this node finds its environment ready. SIGTERM ends it without half an environment left behind.

    Args:
        context: `repo_dir`, `blobs_url`, `environments_dir` and a `BuilderConfig`.
        events: gets progress, then ``environment_locked``.
        open_environments: makes the environments of a folder.

    Raises:
        FlopsError: as `flops.ports.Environments`; ``unreachable`` when the locks cannot be stored.
    """
    told_to_end = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told_to_end.set())
    try:
        with stopped_when(told_to_end.is_set):
            _build(context, events, open_environments)
    except StoppedError:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _build(
    context: ActorContext, events: EventLog, open_environments: Callable[[Path], Environments]
) -> None:
    config = BuilderConfig.model_validate(context.config)
    root = (
        Path(context.environments_dir) if context.environments_dir else Path(context.work_dir, "environments")
    )
    environments = open_environments(root)

    def report(message: str) -> None:
        events.tell("progress", message=message)

    lock, model_lock, environment = environments.lock(
        Path(context.repo_dir), config.flavor, report, needs_gpu=config.needs_gpu
    )
    for note in environment.notes:
        report(note)
    with ThreadPoolExecutor(2) as pool:
        builds = [
            pool.submit(contextvars.copy_context().run, environments.materialise, text, report)
            for text in (lock, model_lock)
        ]
        for build in builds:
            build.result()
    with httpx.Client(timeout=_UPLOAD_TIMEOUT_S, transport=httpx.HTTPTransport(retries=2)) as client:
        for text in (lock, model_lock):
            _store(client, context.blobs_url, text.encode())
    environment = environment.model_copy(update={"key": EnvironmentKey(config.environment_key)})
    events.tell("environment_locked", environment=environment.model_dump(mode="json"))


def _store(client: httpx.Client, blobs_url: str, data: bytes) -> Digest:
    digest = Digest(hashlib.sha256(data).hexdigest())
    problem = ""
    for _ in range(_UPLOAD_ATTEMPTS):
        try:
            answer = client.put(f"{blobs_url}/{digest}", content=data)
        except httpx.HTTPError as exc:
            problem = str(exc) or type(exc).__name__
            continue
        if answer.is_success:
            return digest
        problem = f"HTTP {answer.status_code}: {answer.text[:300]}"
    raise FlopsError(
        ErrorCode.UNREACHABLE, f"The lock {digest[:12]} cannot be stored at {blobs_url}: {problem}."
    )
