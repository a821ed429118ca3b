"""Images of services on this node: brought from the registry, handed to the engine, and given up."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection

from flops.core.ids import Digest
from flops.core.image_reference import ImageReference, is_host, parse_reference
from flops.core.images import Descriptor
from flops.core.platforms import Platform
from flops.core.retention import Entry, Limits, choose_victims
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs, ImageEngine, NamedImages, Registry, Report
from flops.retention_ports import KeptBlobs

_KEPT_S = 14 * 86_400.0
_KEPT_WHILE_LOW_S = 2 * 3_600.0  # longer than any build or start takes
_KEPT_WHEN_GONE_S = 3_600.0  # the next project often has the same layers

_log = logging.getLogger(__name__)


def shrink_images(
    blobs: KeptBlobs,
    now_s: float,
    *,
    is_disk_low: bool,
    max_bytes: int,
    needed: Collection[Digest] = (),
) -> None:
    """Remove parts of images that nothing has used lately, and more of them while they are too large.

    They are made or brought again when needed.

    Args:
        blobs: of the images that builders have made here, and services were started from.
        now_s: seconds since the epoch.
        is_disk_low: then lately is much shorter ago, but longer than any build or start takes.
        max_bytes: what all parts together may take on the disk, but for those used lately in that sense.
        needed: stays.
    """
    young_s = now_s - _KEPT_WHILE_LOW_S
    entries = [
        Entry(
            key=blob.digest,
            used_at_s=blob.used_at_s,
            size_bytes=blob.size_bytes,
            is_in_use=blob.digest in needed or blob.used_at_s > young_s,
        )
        for blob in blobs.kept()
    ]
    limits = Limits(max_bytes=max_bytes, max_age_s=_KEPT_WHILE_LOW_S if is_disk_low else _KEPT_S)
    victims = choose_victims(entries, limits, now_s)
    freed = sum(blobs.remove_unless_used(Digest(victim.key), young_s) for victim in victims)
    if freed:
        _log.info("removed %d MB of images that were not used lately", freed // 1024**2)


class NodeImages:
    """Brings images, and gives them up.

    Args:
        registry: where they come from.
        blobs: where their parts are kept on this node; those that are there are not brought again.
        names: which images are here.
        engine: the container engine, which takes them in.
        cluster: ``host:port`` of the cluster, whose registry has the images without a host in their name.
        platform: of this node.
    """

    def __init__(
        self,
        registry: Registry,
        blobs: ImageBlobs,
        names: NamedImages,
        engine: ImageEngine,
        *,
        cluster: str,
        platform: Platform,
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._names = names
        self._engine = engine
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
        return self._engine.load(reference, found)

    def parts_in_use(self, in_use: Collection[str]) -> frozenset[Digest]:
        """The parts of the images with these digests that are here.

        Raises:
            FlopsError: ``image_damaged`` when it is not known which images are here.
        """
        images = self._names.images().items()
        return frozenset(
            part
            for name, image in images
            if parse_reference(name).digest in in_use
            for part in self._parts_of(image)
        )

    def give_up(self, kept: KeptBlobs, in_use: Collection[str], now_s: float, *, is_disk_low: bool) -> None:
        """Have the engine remove images that nothing used lately, or that left the registry an hour ago.

        Parts of an image that left the registry go with it, unless something else has used them within the
        hour: what a builder made of the same layers, another image. An image that a container uses stays.

        Args:
            kept: the parts on this node.
            in_use: digests of the images that services have.
            now_s: seconds since the epoch.
            is_disk_low: lately is much shorter ago then.

        Raises:
            FlopsError: ``image_damaged`` when it is not known which images are here; ``unreachable``,
                ``timeout`` when the engine is away.
        """
        used_s = {blob.digest: blob.used_at_s for blob in kept.kept()}
        old_s = now_s - (_KEPT_WHILE_LOW_S if is_disk_low else _KEPT_S)
        gone_s = now_s - _KEPT_WHEN_GONE_S
        unanswered: list[ImageReference] = []
        stay: set[Digest] = set()
        gone: set[Digest] = set()
        for name, image in self._names.images().items():
            reference, parts = parse_reference(name), self._parts_of(image)
            # What it shares with others may have been used later; without all its parts, it is of no use.
            used_at_s = min(used_s.get(part, 0.0) for part in parts)
            is_used = reference.digest in in_use
            is_gone = not is_used and used_at_s < gone_s and self._is_gone(reference, unanswered)
            is_old = not is_used and used_at_s < old_s
            if not (is_gone or is_old) or not self._engine.unload(reference, image):
                stay |= parts
                continue
            self._names.remove(name)
            _log.info("removed the image %s from the container engine", reference.name)
            gone |= parts if is_gone else set()
        for digest in gone - stay:
            kept.remove_unless_used(digest, gone_s)

    def _parts_of(self, image: Descriptor) -> set[Digest]:
        with contextlib.suppress(FlopsError):  # its manifest is gone, or damaged
            return set(self._names.parts(image))
        return {image.digest}

    def _is_gone(self, reference: ImageReference, unanswered: list[ImageReference]) -> bool:
        """Whether its registry knows nothing of this name any more.

        Args:
            reference: the image.
            unanswered: of those that were asked for in vain; whose registry is away is not asked again.
        """
        if any(other.host == reference.host for other in unanswered):
            return False
        try:
            return not self._registry.tags(reference)
        except FlopsError:
            unanswered.append(reference)
            return False

    def _find(self, reference: ImageReference) -> Descriptor | None:
        """The image that was brought before, if it is here whole."""
        try:
            found = self._names.images().get(str(reference))
            is_whole = found is not None and all(map(self._blobs.has, self._names.parts(found)))
        except FlopsError:  # a part of it is gone, or damaged
            return None
        return found if is_whole else None
