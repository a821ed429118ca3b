"""Virtual environments by uv: resolved into hash locks, built once per lock and machine.

A lock is what `uv pip compile` writes, below two comment lines of ours::

    # python 3.11
    # imports numpy pyarrow sklearn.linear_model

The second names what is imported once when the environment is built. uv leaves bytecode to whoever imports
first, and where ``PYTHONDONTWRITEBYTECODE`` is set every start of a learner would compile the same modules
again: seconds each time. Compiling everything installed would take three times as long as what is needed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from packaging.specifiers import SpecifierSet

from flops.adapters.environment_folders import BUILDING, EnvironmentFolders
from flops.adapters.uv_program import (
    OWN_MINOR,
    UvProgram,
    is_disk_full,
    minor_of,
    own_python,
    release_of,
    uv_error,
    with_site_packages,
)
from flops.adapters.uv_resolver import CPU_BACKEND, UvResolver
from flops.command import Completed, run_command, stop_if_needless
from flops.core.cuda import cpu_builds
from flops.core.ids import Digest
from flops.core.ml_repository import environment_key, read_ml_repository
from flops.core.project import Environment
from flops.core.requirements import MLFLOW_NAMES, OLDEST_PYTHON, Dependencies, model_requirements, name_of
from flops.core.resolution import (
    Problem,
    Solution,
    UnsolvableError,
    allow_only,
    locked_versions,
    solve,
)
from flops.durable_file import file_error
from flops.errors import ErrorCode, FlopsError
from flops.package_ports import SitePackages

Report = Callable[[str], None]

_OLDEST = ".".join(map(str, OLDEST_PYTHON))
_HEADER = re.compile(r"# python (?P<python>\d+\.\d+)\n(?:# imports (?P<imports>.*)\n)?")
# Servers of one index differ for a while after a release: a version that one has just told is not there yet
# on the next one.
_NOT_LISTED = re.compile(r"there is no version of", re.IGNORECASE)
_MORE_TRIES, _INDEX_PAUSE_S = 5, 3.0
_KIT_IMPORTS = ("numpy", "pyarrow", "pyarrow.flight")
_MODEL_IMPORTS = (
    "mlflow.pyfunc",
    "mlflow.models",
    "pandas",
    "starlette.applications",
    "uvicorn",
    "orjson",
    "httptools",
    "uvloop",
)
_WARM_UP = (
    "import importlib, json, sys\n"
    "for name in json.loads(sys.argv[1]):\n"
    "    try:\n"
    "        importlib.import_module(name)\n"
    "    except BaseException as exc:\n"
    "        print(f'{name}: {type(exc).__name__}: {exc}', file=sys.stderr)\n"
)


class UvEnvironments:
    """Implements `flops.ports.Environments`.

    Args:
        root: environments lie at ``<root>/<SHA-256 of the lock>``.
        uv: the uv program.
        environ: environment of uv. Its ``UV_*`` variables decide which index, cache and links are used.
        mlflow_version: the MLflow of model environments; the tracking server's own.
        site: who near has packages; nobody if not given.
        lock_timeout_s: for each run of the resolver.
        build_timeout_s: for downloading and installing one environment.
    """

    def __init__(
        self,
        root: Path,
        *,
        uv: Path,
        environ: Mapping[str, str],
        mlflow_version: str,
        site: SitePackages | None = None,
        lock_timeout_s: float = 600.0,
        build_timeout_s: float = 3_600.0,
    ) -> None:
        self._root = root
        self._folders = EnvironmentFolders(root)
        self._uv = UvProgram(uv, environ)
        self._mlflow_version = mlflow_version
        self._site = site
        self._lock_timeout_s = lock_timeout_s
        self._build_timeout_s = build_timeout_s

    def lock(
        self, repo: Path, flavor: str, report: Report, *, needs_gpu: bool = False
    ) -> tuple[str, str, Environment]:
        """Resolve a repository's dependency file; returns both locks' text, and the environment.

        Args:
            repo: folder of the unpacked repository.
            flavor: the MLflow flavor whose libraries are needed to save the model.
            report: is told each step, in one sentence.
            needs_gpu: whether learners use GPUs; else CUDA is kept out.

        Raises:
            FlopsError: ``repo_contract_broken``, ``dependencies_invalid``, ``dependencies_unresolvable``;
                ``environment_build_failed`` when a source package cannot be built to learn its dependencies;
                ``unreachable``, ``timeout``, ``disk_full``.
        """
        repository = read_ml_repository(_read_folder(repo))
        dependencies = repository.dependencies
        python, minor, python_notes = self._choose_python(dependencies)
        report(f"Resolving {dependencies.file} for Python {minor}.")
        resolver = UvResolver(self._uv, python, needs_gpu=needs_gpu, timeout_s=self._lock_timeout_s)
        needed = repository.platform_requirements
        project = self._lock_project(resolver, dependencies, needed)
        report(f"Locked {len(locked_versions(project.lock))} packages for the learners.")
        needed = (*needed, *model_requirements(flavor, self._mlflow_version))
        model = self._lock_model(resolver, project, dependencies, needed)
        report(f"Locked {len(locked_versions(model.lock))} packages to save and serve the model.")
        imports = (*_KIT_IMPORTS, *repository.imports)
        lock_text = _with_header(project.lock, minor, imports)
        model_text = _with_header(model.lock, minor, (*imports, f"mlflow.{flavor}", *_MODEL_IMPORTS))
        key = environment_key(
            repository,
            flavor,
            mlflow_version=self._mlflow_version,
            platform=this_platform(),
            needs_gpu=needs_gpu,
        )
        builds = cpu_builds(model.lock)
        without_cuda = (f"Without CUDA, as no GPU is asked for: {', '.join(builds)}.",) if builds else ()
        environment = Environment(
            key=key,
            lock=_digest(lock_text),
            model_lock=_digest(model_text),
            python=minor,
            notes=(*dependencies.notes, *python_notes, *without_cuda, *project.notes, *model.notes),
        )
        return lock_text, model_text, environment

    def materialise(self, lock: str, report: Report) -> Path:
        """Build the environment of a lock unless it exists; returns its Python interpreter.

        A build that was killed is begun anew; of two builders at once the second waits for the first. What
        builds that were stopped or killed left behind is removed by the next one.

        Raises:
            FlopsError: ``environment_build_failed``, ``disk_full``, ``unreachable``, ``timeout``.
        """
        header = _HEADER.match(lock)
        if header is None:
            raise FlopsError(
                ErrorCode.ENVIRONMENT_BUILD_FAILED, "The lock does not say which Python it is for."
            )
        digest = _digest(lock)
        folder = self._folders.folder_of(digest)
        try:
            if not self._folders.begin_use(digest):
                with self._folders.exclusive(digest, report) as descriptor:
                    if not self._folders.is_whole(digest):
                        self._build(folder, lock, header, report, descriptor)
        except OSError as exc:
            raise file_error(exc, folder) from exc
        return folder / "bin" / "python"

    def _build(self, folder: Path, lock: str, header: re.Match[str], report: Report, descriptor: int) -> None:
        python = self._uv.find_python(header["python"])
        count = len(locked_versions(lock))
        report(f"Building an environment of {count} packages with Python {header['python']}.")
        self._folders.sweep()
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._install(folder, lock, python, report, descriptor)
            self._warm_up(folder, (header["imports"] or "").split(), report, descriptor)
            self._folders.complete(folder.name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        report("The environment is ready.")

    def _install(self, folder: Path, lock: str, python: Path, report: Report, descriptor: int) -> None:
        def watch(news: str) -> None:
            for line in news.splitlines():
                if line.strip().startswith(("Downloading", "Building")):
                    report(line.strip() + ".")

        with tempfile.TemporaryDirectory(dir=self._root, prefix=f"{BUILDING}{folder.name}-") as scratch:
            file = Path(scratch) / "lock.txt"
            file.write_text(lock)

            def run(step: Sequence[str], uv: UvProgram = self._uv) -> Completed:
                return uv.run(step, Path(scratch), self._build_timeout_s, watch, [descriptor])

            done = run(["venv", "--python", str(python), "--no-project", str(folder)])
            if done.exit_code == 0:
                interpreter = str(folder / "bin" / "python")
                sync = ["pip", "sync", "--require-hashes", "--python", interpreter, str(file)]
                done = with_site_packages(self._uv, self._site, lock, lambda uv: run(sync, uv), report)
                if _NOT_LISTED.search(done.errors) and cpu_builds(lock):  # locked from PyTorch's own index?
                    report("Looking for builds without CUDA in PyTorch's own index.")
                    other = run([*sync, *CPU_BACKEND])
                    done = other if other.exit_code == 0 else done
                for _ in range(_MORE_TRIES):
                    if done.exit_code == 0 or not _NOT_LISTED.search(done.errors):
                        break
                    report("The package index does not list a locked version right now; trying again.")
                    time.sleep(_INDEX_PAUSE_S)
                    stop_if_needless()
                    done = run([*sync, "--refresh"])
            if done.exit_code != 0:
                raise uv_error(done, f"The environment {folder} cannot be built")

    def _warm_up(self, folder: Path, names: Sequence[str], report: Report, descriptor: int) -> None:
        """Import once what services import at their start; a module that fails is told, not fatal."""
        with tempfile.TemporaryDirectory() as elsewhere:
            done = run_command(
                [str(folder / "bin" / "python"), "-c", _WARM_UP, json.dumps(list(names))],
                environ=self._uv.environ,
                cwd=Path(elsewhere),
                timeout_s=300.0,
                keep_open=[descriptor],
            )
        if is_disk_full(done.errors):
            raise FlopsError(ErrorCode.DISK_FULL, f"The disk of {folder} is full.")
        for line in done.errors.splitlines():
            name = line.partition(":")[0]
            if name in _KIT_IMPORTS:
                raise FlopsError(
                    ErrorCode.ENVIRONMENT_BUILD_FAILED,
                    f"The platform's own modules cannot run in the environment: {line[:500]}",
                )
            if name in names:
                report(f"A module cannot be imported in the new environment: {line[:300]}")

    def _lock_project(
        self, resolver: UvResolver, dependencies: Dependencies, needed: Sequence[str]
    ) -> Solution:
        asked, own = Problem(dependencies.requirements, tuple(needed)), Problem(dependencies.requirements)
        try:
            solution = solve(asked, resolver.lock)
        except UnsolvableError as exc:
            raise resolver.explain(dependencies.file, asked, exc) from exc
        if solution.notes:  # was something given up for us, or do the user's own not go together?
            try:
                resolver.lock(own)
            except UnsolvableError as exc:
                raise resolver.explain(dependencies.file, own, exc) from exc
        lock, missing = allow_only(solution.lock, dependencies.hashes)
        if missing:
            raise FlopsError(
                ErrorCode.DEPENDENCIES_UNRESOLVABLE,
                f"{dependencies.file}: no file of {', '.join(missing)} has a hash that is allowed there.",
            )
        return replace(solution, lock=lock)

    def _lock_model(
        self, resolver: UvResolver, project: Solution, dependencies: Dependencies, needed: Sequence[str]
    ) -> Solution:
        own = tuple(text for text in project.own if name_of(text) not in MLFLOW_NAMES)
        pins = {name: v for name, v in locked_versions(project.lock).items() if name not in MLFLOW_NAMES}
        asked = Problem(own, tuple(needed), pins)
        try:
            solution = solve(asked, resolver.lock)
        except UnsolvableError as exc:
            raise resolver.explain(f"{dependencies.file}, together with MLflow,", asked, exc) from exc
        return replace(solution, lock=allow_only(solution.lock, dependencies.hashes)[0])

    def _choose_python(self, dependencies: Dependencies) -> tuple[Path, str, tuple[str, ...]]:
        """Interpreter, its major.minor, and notes; what is asked for when the machine has it."""
        wanted = SpecifierSet(dependencies.python)
        if wanted.contains(platform.python_version(), prereleases=True):
            return own_python(), OWN_MINOR, ()
        asked = {minor_of(part.version) for part in wanted if part.operator in {"==", "~="}}
        is_met_by_own = asked and all(
            release_of(minor) < OLDEST_PYTHON or minor == OWN_MINOR for minor in asked
        )
        installed = [] if is_met_by_own else self._uv.installed_pythons()
        for version, path in installed:
            if wanted.contains(version, prereleases=True):
                return path, minor_of(version), ()
        version, path = next(
            ((version, path) for version, path in installed if minor_of(version) in asked),
            (platform.python_version(), own_python()),
        )
        note = (
            f"{dependencies.file} asks for Python {dependencies.python}, Python {version} is used: "
            f"of the versions on this machine it fits best, and older than {_OLDEST} are not supported."
        )
        return path, minor_of(version), (note,)


def this_platform() -> str:
    """What environments are locked for here, such as ``linux-x86_64-3.11``."""
    return f"{sys.platform}-{platform.machine()}-{OWN_MINOR}"


def _with_header(lock: str, minor: str, imports: Sequence[str]) -> str:
    return f"# python {minor}\n# imports {' '.join(dict.fromkeys(imports))}\n{lock}"


def _digest(text: str) -> Digest:
    return Digest(hashlib.sha256(text.encode()).hexdigest())


def _read_folder(repo: Path) -> dict[str, bytes]:
    """What decides a repository's contract and environment: its Python code and the files in its root."""
    try:
        root = [path for path in repo.iterdir() if path.is_file()]
        code = [path for path in repo.rglob("*.py") if path.is_file()]
        return {str(path.relative_to(repo)): path.read_bytes() for path in {*root, *code}}
    except OSError as exc:
        raise file_error(exc, repo) from exc
