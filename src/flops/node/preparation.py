"""Everything a service needs before its process can start: code, environments, context, command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flops.actor import ActorContext
from flops.core.cluster import ServiceKind, ServiceSpec
from flops.core.ids import Digest
from flops.core.reach import Reach
from flops.disclosure import Disclosure
from flops.durable_file import file_error
from flops.errors import ErrorCode, FlopsError
from flops.node.bundles import BundleStore
from flops.node.service_environment import service_environment
from flops.node.service_folder import ServiceFolder
from flops.node.service_reach import service_reach
from flops.ports import Environments

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
class NodeSite:
    """What services are told about their node.

    Args:
        name: the node's name.
        host: address at which others reach this node's services.
        blobs_url: base URL of the cluster's blobs.
        kit_dir: folder with our modules for projects' environments.
        environments_dir: folder of the environments on this node.
        inherited: the daemon's environment variables.
        disclosure: what the operator lets others see when users' code fails here.
    """

    name: str
    host: str
    blobs_url: str
    kit_dir: Path
    environments_dir: Path
    inherited: Mapping[str, str]
    disclosure: Disclosure = Disclosure.FULL

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
    """

    def __init__(
        self,
        site: NodeSite,
        environments: Environments,
        bundles: BundleStore,
        fetch: Callable[[Digest, Path], None],
        data_access: DataAccess,
    ) -> None:
        self.site = site
        self._environments = environments
        self._bundles = bundles
        self._fetch = fetch
        self._data_access = data_access

    def prepare(self, spec: ServiceSpec, folder: ServiceFolder, report: Report) -> Launch:
        """Fetch, build and write what the service needs.

        Args:
            spec: the service.
            folder: its folder.
            report: is told each step, in one sentence.

        Raises:
            FlopsError: ``unreachable`` when the cluster does not answer, which passes; else a final failure.
        """
        repo_dir = ""
        if spec.bundle is not None:
            report("fetching its files")
            repo_dir = str(self._bundles.folder_of(spec.bundle))
        project_python = self._interpreter(spec.environment, folder, report)
        model_python = self._interpreter(spec.model_environment, folder, report)
        address, token = self._data_access(spec)
        context = ActorContext(
            service_id=spec.id,
            project_id=spec.project_id,
            node_name=self.site.name,
            work_dir=str(folder.work_dir),
            host=self.site.host,
            blobs_url=self.site.blobs_url,
            repo_dir=repo_dir,
            kit_dir=str(self.site.kit_dir),
            project_python=project_python,
            model_python=model_python,
            environments_dir=str(self.site.environments_dir),
            data_address=address,
            data_token=token,
            disclosure=self.site.disclosure.value,
            config=spec.config,
        )
        try:
            path = context.save()
        except OSError as exc:
            raise file_error(exc, folder.work_dir) from exc
        return self._launch(spec, context, path)

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

    def _launch(self, spec: ServiceSpec, context: ActorContext, context_file: Path) -> Launch:
        module: tuple[str, ...] = ("flops.wiring", spec.kind.value)
        python, kit = sys.executable, ""
        if spec.kind is ServiceKind.LEARNER:
            python, module, kit = context.project_python, ("flops.trainer.learner",), context.kit_dir
        elif spec.kind is ServiceKind.INFERENCE:
            python, module, kit = context.model_python, ("flops.serving.app",), context.kit_dir
        if not python:
            raise FlopsError(
                ErrorCode.SERVICE_FAILED,
                f"{spec.id} is a {spec.kind.value}, but its spec names no environment.",
            )
        env = service_environment(self.site.inherited, spec.resources, kit=kit)
        if spec.kind in _WITH_USERS_CODE:  # libraries keep caches and settings there, which must be writable
            env["HOME"] = context.work_dir
            env.pop("XDG_CACHE_HOME", None)
        return Launch(
            argv=(python, "-m", *module, str(context_file)),
            env=env,
            work_dir=Path(context.work_dir),
            reach=service_reach(spec.kind, context, env),
        )
