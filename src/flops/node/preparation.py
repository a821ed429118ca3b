"""Everything a service needs before its process can start: code, environments, context, command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flops.actor import ActorContext
from flops.core.cluster import ServiceKind, ServiceSpec
from flops.core.clusters import DEFAULT_CLUSTER
from flops.core.ids import Digest, ServiceId
from flops.core.reach import Reach
from flops.disclosure import Disclosure
from flops.durable_file import file_error
from flops.errors import ErrorCode, FlopsError
from flops.node.bundles import BundleStore
from flops.node.service_environment import service_environment
from flops.node.service_folder import ServiceFolder
from flops.node.service_reach import service_reach
from flops.ports import Environments
from flops.wire import image_layout

Report = Callable[[str], None]
DataAccess = Callable[[ServiceSpec], tuple[str, str]]

_WITH_USERS_CODE = frozenset({ServiceKind.AGGREGATOR, ServiceKind.LEARNER, ServiceKind.INFERENCE})


@dataclass(frozen=True)
class Launch:
    """How to start a service's process."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    work_dir: Path
    reach: Reach


@dataclass(frozen=True)
class _Programs:
    """Where a service finds what it runs: paths on the node, or in its image."""

    own_python: str  # runs our own services
    own_modules: str  # "" where `own_python` has them installed
    project_python: str
    model_python: str
    kit: str
    bundle: str
    environments: str


_IN_IMAGE = _Programs(
    own_python=image_layout.python_of(image_layout.OWN),
    own_modules=image_layout.OWN_MODULES,
    project_python=image_layout.python_of(image_layout.PROJECT),
    model_python=image_layout.python_of(image_layout.MODEL),
    kit=image_layout.KIT,
    bundle=image_layout.BUNDLE,
    environments="",
)
# The aggregator makes models where it exports them: the model's environment has the project's pins.
_IN_AGGREGATOR_IMAGE = replace(_IN_IMAGE, project_python=_IN_IMAGE.model_python)


@dataclass(frozen=True)
class NodeSite:
    """What services are told about their node.

    Args:
        name: the node's name.
        host: address at which others reach this node's services.
        blobs_url: base URL of the cluster's blobs.
        kit_dir: folder with our modules for projects' environments.
        environments_dir: folder of the environments on this node.
        images_dir: folder of what images are made of.
        data_dir: folder of the data server's tags, which learners may read theirs of.
        inherited: the daemon's environment variables.
        cluster: the name of its cluster.
        authority: certificate of the cluster's authority, "" where it does not encrypt.
        disclosure: what the operator lets others see when users' code fails here.
        has_open_network: users' code may dial any address here.
    """

    name: str
    host: str
    blobs_url: str
    kit_dir: Path
    environments_dir: Path
    images_dir: Path
    inherited: Mapping[str, str]
    data_dir: Path | None = None
    cluster: str = DEFAULT_CLUSTER
    authority: str = ""
    disclosure: Disclosure = Disclosure.FULL
    has_open_network: bool = False

    def hides_output(self, kind: ServiceKind) -> bool:
        """Whether the output of services of a kind stays here: users' code writes to it."""
        return kind in _WITH_USERS_CODE and not self.disclosure.is_output_told


class Preparer:
    """Prepares services of one node.

    Args:
        site: what services are told.
        environments: builds virtual environments.
        bundles: unpacked bundles.
        fetch: brings a blob's verified bytes into a file.
        data_access: address of the data server and a token for it, as far as the service needs them.
        bring_image: has the container engine fetch an image unless it is there; returns the engine's name
            for it. None on a node that runs no containers.
        certify: writes key and certificate of a service that others dial; None where the cluster does not
            encrypt.
    """

    def __init__(
        self,
        site: NodeSite,
        environments: Environments,
        bundles: BundleStore,
        fetch: Callable[[Digest, Path], None],
        data_access: DataAccess,
        bring_image: Callable[[str, Report], str] | None = None,
        certify: Callable[[ServiceId, Path], object] | None = None,
    ) -> None:
        self.site = site
        self._environments = environments
        self._bundles = bundles
        self._fetch = fetch
        self._data_access = data_access
        self._bring_image = bring_image
        self._certify = certify

    def prepare(self, spec: ServiceSpec, folder: ServiceFolder, report: Report) -> Launch:
        """Fetch, build and write what the service needs.

        Args:
            spec: the service.
            folder: its folder.
            report: is told each step, in one sentence.

        Raises:
            FlopsError: ``unreachable`` when the cluster does not answer, which passes; else a final failure.
        """
        image = self._image_of(spec, report)
        if not image:
            programs = self._programs(spec, folder, report)
        else:
            programs = _IN_AGGREGATOR_IMAGE if spec.kind is ServiceKind.AGGREGATOR else _IN_IMAGE
        address, token = self._data_access(spec)
        context = ActorContext(
            service_id=spec.id,
            project_id=spec.project_id,
            node_name=self.site.name,
            work_dir=str(folder.work_dir),
            host=self.site.host,
            blobs_url=self.site.blobs_url,
            repo_dir=programs.bundle,
            kit_dir=programs.kit,
            project_python=programs.project_python,
            model_python=programs.model_python,
            environments_dir=programs.environments,
            images_dir=str(self.site.images_dir) if spec.kind is ServiceKind.BUILDER else "",
            data_address=address,
            data_token=token,
            data_dir=str(self.site.data_dir) if self.site.data_dir and address else "",
            cluster=self.site.cluster,
            authority=self.site.authority,
            key=spec.key if self.site.authority else "",
            identity=self._identity_of(spec, folder),
            has_open_network=self.site.has_open_network,
            disclosure=self.site.disclosure.value,
            config=spec.config,
        )
        try:
            path = context.save()
        except OSError as exc:
            raise file_error(exc, folder.work_dir) from exc
        return self._launch(spec, context, path, programs, image)

    def _identity_of(self, spec: ServiceSpec, folder: ServiceFolder) -> str:
        if self._certify is None or spec.kind is not ServiceKind.AGGREGATOR:
            return ""
        path = folder.work_dir / "identity.pem"
        self._certify(spec.id, path)
        return str(path)

    def _image_of(self, spec: ServiceSpec, report: Report) -> str:
        if not spec.image:
            return ""
        if self._bring_image is None:
            raise FlopsError(
                ErrorCode.SERVICE_FAILED,
                f"{spec.id} runs from an image, but {self.site.name} runs no containers.",
                hint="Switch them on: `NodeEngine config virtualization container on`.",
            )
        return self._bring_image(spec.image, report)

    def _programs(self, spec: ServiceSpec, folder: ServiceFolder, report: Report) -> _Programs:
        bundle = ""
        if spec.bundle is not None:
            report("fetching its files")
            bundle = str(self._bundles.folder_of(spec.bundle))
        return _Programs(
            own_python=sys.executable,
            own_modules="",
            project_python=self._interpreter(spec.environment, folder, report),
            model_python=self._interpreter(spec.model_environment, folder, report),
            kit=str(self.site.kit_dir),
            bundle=bundle,
            environments=str(self.site.environments_dir),
        )

    def _interpreter(self, lock: Digest | None, folder: ServiceFolder, report: Report) -> str:
        if lock is None:
            return ""
        file = folder.path / f"{lock}.lock"
        if not file.exists():  # kept, so that a restart of the service does not need the cluster
            self._fetch(lock, file)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise FlopsError(
                ErrorCode.ENVIRONMENT_BUILD_FAILED, f"The lock {lock[:12]} cannot be read: {exc}."
            ) from exc
        return str(self._environments.materialise(text, report))

    def _launch(
        self, spec: ServiceSpec, context: ActorContext, context_file: Path, programs: _Programs, image: str
    ) -> Launch:
        module: tuple[str, ...] = ("flops.wiring", spec.kind.value)
        python, modules = programs.own_python, programs.own_modules
        if spec.kind is ServiceKind.LEARNER:
            python, module, modules = context.project_python, ("flops.trainer.learner",), context.kit_dir
        elif spec.kind is ServiceKind.INFERENCE:
            python, module, modules = context.model_python, ("flops.serving.app",), context.kit_dir
        if not python:
            raise FlopsError(
                ErrorCode.SERVICE_FAILED,
                f"{spec.id} is a {spec.kind.value}, but its spec names no environment.",
            )
        env = service_environment(self.site.inherited, spec.resources, kit=modules, is_in_image=bool(image))
        if spec.kind in _WITH_USERS_CODE:  # libraries keep caches and settings there, which must be writable
            env["HOME"] = context.work_dir
            env.pop("XDG_CACHE_HOME", None)
        return Launch(
            argv=(python, "-m", *module, str(context_file)),
            env=env,
            work_dir=Path(context.work_dir),
            reach=service_reach(spec.kind, context, env, image),
        )
