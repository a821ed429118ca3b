"""Which packages bring CUDA, gigabytes of it, into environments that have no GPU to use it with."""

from __future__ import annotations

from flops.core.resolution import locked_versions, mentioned

_MAJORS = ("", "-cu11", "-cu12", "-cu13", "-cu14")
# Every build of PyTorch with CUDA needs one of these, builds without CUDA none. Forbidding them makes a
# resolver choose a version without CUDA, where the index has one.
CUDA_PACKAGES = (
    "cuda-toolkit",
    "cuda-bindings",
    *(f"nvidia-{part}{major}" for part in ("cublas", "cudnn", "cuda-runtime") for major in _MAJORS),
)
# XGBoost names it, and loads it only to train on several GPUs: 350 MB that can be left out.
NEEDLESS_PACKAGES = tuple(f"nvidia-nccl{major}" for major in _MAJORS)


def names_cuda(explanation: str) -> bool:
    """Whether a resolver's explanation speaks of packages that bring CUDA."""
    return bool(mentioned(explanation, CUDA_PACKAGES))


def cpu_builds(lock: str) -> tuple[str, ...]:
    """The packages of a lock that are builds without CUDA, such as ``torch 2.13.0+cpu``."""
    versions = locked_versions(lock).items()
    return tuple(f"{name} {version}" for name, version in versions if version.endswith("+cpu"))
