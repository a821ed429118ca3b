"""One repository's requirements, resolved by uv into hash locks, without CUDA where no GPU is asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from flops.adapters.uv_program import UvProgram, uv_error
from flops.core.cuda import CUDA_PACKAGES, NEEDLESS_PACKAGES, names_cuda
from flops.core.requirements import name_of
from flops.core.resolution import Problem, UnsolvableError, essence, mentioned, remedy
from flops.errors import ErrorCode, FlopsError

CPU_BACKEND = ("--torch-backend", "cpu")  # uv knows PyTorch's own index of builds without CUDA
_FORBIDDEN = "".join(f"{name}<0\n" for name in CUDA_PACKAGES)
_WITHOUT_CUDA = ("--constraint", "forbidden.txt", "--excludes", "needless.txt")
_NEEDLESS = "".join(f"{name}\n" for name in NEEDLESS_PACKAGES)


class UvResolver:
    """Locks for one interpreter.

    Args:
        uv: the program.
        python: the interpreter.
        needs_gpu: whether CUDA may come along.
        timeout_s: for each run of uv.
    """

    def __init__(self, uv: UvProgram, python: Path, *, needs_gpu: bool, timeout_s: float) -> None:
        self._uv = uv
        self._impatient = uv.having(UV_HTTP_RETRIES="0", UV_HTTP_CONNECT_TIMEOUT="5")
        self._python = python
        self._needs_gpu = needs_gpu
        self._timeout_s = timeout_s
        self._has_cpu_index = True  # until it cannot be reached
        self._uses_cpu_index = False  # once it has helped: pins are of its versions

    def lock(self, problem: Problem) -> str:
        """The lock, as uv writes it.

        Raises:
            UnsolvableError: the requirements cannot be met together.
            FlopsError: ``environment_build_failed``, ``unreachable``, ``timeout``, ``disk_full``.
        """
        if self._needs_gpu:
            return self._compile(self._uv, problem)
        if self._uses_cpu_index:
            return self._compile(self._uv, problem, (*_WITHOUT_CUDA, *CPU_BACKEND))
        try:
            return self._compile(self._uv, problem, _WITHOUT_CUDA)
        except UnsolvableError as exc:
            lock = self._from_cpu_index(problem) if names_cuda(str(exc)) else None
            if lock is None:
                raise
            return lock

    def explain(self, what: str, problem: Problem, exc: UnsolvableError) -> FlopsError:
        """The error to tell users: what contradicts what, or what needs CUDA.

        Args:
            what: what cannot be resolved, such as the dependency file.
            problem: what was asked for.
            exc: why it cannot be met.
        """
        explanation = str(exc)
        if not self._needs_gpu and names_cuda(explanation):
            try:
                self._compile(self._uv, problem)
            except UnsolvableError as real:
                explanation = str(real)  # CUDA is not what it fails for
            else:
                return _needs_cuda(what, problem, explanation)
        return FlopsError(
            ErrorCode.DEPENDENCIES_UNRESOLVABLE,
            f"{what} cannot be resolved for {self._python.name}: {essence(explanation)}",
            hint=remedy(explanation),
            details={"output": explanation[-4_000:]},
        )

    def _from_cpu_index(self, problem: Problem) -> str | None:
        """A lock with PyTorch from its own index; None when there is none, or it cannot be reached."""
        if not self._has_cpu_index:
            return None
        try:
            lock = self._compile(self._impatient, problem, (*_WITHOUT_CUDA, *CPU_BACKEND))
        except UnsolvableError:
            return None
        except FlopsError as exc:
            if exc.code is not ErrorCode.UNREACHABLE:
                raise
            self._has_cpu_index = False
            return None
        self._uses_cpu_index = True
        return lock

    def _compile(self, uv: UvProgram, problem: Problem, more: Sequence[str] = ()) -> str:
        pins = "".join(f"{name}=={version}\n" for name, version in sorted(problem.pins.items()))
        files = {
            "requirements.in": "".join(f"{text}\n" for text in (*problem.own, *problem.needed)),
            "pins.txt": pins,
            "forbidden.txt": _FORBIDDEN,
            "needless.txt": _NEEDLESS,
        }
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            for name, text in files.items():
                (folder / name).write_text(text)
            options = ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
            options += ["--no-emit-index-url", "--no-emit-find-links", "--constraint", "pins.txt", *more]
            command = ["pip", "compile", "requirements.in", "--python", str(self._python), *options]
            done = uv.run(command, folder, self._timeout_s)
        if done.exit_code != 0:
            if "No solution found" in done.errors:
                raise UnsolvableError(done.errors)
            raise uv_error(done, "The dependencies cannot be resolved")
        return done.output.decode()


def _needs_cuda(what: str, problem: Problem, explanation: str) -> FlopsError:
    named = mentioned(explanation, problem.own_names)
    asked = [text for text in problem.own if name_of(text) in named] or ["what it asks for"]
    return FlopsError(
        ErrorCode.DEPENDENCIES_UNRESOLVABLE,
        f"{what} cannot be resolved without CUDA: the package index has {', '.join(asked)} only as builds "
        "for GPUs, which are gigabytes, and the project asks for no GPU.",
        hint="Have the operator of the nodes give an index with builds for CPUs (docs/environments.md), or "
        "ask for GPUs with resource_constraints.vgpus.",
        details={"output": explanation[-4_000:]},
    )
