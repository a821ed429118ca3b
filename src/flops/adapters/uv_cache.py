"""uv's own cache: downloads and unpacked packages, which environments are linked or copied from."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from flops.adapters.uv_program import UvProgram, uv_error

_TIMEOUT_S = 600.0
_SIZE = ("cache", "size", "--output-format", "machine", "--preview-features", "cache-size")

_log = logging.getLogger(__name__)


class UvCache:
    """Keeps uv's cache below a limit, if there is one; environments that are built stay whole.

    uv cannot tell what was used least recently: beyond the limit the whole cache goes, and what is needed
    later is downloaded again. A build that runs loses nothing: uv locks its cache.

    Args:
        uv: the program.
        environ: its environment, which says where its cache is.
        lock_timeout_s: uv waits so long for others of its kind that use the cache.
        max_bytes: the limit; None for a cache that is not ours to empty, as other programs use it, too.
    """

    def __init__(
        self, uv: Path, environ: Mapping[str, str], max_bytes: int | None, *, lock_timeout_s: int = 10
    ) -> None:
        self._uv = UvProgram(uv, {**environ, "UV_LOCK_TIMEOUT": str(lock_timeout_s)})
        # Its environments would lead nowhere without it.
        self._is_linked_to = environ.get("UV_LINK_MODE") == "symlink"
        self._max_bytes = max_bytes

    def shrink(self, is_disk_low: bool) -> None:
        """Remove what uv itself finds useless if the disk is low or the limit is passed, else nothing.

        If the limit is still passed then, everything goes.

        Raises:
            FlopsError: ``timeout``; ``environment_build_failed`` when uv is not there or its cache is in use.
        """
        if not is_disk_low and not self._is_too_large():
            return
        self._run(["cache", "prune"])
        if self._is_too_large() and not self._is_linked_to:
            self._run(["cache", "clean"])

    def _is_too_large(self) -> bool:
        return self._max_bytes is not None and self.size_bytes() > self._max_bytes

    def size_bytes(self) -> int:
        """Its size; 0 when uv cannot tell.

        Raises:
            FlopsError: as `shrink`.
        """
        with contextlib.suppress(ValueError):
            return int(self._run([*_SIZE]))
        return 0

    def _run(self, command: Sequence[str]) -> str:
        with tempfile.TemporaryDirectory() as elsewhere:
            done = self._uv.run(command, Path(elsewhere), _TIMEOUT_S)
        if done.exit_code != 0:
            raise uv_error(done, f"uv {' '.join(command[:2])} failed")
        if command[1] != "size":
            _log.info("uv %s: %s", " ".join(command), " ".join(done.errors.split())[-300:])
        return done.output.decode(errors="replace").strip()
