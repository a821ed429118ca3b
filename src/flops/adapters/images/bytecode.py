"""Bytecode in images: a container cannot write its own, and would compile everything anew at each start.

Every module gets it but those of packages' own tests. It is not compared with its source when it is used
("unchecked"): what is in an image does not change. Bytecode is the same on every platform; its Python has to
be that of the image.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from flops.adapters.uv_program import UvProgram, is_disk_full
from flops.command import run_command
from flops.errors import ErrorCode, FlopsError

_TIMEOUT_S = 900.0
# One process in one order: what bytecode refers to twice depends on what was compiled before it.
_COMPILE = """
import os, py_compile, sys
root, shown = sys.argv[1:]
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
for folder, names, files in os.walk(root):
    names[:] = sorted(name for name in names if name not in {"test", "tests", "__pycache__"})
    for name in sorted(files):
        if name.endswith(".py"):
            path = os.path.join(folder, name)
            try:
                py_compile.compile(path, dfile=shown + path[len(root):], doraise=True, invalidation_mode=mode)
            except (py_compile.PyCompileError, ValueError, RecursionError):
                pass  # not for this Python; who imports it is told
"""


def compile_modules(
    folder: Path, shown: str, *, python: str, uv: UvProgram, descriptor: int | None = None
) -> None:
    """Write bytecode beside all modules in a folder.

    Args:
        folder: with the modules.
        shown: where it is in the image, as tracebacks have it.
        python: ``major.minor`` of the image's Python.
        uv: finds such a Python here.
        descriptor: that the compiler keeps open.

    Raises:
        FlopsError: ``environment_build_failed`` when there is no such Python; ``disk_full``, ``timeout``.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        done = run_command(
            [str(uv.find_python(python)), "-s", "-S", "-W", "ignore", "-c", _COMPILE, str(folder), shown],
            environ={**uv.environ, "PYTHONHASHSEED": "0"},
            cwd=Path(elsewhere),
            timeout_s=_TIMEOUT_S,
            keep_open=[] if descriptor is None else [descriptor],
        )
    if is_disk_full(done.errors):
        raise FlopsError(ErrorCode.DISK_FULL, f"The disk of {folder} is full.")
    if done.is_timed_out:
        raise FlopsError(ErrorCode.TIMEOUT, f"Compiling {shown} did not end within {_TIMEOUT_S:g} s.")
    if done.exit_code != 0:
        raise FlopsError(
            ErrorCode.IMAGE_BUILD_FAILED, f"The modules in {shown} cannot be compiled: {done.errors[-500:]}"
        )
