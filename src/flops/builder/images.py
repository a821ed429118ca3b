"""The images of a project: what is put into which, under which name (docs/adr/0014-images.md)."""

from __future__ import annotations

import contextvars
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import flops
import flops_utils
from flops.actor import ActorContext
from flops.core.dockerfile import NAMES
from flops.core.image_reference import ImageReference
from flops.core.images import Descriptor, HealthCheck, ImageRun, image_labels
from flops.core.project import Images
from flops.image_ports import (
    ImageAssembler,
    ImageBlobs,
    ImageRecipe,
    Registry,
    Report,
    RepositoryImages,
)
from flops.wire.image_layout import BUNDLE, KIT, MODEL, OWN, OWN_MODULES, PROJECT, python_of
from flops.wire.services import ImageOrder

INFERENCE_PORT = 8080
_CONTEXT = "/app/context.json"  # of an image that somebody runs by hand
_ASK = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{INFERENCE_PORT}/ping', timeout=4)"


@dataclass(frozen=True)
class ImageTools:
    """What makes images and takes them away.

    Args:
        assembler: puts them together.
        blobs: where the assembler leaves their parts.
        registry: takes them.
        own_lock: of what our own modules import, for the aggregator.
        dockerfiles: makes the images that repositories describe.
    """

    assembler: ImageAssembler
    blobs: ImageBlobs
    registry: Registry
    own_lock: str
    dockerfiles: RepositoryImages


class ProjectImages:
    """Makes and pushes the images of one project.

    Args:
        tools: what it is done with.
        order: what is asked for.
        context: of the builder: its bundle, and our modules.
        cluster: ``host:port`` of the cluster's registry, as this node reaches it.
    """

    def __init__(self, tools: ImageTools, order: ImageOrder, context: ActorContext, cluster: str) -> None:
        self._tools = tools
        self._order = order
        self._kit = Path(context.kit_dir)
        self._bundle = Path(context.repo_dir)
        self._cluster = cluster

    def push_base(self, report: Report) -> str:
        """Make and push the image of the repository's Dockerfile; returns its name, "" without a Dockerfile.

        Raises:
            FlopsError: see `RepositoryImages.make` and `Registry.push`.
        """
        if not any((self._bundle / name).is_file() for name in NAMES):
            return ""
        index = self._tools.dockerfiles.make(self._bundle, self._order.platforms, report)
        return self._push_index("base", self._order.commit[:12], index, report)

    def push_training(self, lock: str, model_lock: str, report: Report) -> Images:
        """Make and push the images of aggregator and learner.

        Args:
            lock: of the project's environment.
            model_lock: of the environment that exports models.
            report: is told each step, in one sentence.

        Raises:
            FlopsError: see `ImageAssembler.assemble` and `Registry.push`.
        """
        learner = ImageRecipe(
            self._order.platforms,
            folders={BUNDLE: self._bundle},
            run=ImageRun(
                entrypoint=(python_of(PROJECT), "-m", "flops.trainer.learner"),
                env={"PYTHONPATH": KIT},
                labels=self._labels("learner"),
            ),
            environments={PROJECT: lock},
            modules={KIT: self._kit},
        )
        own = {f"{OWN_MODULES}/{p.__name__}": Path(str(p.__file__)).parent for p in (flops, flops_utils)}
        aggregator = ImageRecipe(
            self._order.platforms,
            folders={BUNDLE: self._bundle},
            run=ImageRun(
                entrypoint=(python_of(OWN), "-m", "flops.wiring", "aggregator"),
                env={"PYTHONPATH": OWN_MODULES},
                labels=self._labels("aggregator"),
            ),
            environments={OWN: self._tools.own_lock, MODEL: model_lock},
            modules={**own, KIT: self._kit},
        )
        tag = self._order.commit[:12]
        with ThreadPoolExecutor(2) as pool:
            pushed = [
                pool.submit(contextvars.copy_context().run, self._push, what, tag, recipe, report)
                for what, recipe in (("learner", learner), ("aggregator", aggregator))
            ]
            return Images(learner=pushed[0].result(), aggregator=pushed[1].result())

    def push_model(self, model_lock: str, report: Report) -> str:
        """Make and push the image that serves the trained model; returns its name.

        Whoever runs it needs nothing else: it serves on port 8080.

        Raises:
            FlopsError: see `ImageAssembler.assemble` and `Registry.push`.
        """
        context = ActorContext(
            service_id="inference",
            project_id=self._order.project_id,
            node_name="container",
            work_dir="/tmp",  # noqa: S108 (of the container)
            host="0.0.0.0",  # noqa: S104 (who runs it decides which ports can be reached)
            repo_dir=BUNDLE,
            kit_dir=KIT,
            model_python=python_of(MODEL),
            config={"port": INFERENCE_PORT},
        )
        model = self._order.model
        recipe = ImageRecipe(
            self._order.platforms,
            files={_CONTEXT: json.dumps(asdict(context), sort_keys=True).encode()},
            folders={BUNDLE: self._bundle},
            run=ImageRun(
                entrypoint=(python_of(MODEL), "-m", "flops.serving.app"),
                arguments=(_CONTEXT,),
                env={"PYTHONPATH": KIT},
                ports=(INFERENCE_PORT,),
                labels=self._labels("model"),
                health=HealthCheck(command=(python_of(MODEL), "-c", _ASK)),
            ),
            environments={MODEL: model_lock},
            modules={KIT: self._kit},
        )
        tag = f"round-{model.round}" if model is not None else self._order.commit[:12]
        return self._push("model", tag, recipe, report)

    def _labels(self, what: str) -> dict[str, str]:
        order, model = self._order, self._order.model
        metrics = {} if model is None else {"accuracy": model.accuracy, "loss": model.loss}
        return image_labels(
            title=f"FLOps {what} of project {order.project_id}",
            project=order.project_id,
            run="" if model is None else model.run_id,
            round_number=None if model is None else model.round,
            metrics={name: value for name, value in metrics.items() if value is not None},
            source=order.source,
            revision=order.commit,
        )

    def _push(self, what: str, tag: str, recipe: ImageRecipe, report: Report) -> str:
        return self._push_index(what, tag, self._tools.assembler.assemble(recipe, report), report)

    def _push_index(self, what: str, tag: str, index: Descriptor, report: Report) -> str:
        name = f"flops/{self._order.project_id}/{what}"
        target = ImageReference(host=self._order.registry or self._cluster, name=name, tag=tag)
        self._tools.registry.push(target, index, self._tools.blobs, report)
        host = f"{self._order.registry}/" if self._order.registry else ""
        return f"{host}{name}@sha256:{index.digest}"
