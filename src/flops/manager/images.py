"""Images in the control plane's registry: what is there, who needs it, and what is given up.

An image of a project is in use while its project is in progress, and while a service runs from it. Images
that others have pushed are listed, and stay.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

from flops.core.ids import Digest
from flops.core.image_reference import is_host
from flops.core.project import Project, Stage
from flops.core.retention import Entry, Limits, choose_victims, keep_order
from flops.deployment_ports import ManagerStore
from flops.ports import Clock, Orchestrator
from flops.retention_ports import RegisteredImage, RegisteredImages
from flops.wire.rest import Image, ImageList, PrunedImages

_log = logging.getLogger(__name__)

_PROJECTS_IMAGE = re.compile(r"flops/(?P<project>[0-9a-f]{12})/[a-z]+")  # as builders name them
_PUSHING = frozenset({Stage.BUILDING, Stage.PACKAGING})
_PUSH_S = 3_600.0  # no push takes longer; its parts come before the image that names them
_PUSH_BETWEEN_S = 60.0  # the same, when no project pushes right now
_OTHERS = "not FLOps' own"

Described = dict[str, RegisteredImage]  # by name


class ImageShelf:
    """Lists and removes images of projects. Thread-safe.

    Args:
        store: says which projects there are, and which models are deployed.
        orchestrator: says what runs from which image.
        registry: has the images.
        clock: says how long ago something was used.
        max_bytes: how large the registry may get; what is in use stays beyond it.
        deploying: held by who has models deployed, and here while images are removed.
    """

    def __init__(
        self,
        store: ManagerStore,
        orchestrator: Orchestrator,
        registry: RegisteredImages,
        clock: Clock,
        *,
        max_bytes: int,
        deploying: AbstractContextManager[object],
    ) -> None:
        self._store = store
        self._orchestrator = orchestrator
        self._registry = registry
        self._clock = clock
        self._max_bytes = max_bytes
        self._deploying = deploying

    def all(self) -> ImageList:
        """All images, used last first.

        Raises:
            FlopsError: the records cannot be read.
        """
        found = self._described()
        uses = self._uses()
        images = sorted(_lines(found, uses), key=lambda image: (-image.used_at_s, image.name))
        return ImageList(images=tuple(images), size_bytes=_size_of(found.values()), max_bytes=self._max_bytes)

    def prune(self, *, is_dry_run: bool = False) -> PrunedImages:
        """Remove all images that nothing uses, with the parts that no other image has.

        A model whose image is gone is served from its environment when it is deployed again. Nodes give up
        what the registry does not have any more by themselves.

        Args:
            is_dry_run: only say what would be removed.

        Raises:
            FlopsError: something cannot be removed; what is left goes with the next try.
        """
        return self._remove(lambda _, lines: [line.name for line in lines if not line.use], is_dry_run)

    def tidy(self) -> None:
        """Remove images of deleted projects, and, while the registry is too large, those used longest ago.

        Raises:
            FlopsError: something cannot be removed; what is left goes with the next try.
        """
        done = self._remove(self._superfluous, is_dry_run=False)
        for image in done.images:
            _log.info("removed %s from the registry: %s", image.name, image.project_id or "no project")

    def _superfluous(self, found: Described, lines: list[Image]) -> list[str]:
        known = {str(project.id) for project in self._store.all()}
        gone = [line.name for line in lines if line.project_id and line.project_id not in known]
        order = keep_order(
            Entry(key=line.name, used_at_s=line.used_at_s, is_in_use=bool(line.use))
            for line in lines
            if line.name not in gone
        )
        seen: set[Digest] = set()
        entries = []
        for entry in order:  # a part that several have goes with the one that goes last
            parts = found[entry.key].parts
            size = sum(parts[digest] for digest in parts.keys() - seen)
            seen |= parts.keys()
            entries.append(entry.model_copy(update={"size_bytes": size}))
        limits = Limits(max_bytes=self._max_bytes)
        return gone + [entry.key for entry in choose_victims(entries, limits, self._clock.now_s())]

    def _remove(
        self, choose: Callable[[Described, list[Image]], list[str]], is_dry_run: bool
    ) -> PrunedImages:
        with self._deploying:
            found = self._described()  # before the projects are read: who pushes exists
            lines = _lines(found, self._uses())
            names = set(choose(found, lines))
            removed = tuple(line for line in lines if line.name in names)
            rest = {digest for name, image in found.items() if name not in names for digest in image.parts}
            parts = {d: s for name in names for d, s in found[name].parts.items() if d not in rest}
            if not is_dry_run:
                for line in removed:
                    self._forget(line)
        freed = 0
        if removed and not is_dry_run:
            is_pushing = any(project.stage in _PUSHING for project in self._store.all())
            since_s = self._clock.now_s() - (_PUSH_S if is_pushing else _PUSH_BETWEEN_S)
            freed = self._registry.collect_garbage(since_s, parts)
        return PrunedImages(
            images=removed, size_bytes=sum(parts.values()), freed_bytes=freed, is_dry_run=is_dry_run
        )

    def _forget(self, image: Image) -> None:
        """Remove a name; before that, what the project's record says of the model's image."""
        project = next((found for found in self._store.all() if found.id == image.project_id), None)
        if project is not None and _model_image(project) == image.name and project.images is not None:
            images = project.images.model_copy(update={"inference": ""})
            changes = {"images": images, "version": project.version + 1}
            self._store.save(project.model_copy(update=changes), (), ())
        self._registry.forget(image.name)

    def _described(self) -> Described:
        return {name: self._registry.describe(name) for name in self._registry.names()}

    def _uses(self) -> dict[str, str]:
        """By project, or by image, who needs it."""
        uses: dict[str, str] = {}
        projects = {project.id: project for project in self._store.all()}
        for service in self._orchestrator.services():
            if service.spec.image and service.should_run and not service.status.state.is_final:
                uses[_name_in(service.spec.image)] = f"{service.spec.id} runs from it"
        for record in self._store.deployments():
            for launch in record.launched:
                if (image := _model_image(projects.get(launch.project_id))) is not None:
                    uses[image] = f"model {record.name} is deployed"
        for project in projects.values():
            if not project.stage.is_final:
                uses[str(project.id)] = f"its project is {project.stage.value}"
        return uses


def _lines(found: Described, uses: Mapping[str, str]) -> list[Image]:
    owners = Counter(digest for image in found.values() for digest in image.parts)
    lines = []
    for name, image in found.items():
        owner = _PROJECTS_IMAGE.fullmatch(name)
        project_id = owner["project"] if owner is not None else ""
        use = uses.get(name) or uses.get(project_id, "") if project_id else _OTHERS
        lines.append(
            Image(
                name=name,
                project_id=project_id,
                tags=image.tags,
                digest=image.digest,
                platforms=image.platforms,
                size_bytes=sum(image.parts.values()),
                own_bytes=sum(size for digest, size in image.parts.items() if owners[digest] == 1),
                used_at_s=image.used_at_s,
                use=use,
            )
        )
    return lines


def _size_of(images: Iterable[RegisteredImage]) -> int:
    parts: dict[Digest, int] = {}
    for image in images:
        parts |= image.parts
    return sum(parts.values())


def _model_image(project: Project | None) -> str | None:
    images = project.images if project is not None else None
    return _name_in(images.inference) if images is not None and images.inference else None


def _name_in(image: str) -> str:
    """The image's name in its registry: without host and digest."""
    name = image.partition("@")[0]
    first, _, rest = name.partition("/")
    return rest if is_host(first) and rest else name
