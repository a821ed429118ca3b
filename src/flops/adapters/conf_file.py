"""The file ``conf.json``: read whole, replaced whole, one writer at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flops.durable_file import file_error, write_durably
from flops.errors import ErrorCode, FlopsError


class ConfFile:
    """Keeps a JSON document in a file.

    Args:
        path: the file.
        defaults: what it holds when it is first written.
        check: raises ``config_corrupt`` for a document that cannot be used.
    """

    def __init__(
        self, path: Path, defaults: Callable[[], dict[str, Any]], check: Callable[[object], object]
    ) -> None:
        self.path = path
        self._defaults = defaults
        self._check = check

    def load(self) -> dict[str, Any]:
        """Read the document; the defaults when there is no file. Nothing is ever written here.

        Raises:
            FlopsError: ``config_corrupt``, ``file_unreadable``.
        """
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return self._defaults()
        except OSError as exc:
            raise file_error(exc, self.path) from exc
        try:
            raw = json.loads(text)
            self._check(raw)
        except ValueError as exc:
            raise FlopsError(ErrorCode.CONFIG_CORRUPT, f"{self.path} is not valid JSON: {exc}.") from exc
        except FlopsError as exc:
            raise FlopsError(ErrorCode.CONFIG_CORRUPT, f"{self.path}: {exc.message}") from exc
        return dict(raw)

    def update(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Read, change and replace the document, while no other `update` does; returns the new one.

        Raises:
            FlopsError: ``config_corrupt``, ``file_unreadable``, ``disk_full``; then the file is as it was.
        """
        return self._write(lambda: change(self.load()))

    def reset(self) -> dict[str, Any]:
        """Write the defaults, whatever is there.

        Raises:
            FlopsError: ``file_unreadable``, ``disk_full``.
        """
        return self._write(self._defaults)

    def _write(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise file_error(exc, self.path) from exc
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            document = make()
            text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
            write_durably(self.path, text, mode=0o644)
            return document
        finally:
            os.close(folder)
