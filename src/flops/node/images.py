"""Images of services on this node: brought from the registry once, and handed to the container engine."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flops.core.image_reference import ImageReference, is_host, parse_reference
from flops.core.images import Descriptor
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs, NamedImages, Registry, Report
from flops.retention_ports import KeptBlobs

_KEPT_S = 14 * 86_400.0
_KEPT_WHILE_LOW_S = 2 * 3_600.0

_log = logging.getLogger(__name__)


def shrink_images(blobs: KeptBlobs, now_s: float, is_disk_low: bool) -> None:
    """Remove parts of images that nothing has used lately: they are made or brought again when needed.

    Args:
        blobs: of the images that builders have made here, and services were started from.
        now_s: seconds since the epoch.
        is_disk_low: then lately is much shorter ago, but longer than any build or start takes.
    """
    since_s = now_s - (_KEPT_WHILE_LOW_S if is_disk_low else _KEPT_S)
    freed = sum(blobs.remove_unless_used(digest, since_s) for digest in blobs.digests())
    if freed:
        _log.info("removed %d MB of images that were not used lately", freed // 1024**2)


class NodeImages:
    """Brings images.

    Args:
        registry: where they come from.
        blobs: where their parts are kept on this node; those that are there are not brought again.
        names: which images are here.
        load: has the engine take in an image; returns the engine's name for it.
        cluster: ``host:port`` of the cluster, whose registry has the images without a host in their name.
        platform: of this node.
    """

    def __init__(
        self,
        registry: Registry,
        blobs: ImageBlobs,
        names: NamedImages,
        load: Callable[[ImageReference, Descriptor], str],
        *,
        cluster: str,
        platform: Platform,
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._names = names
        self._load = load
        self._cluster = cluster
        self._platform = platform

    def bring(self, image: str, report: Report) -> str:
        """Make sure that the engine has an image; returns its name there.

        Nothing is asked of the registry when all parts are here: a service is started again without it.

        Args:
            image: ``[host/]name@sha256:…``.
            report: is told each step, in one sentence.

        Raises:
            FlopsError: ``unreachable`` when the registry or the engine is away, which passes;
                ``image_not_found``, ``image_damaged``, ``registry_refused``, ``disk_full``.
        """
        has_host = is_host(image.partition("/")[0])
        reference = parse_reference(image if has_host else f"{self._cluster}/{image}")
        found = self._find(reference)
        if found is None:
            report(f"fetching the image {reference.name}")
            try:
                found = self._registry.pull(reference, self._blobs, report, self._platform.value)
            except FlopsError as exc:
                if exc.code is ErrorCode.REGISTRY_UNREACHABLE:
                    raise FlopsError(ErrorCode.UNREACHABLE, exc.message, hint=exc.hint) from exc
                raise
            self._names.put(str(reference), found)
        return self._load(reference, found)

    def _find(self, reference: ImageReference) -> Descriptor | None:
        """The image that was brought before, if it is here whole."""
        try:
            found = self._names.images().get(str(reference))
            is_whole = found is not None and all(map(self._blobs.has, self._names.parts(found)))
        except FlopsError:  # a part of it is gone, or damaged
            return None
        return found if is_whole else None
