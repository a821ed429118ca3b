"""The end of a training: the best parameters become a model that is tracked, registered and stored."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import shutil
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import httpx

from flops.core.ids import Digest
from flops.durable_file import file_error, sync_file
from flops.errors import ErrorCode, FlopsError

T = TypeVar("T")

_log = logging.getLogger(__name__)
_PUT_TIMEOUT_S = 60.0
_LONGEST_BACK_OFF_S = 5.0
AWAY = frozenset({ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT})
_FINAL = frozenset({ErrorCode.MODEL_EXPORT_FAILED, ErrorCode.UNAUTHENTICATED, ErrorCode.FORBIDDEN})


def keep_best(parameters: Path, target: Path) -> None:
    """Put the best round's parameters where the export finds them, whole or not at all.

    Raises:
        FlopsError: ``disk_full``, ``file_unreadable``.
    """
    temporary = target.with_suffix(".tmp")
    try:
        shutil.copyfile(parameters, temporary)
        sync_file(temporary)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise file_error(exc, target) from exc
    temporary.replace(target)


def pack(folder: Path) -> bytes:
    """A folder as tar.gz; the same content always gives the same bytes."""
    raw = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for path in sorted(folder.rglob("*")):
            member = archive.gettarinfo(path, str(path.relative_to(folder)))
            member.uid = member.gid = member.mtime = 0
            member.uname = member.gname = ""
            if member.isfile():
                with path.open("rb") as file:
                    archive.addfile(member, file)
            else:
                archive.addfile(member)
    return raw.getvalue()


def store_bundle(
    bundle: bytes,
    blobs_url: str,
    patience_s: float,
    *,
    away_patience_s: float = 0.0,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Digest:
    """Store bytes among the cluster's blobs; `options` are of the HTTP client.

    Raises:
        FlopsError: ``unreachable``, or what the blobs answer.
    """
    digest = Digest(hashlib.sha256(bundle).hexdigest())
    url = f"{blobs_url}/{digest}"
    patiently(lambda: _put(bundle, url, options), patience_s, away_patience_s=away_patience_s)
    return digest


def _put(data: bytes, url: str, options: Mapping[str, Any]) -> None:
    try:
        # The environment's proxies do not lead to the cluster.
        response = httpx.put(url, content=data, timeout=_PUT_TIMEOUT_S, trust_env=False, **options)
    except httpx.HTTPError as exc:
        raise FlopsError(ErrorCode.UNREACHABLE, f"The model cannot be stored at {url}: {exc}.") from exc
    if response.is_success:
        return
    try:
        raise FlopsError.from_dict(response.json())
    except ValueError as exc:
        status = response.status_code
        raise FlopsError(ErrorCode.UNREACHABLE, f"{url} answers {status} to the model.") from exc


def patiently(action: Callable[[], T], patience_s: float, *, away_patience_s: float = 0.0) -> T:
    """Repeat an action that may be repeated until it succeeds, cannot succeed, or the patience is over.

    Args:
        action: what to do.
        patience_s: how long it may be answered with errors.
        away_patience_s: how long it may not be answered at all, if that is longer.

    Raises:
        FlopsError: of the last try.
    """
    now_s = time.monotonic()
    deadline_s, away_deadline_s = now_s + patience_s, now_s + max(patience_s, away_patience_s)
    back_off_s = 0.1
    while True:
        try:
            return action()
        except FlopsError as exc:
            now_s = time.monotonic()
            if exc.code in AWAY:  # when it is back, it has all the time again
                deadline_s = now_s + patience_s
            last_s = away_deadline_s if exc.code in AWAY else deadline_s
            if exc.code in _FINAL or now_s + back_off_s > last_s:
                raise
            _log.warning("trying again: %s", exc)
        time.sleep(back_off_s)
        back_off_s = min(2 * back_off_s, _LONGEST_BACK_OFF_S)
