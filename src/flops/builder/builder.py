"""The builder: locks the environments of a repository, builds them where problems show, and makes images."""

from __future__ import annotations

import contextvars
import hashlib
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from flops.actor import ActorContext, EventLog
from flops.builder.images import ImageTools, ProjectImages
from flops.command import StoppedError, stopped_when
from flops.core.ids import Digest, EnvironmentKey
from flops.core.image_reference import is_host
from flops.core.project import Environment
from flops.errors import ErrorCode, FlopsError
from flops.ports import Environments
from flops.wire.cluster_tls import http_options
from flops.wire.services import BuilderConfig, ImageOrder

_TIMEOUT_S = 60.0
FetchBlob = Callable[[str, Digest, Path], None]
OpenImages = Callable[[ImageOrder], ImageTools]
_UPLOAD_ATTEMPTS = 5


def main(
    context: ActorContext,
    events: EventLog,
    open_environments: Callable[[Path], Environments],
    open_images: OpenImages,
    fetch_blob: FetchBlob,
) -> None:
    """Lock the environments of the bundle's repository, store both locks as blobs, and tell the environment.

    Both environments are built here first: what cannot be built is known before any learner is placed, and a
    learner on this node finds its environment ready. A project that runs from images gets images instead;
    likewise its trained model. SIGTERM ends it without half an environment left behind.

    Args:
        context: `repo_dir`, `blobs_url`, `environments_dir` and a `BuilderConfig`.
        events: gets progress, then ``environment_locked``.
        open_environments: makes the environments of a folder.
        open_images: makes the tools for images.
        fetch_blob: brings a blob of the cluster into a file, given the blobs' URL.

    Raises:
        FlopsError: as `flops.ports.Environments` and `ProjectImages`; ``unreachable`` when the locks cannot
            be stored; and as `fetch_blob`.
    """
    told_to_end = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told_to_end.set())
    try:
        with stopped_when(told_to_end.is_set):
            _Build(context, events, open_environments, open_images, fetch_blob).run()
    except StoppedError:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _Build:
    def __init__(
        self,
        context: ActorContext,
        events: EventLog,
        open_environments: Callable[[Path], Environments],
        open_images: OpenImages,
        fetch_blob: FetchBlob,
    ) -> None:
        self._context = context
        self._events = events
        self._config = BuilderConfig.model_validate(context.config)
        self._open_environments = open_environments
        self._open_images = open_images
        self._fetch_blob = fetch_blob

    def run(self) -> None:
        order, environment = self._config.images, self._config.environment
        if order is not None and order.model is not None and environment is not None:
            name = self._images(order).push_model(self._fetch(environment.model_lock), self._report)
            self._events.tell("model_image_pushed", image=name)
            return
        if environment is None:
            environment, lock, model_lock = self._lock(is_built=order is None)
        else:
            lock, model_lock = self._fetch(environment.lock), self._fetch(environment.model_lock)
        images = None
        if order is not None:
            base = self._images(order).push_base(self._report)
            if base:
                order = order.model_copy(update={"base": base})
            images = self._images(order).push_training(lock, model_lock, self._report)
            images = images.model_copy(update={"base": base})
        self._events.tell(
            "environment_locked",
            environment=environment.model_dump(mode="json"),
            **({"images": images.model_dump(mode="json")} if images is not None else {}),
        )

    def _images(self, order: ImageOrder) -> ProjectImages:
        cluster = urlsplit(self._context.blobs_url).netloc
        if order.base and not is_host(order.base.partition("/")[0]):
            order = order.model_copy(update={"base": f"{cluster}/{order.base}"})
        return ProjectImages(self._open_images(order), order, self._context, cluster)

    def _report(self, message: str) -> None:
        self._events.tell("progress", message=message)

    def _lock(self, *, is_built: bool) -> tuple[Environment, str, str]:
        """Lock both environments, and store the locks."""
        context = self._context
        root = Path(context.environments_dir or Path(context.work_dir, "environments"))
        environments = self._open_environments(root)
        lock, model_lock, environment = environments.lock(
            Path(context.repo_dir), self._config.flavor, self._report, needs_gpu=self._config.needs_gpu
        )
        for note in environment.notes:
            self._report(note)
        locks = (lock, model_lock)
        options = http_options(context.authority, context.service_id, context.key, context.cluster)
        transport = httpx.HTTPTransport(retries=2, verify=options.pop("verify", True))
        with httpx.Client(timeout=_TIMEOUT_S, transport=transport, **options) as client:
            for text in locks:  # first: the cluster serves packages only of locks that it has
                _store(client, context.blobs_url, text.encode())
        if is_built:
            with ThreadPoolExecutor(len(locks)) as pool:
                builds = [
                    pool.submit(contextvars.copy_context().run, environments.materialise, text, self._report)
                    for text in locks
                ]
                for build in builds:
                    build.result()
        environment = environment.model_copy(update={"key": EnvironmentKey(self._config.environment_key)})
        return environment, lock, model_lock

    def _fetch(self, lock: Digest) -> str:
        file = Path(self._context.work_dir, f"{lock}.lock")
        self._fetch_blob(self._context.blobs_url, lock, file)
        return file.read_text(encoding="utf-8")


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
