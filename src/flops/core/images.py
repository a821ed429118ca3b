"""OCI images: what they are made of, as JSON with exact bytes.

An image is a manifest, which names a config and layers; an index names one manifest per platform. All are
blobs, named by the SHA-256 of their bytes. The same input gives the same bytes: keys are sorted, no time of
day is in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError

from flops.core.ids import Digest
from flops.core.image_reference import DIGEST
from flops.core.model import Value
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES = (MANIFEST, INDEX, DOCKER_MANIFEST, DOCKER_INDEX)
# The same bytes under the name that the OCI gave them; what is not here is taken as it is.
_OCI_NAMES = {
    "application/vnd.docker.image.rootfs.diff.tar.gzip": LAYER_GZIP,
    "application/vnd.docker.image.rootfs.diff.tar": LAYER_TAR,
    "application/vnd.docker.container.image.v1+json": CONFIG,
}
MAX_MANIFEST_BYTES = 4 * 1024**2
_EPOCH = "1970-01-01T00:00:00Z"
_NANOSECONDS = 1_000_000_000

TITLE = "org.opencontainers.image.title"
REVISION = "org.opencontainers.image.revision"
SOURCE = "org.opencontainers.image.source"
LABEL_PREFIX = "org.flops."
PYTHON_LABEL = f"{LABEL_PREFIX}python"


class Descriptor(Value):
    """Names a blob: what it is, its digest, and its size in bytes."""

    media_type: str
    digest: Digest
    size: int = Field(ge=0)
    platform: str = ""  # such as linux/arm64; of manifests in an index
    annotations: dict[str, str] = Field(default_factory=dict)


class OfBlobs(Value):
    """Something that is there while all its blobs are."""

    @property
    def digests(self) -> tuple[Digest, ...]:
        """Of all its blobs."""
        raise NotImplementedError


class Layer(OfBlobs):
    """A layer: its compressed blob, and the digest of the tar archive in it."""

    blob: Descriptor
    diff_id: Digest
    what: str = ""  # for people: one line of the image's history

    @property
    def digests(self) -> tuple[Digest, ...]:
        """Of its blob."""
        return (self.blob.digest,)


class Manifest(Value):
    """An image for one platform."""

    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Everything the image is made of beside its manifest, the config last."""
        return (*self.layers, self.config)


class PlatformImage(OfBlobs):
    """An image for one platform, with all it is made of."""

    manifest: Descriptor
    parts: tuple[Digest, ...]

    @property
    def digests(self) -> tuple[Digest, ...]:
        """Of the manifest and all it names."""
        return (self.manifest.digest, *self.parts)


class Index(Value):
    """Several images under one name."""

    manifests: tuple[Descriptor, ...]

    def choose(self, platform: str) -> Descriptor | None:
        """The image for a platform; None when there is none."""
        return next((found for found in self.manifests if found.platform == platform), None)


class HealthCheck(Value):
    """How a container is asked whether it is well. Docker reads it; Podman is told by who starts it."""

    command: tuple[str, ...]
    interval_s: float = 30.0
    timeout_s: float = 5.0
    start_period_s: float = 60.0
    retries: int = 3


class ImageRun(Value):
    """What a container of the image does."""

    entrypoint: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()  # that are used when none are given
    env: dict[str, str] = Field(default_factory=dict)
    user: str = "65532:65532"  # never root
    work_dir: str = "/app"
    ports: tuple[int, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)
    health: HealthCheck | None = None


class BaseImage(Value):
    """What images are put on: a small system with a Python, for one platform."""

    platform: Platform
    layers: tuple[Layer, ...]
    python: str  # major.minor
    interpreter: str  # its path
    env: dict[str, str] = Field(default_factory=dict)


def config_bytes(platform: Platform, layers: Sequence[Layer], run: ImageRun) -> bytes:
    """The config blob of an image."""
    inner: dict[str, Any] = {
        "User": run.user,
        "WorkingDir": run.work_dir,
        "Env": [f"{name}={value}" for name, value in sorted(run.env.items())],
        "Labels": run.labels,
    }
    if run.entrypoint:
        inner["Entrypoint"] = list(run.entrypoint)
    if run.arguments:
        inner["Cmd"] = list(run.arguments)
    if run.ports:
        inner["ExposedPorts"] = {f"{port}/tcp": {} for port in run.ports}
    if run.health is not None:
        inner["Healthcheck"] = {
            "Test": ["CMD", *run.health.command],
            "Interval": round(run.health.interval_s * _NANOSECONDS),
            "Timeout": round(run.health.timeout_s * _NANOSECONDS),
            "StartPeriod": round(run.health.start_period_s * _NANOSECONDS),
            "Retries": run.health.retries,
        }
    return _exact(
        {
            "architecture": platform.architecture,
            "os": "linux",
            "created": _EPOCH,
            "config": inner,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.diff_id}" for layer in layers]},
            "history": [{"created": _EPOCH, "created_by": layer.what or "layer"} for layer in layers],
        }
    )


def manifest_bytes(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    """The manifest of an image for one platform."""
    return _exact(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": _to_json(config),
            "layers": [_to_json(layer) for layer in layers],
        }
    )


def index_bytes(manifests: Sequence[Descriptor]) -> bytes:
    """The index over the images of several platforms, in the order of their names."""
    ordered = sorted(manifests, key=lambda found: (found.platform, found.digest))
    return _exact(
        {"schemaVersion": 2, "mediaType": INDEX, "manifests": [_to_json(found) for found in ordered]}
    )


def read_manifest(data: bytes, media_type: str = "") -> Manifest | Index:
    """Read a manifest or an index, of the OCI's kind or Docker's.

    Args:
        data: the bytes.
        media_type: what they are said to be; what they say themselves counts more.

    Raises:
        FlopsError: ``image_damaged``.
    """
    raw = _read_json(data)
    kind = raw.get("mediaType") or media_type
    try:
        if "manifests" in raw or kind in {INDEX, DOCKER_INDEX}:
            return Index(manifests=tuple(_from_json(found) for found in raw["manifests"]))
        return Manifest(
            config=_from_json(raw["config"]), layers=tuple(_from_json(found) for found in raw["layers"])
        )
    except (KeyError, TypeError, AttributeError, ValueError, ValidationError) as exc:
        raise FlopsError(
            ErrorCode.IMAGE_DAMAGED,
            f"A manifest of the type {kind!r} is none of an image: {type(exc).__name__} {str(exc)[:200]}.",
        ) from exc


def read_config(data: bytes) -> tuple[tuple[Digest, ...], dict[str, str], dict[str, str]]:
    """Read a config blob: digests of the layers' archives, environment, labels.

    Raises:
        FlopsError: ``image_damaged``.
    """
    raw = _read_json(data)
    try:
        inner = raw.get("config") or {}
        env = dict(entry.partition("=")[::2] for entry in inner.get("Env") or ())
        diff_ids = tuple(_digest(text) for text in raw["rootfs"]["diff_ids"])
        return diff_ids, env, {str(name): str(value) for name, value in (inner.get("Labels") or {}).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise FlopsError(
            ErrorCode.IMAGE_DAMAGED, f"An image's config cannot be read: {type(exc).__name__} {exc}."
        ) from exc


def image_labels(
    *,
    title: str,
    project: str = "",
    run: str = "",
    round_number: int | None = None,
    metrics: Mapping[str, float] | None = None,
    source: str = "",
    revision: str = "",
) -> dict[str, str]:
    """Labels that say what an image is and where it comes from; what is not known has none.

    Args:
        title: for people.
        project: the project's id.
        run: the MLflow run that trained the model.
        round_number: the round whose model this is.
        metrics: of that round; written as ``org.flops.metric.<name>``.
        source: the ML repository.
        revision: its commit.
    """
    labels = {
        TITLE: title,
        SOURCE: source,
        REVISION: revision,
        f"{LABEL_PREFIX}project": project,
        f"{LABEL_PREFIX}run": run,
        f"{LABEL_PREFIX}round": "" if round_number is None else str(round_number),
        **{f"{LABEL_PREFIX}metric.{name}": repr(float(value)) for name, value in (metrics or {}).items()},
    }
    return {name: value for name, value in sorted(labels.items()) if value}


def _exact(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _read_json(data: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise FlopsError(ErrorCode.IMAGE_DAMAGED, f"A part of an image is no JSON: {exc}.") from exc
    if not isinstance(raw, dict):
        raise FlopsError(ErrorCode.IMAGE_DAMAGED, "A part of an image is no JSON object.")
    return raw


def _to_json(found: Descriptor) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "mediaType": found.media_type,
        "digest": f"sha256:{found.digest}",
        "size": found.size,
    }
    if found.platform:
        system, _, architecture = found.platform.partition("/")
        raw["platform"] = {"os": system, "architecture": architecture}
    if found.annotations:
        raw["annotations"] = found.annotations
    return raw


def _from_json(raw: Mapping[str, Any]) -> Descriptor:
    platform = raw.get("platform") or {}
    media_type = str(raw["mediaType"])
    return Descriptor(
        media_type=_OCI_NAMES.get(media_type, media_type),
        digest=_digest(raw["digest"]),
        size=raw["size"],
        platform=f"{platform['os']}/{platform['architecture']}" if platform else "",
        annotations=raw.get("annotations") or {},
    )


def _digest(text: str) -> Digest:
    found = DIGEST.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:80]!r} is no SHA-256 digest")
    return Digest(found["hex"])
