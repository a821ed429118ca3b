"""Which variables of the daemon's environment a service gets: what it needs to run, and no secrets."""

from __future__ import annotations

import math
from collections.abc import Mapping

from flops.core.cluster import Resources

_ALLOWED = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
        "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy",
        "all_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
        "GIT_SSL_CAINFO", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "XDG_CACHE_HOME", "FLOPS_LOG_LEVEL",
    }
)  # fmt: skip
_WITHOUT_PATHS = frozenset(
    {
        "TZ", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy",
        "all_proxy", "FLOPS_LOG_LEVEL",
    }
)  # fmt: skip
_ALLOWED_PREFIXES = ("LC_", "UV_", "OMP_", "OPENBLAS_", "MKL_", "HF_", "CUDA_", "NVIDIA_", "GIT_SSL_")
_DEALT_OUT = frozenset({"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"})  # each service has its own
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def service_environment(
    inherited: Mapping[str, str], resources: Resources, *, kit: str = "", is_in_image: bool = False
) -> dict[str, str]:
    """The environment of a service's process.

    Args:
        inherited: the daemon's environment.
        resources: a limit of CPUs also limits the threads of numerical libraries, which count all CPUs.
        kit: folder with our modules for a process of a project's environment.
        is_in_image: paths of the node say nothing there, so that only what has none is passed on.
    """
    environment = {
        name: value
        for name, value in inherited.items()
        if (name in _WITHOUT_PATHS if is_in_image else name in _ALLOWED or name.startswith(_ALLOWED_PREFIXES))
        and name not in _DEALT_OUT
    }
    environment["PYTHONUNBUFFERED"] = "1"
    environment["FLWR_TELEMETRY_ENABLED"] = "0"
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
    if kit:
        environment["PYTHONPATH"] = kit
    if resources.vcpus is not None:
        threads = str(max(1, math.ceil(resources.vcpus)))
        for name in _THREAD_VARIABLES:
            environment.setdefault(name, threads)
    return environment
