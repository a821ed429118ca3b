"""NVIDIA's GPUs of this machine, as the driver tells them; no program of NVIDIA's is needed.

A GPU's number is its place in the order of bus addresses: so `nvidia-smi`, the NVIDIA Container Toolkit and,
with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, CUDA count them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_FOLDER = Path("/proc/driver/nvidia/gpus")
_SHARED_DEVICES = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        number: by which all programs know it.
        model: its name.
        device: its file in /dev; its minor number may be another than `number`.
    """

    number: int
    model: str
    device: str


def local_gpus(environ: Mapping[str, str], folder: Path = _FOLDER) -> tuple[Gpu, ...]:
    """The GPUs that this node may use.

    Args:
        environ: of the daemon: numbers in ``CUDA_VISIBLE_DEVICES`` are those that the operator leaves to it.
        folder: where the driver tells of them.
    """
    found: list[Gpu] = []
    for file in sorted(folder.glob("*/information")):
        with contextlib.suppress(OSError):
            told = dict(_entry(line) for line in file.read_text(errors="replace").splitlines())
            if told.get("Model") and told.get("GPU Excluded", "No") == "No":
                device = f"/dev/nvidia{told.get('Device Minor', len(found))}"
                found.append(Gpu(len(found), told["Model"], device))
    given = environ.get(VISIBLE_VARIABLE, "").split(",")
    if not all(number.strip().isdecimal() for number in given):
        return tuple(found)
    return tuple(gpu for gpu in found if gpu.number in {int(number) for number in given})


def _entry(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def device_files(numbers: Iterable[int], folder: Path = _FOLDER) -> list[str]:
    """The devices that a service with GPUs of these numbers opens; none for no GPU."""
    own = [gpu.device for gpu in local_gpus({}, folder) if gpu.number in set(numbers)]
    return [*own, *(f"/dev/{name}" for name in _SHARED_DEVICES)] if own else []
