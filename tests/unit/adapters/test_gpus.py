"""GPUs as NVIDIA's driver tells of them, in files that were written as it writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from flops.adapters.gpus import Gpu, device_files, local_gpus

TOLD = "Model: \t\t NVIDIA {}\nIRQ:   \t\t 255\nBus Location: \t {}\nDevice Minor: \t {}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The driver counts devices as it finds them; programs count GPUs by their places on the bus."""
    for bus, model, minor, excluded in (
        ("0000:86:00.0", "L4", 0, ""),
        ("0000:3b:00.0", "T4", 1, "GPU Excluded:\t No\n"),
        ("0000:1a:00.0", "T4", 2, "GPU Excluded:\t Yes\n"),
    ):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(TOLD.format(model, bus, minor) + excluded)
    return tmp_path


def test_gpus_are_numbered_by_their_places_and_have_the_drivers_devices(folder: Path) -> None:
    both = (Gpu(0, "NVIDIA T4", "/dev/nvidia1"), Gpu(1, "NVIDIA L4", "/dev/nvidia0"))
    assert local_gpus({}, folder) == both
    assert local_gpus({"CUDA_VISIBLE_DEVICES": "GPU-1234"}, folder) == both


@pytest.mark.parametrize(("given", "numbers"), [("1", [1]), ("0, 1", [0, 1]), ("7", [])])
def test_an_operator_leaves_some_to_the_node(folder: Path, given: str, numbers: list[int]) -> None:
    found = local_gpus({"CUDA_VISIBLE_DEVICES": given}, folder)
    assert [gpu.number for gpu in found] == numbers


def test_a_machine_without_a_driver_has_none(tmp_path: Path) -> None:
    assert local_gpus({}, tmp_path / "none") == ()
    assert device_files(()) == []


def test_a_service_opens_its_own_devices_and_those_of_all(folder: Path) -> None:
    shared = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset"]
    assert device_files((1,), folder) == ["/dev/nvidia0", *shared]
    assert device_files((5,), folder) == []
