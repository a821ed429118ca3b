"""What each kind of service may use of its node's files, beside its work folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import flops
from flops.actor import ActorContext
from flops.core.cluster import ServiceKind
from flops.core.reach import Reach

_OWN_PROGRAMS = (sys.prefix, sys.base_prefix, str(Path(flops.__file__).resolve().parents[1]))


def service_reach(kind: ServiceKind, context: ActorContext, environ: Mapping[str, str]) -> Reach:
    """What a service may use.

    All read their own bundle, our modules and the environments. Builders also write environments and uv's
    cache, mock data providers the cache of Hugging Face.

    Args:
        kind: of the service.
        context: of the service.
        environ: the service's environment variables.
    """
    bundle = (context.repo_dir,) if context.repo_dir else ()
    readable = (*_OWN_PROGRAMS, context.kit_dir, context.environments_dir, *bundle)
    writable: tuple[str, ...] = ()
    if kind is ServiceKind.BUILDER:
        writable = (context.environments_dir, context.images_dir, _cache(environ, "UV_CACHE_DIR", "uv"))
    elif kind is ServiceKind.MOCK_DATA_PROVIDER:
        writable = (_cache(environ, "HF_HOME", "huggingface"),)
    return Reach(readable=readable, writable=writable)


def _cache(environ: Mapping[str, str], variable: str, name: str) -> str:
    caches = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".cache")
    return environ.get(variable) or str(Path(caches) / name)
