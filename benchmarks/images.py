"""Measures images of a learner: how large they are, how long they take, and what a change of code costs.

Run from the root of the repository: ``.venv/bin/python benchmarks/images.py``. It needs mmdebstrap and a
package index; uv's own cache is used as it is found, so run it twice to see the times without downloads. On a
busy machine look at the seconds of CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import mlflow
import uv

from flops.adapters.actor_kit import kit_files
from flops.adapters.containers.engine import ContainerEngine
from flops.adapters.containers.images import EngineImages
from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.assembler import OciAssembler
from flops.adapters.images.debian_base import DebianBase
from flops.adapters.images.layout import ImageLayout
from flops.adapters.registry_client.client import OciRegistry
from flops.adapters.uv_environments import UvEnvironments
from flops.core.image_reference import ImageReference
from flops.core.images import Descriptor, ImageRun, Index, read_manifest
from flops.core.platforms import Platform
from flops.image_ports import ImageRecipe
from flops.settings import inherited_environment
from flops.testing.images import own_registry
from flops.testing.podman import missing_for_podman, running_podman

ROOT = Path(__file__).resolve().parents[1]
MB = 1_000_000

T = TypeVar("T")


def measure(what: str, work: Callable[[], T]) -> tuple[T, float]:
    """Do something, print how long it took, and return both."""
    start_s, cpu_s = time.monotonic(), sum(os.times()[:4])  # with children that have ended
    found = work()
    took_s, cpu_s = time.monotonic() - start_s, sum(os.times()[:4]) - cpu_s
    print(f"{what:<50} {took_s:8.2f} s {cpu_s:8.2f} s of CPU", flush=True)
    return found, took_s


class Bench:
    """An example's learner as an image, in a folder."""

    def __init__(self, folder: Path, example: Path) -> None:
        self.example = example
        environ = inherited_environment()
        program = Path(uv.find_uv_bin())
        environments = UvEnvironments(
            folder / "environments", uv=program, environ=environ, mlflow_version=mlflow.__version__
        )
        self.lock = environments.lock(example, "sklearn", lambda _: None)[0]
        self.blobs = FileBlobs(folder / "layout", is_oci_layout=True)
        self.layout = ImageLayout(folder / "layout", self.blobs)
        bases = DebianBase(folder / "layers", uv=program, environ=environ)
        self.assembler = OciAssembler(folder / "layers", self.blobs, bases, uv=program, environ=environ)

    def image(self, *platforms: Platform, change: str = "") -> Descriptor:
        """Make the image; a change makes its code another one."""
        files = {f"app/{path}": data for path, data in kit_files().items()}
        recipe = ImageRecipe(
            platforms,
            self.lock,
            {**files, "app/change.txt": change.encode()},
            {"app/repository": self.example},
            ImageRun(entrypoint=("python", "-m", "flops.trainer.learner"), env={"PYTHONPATH": "/app"}),
        )
        return self.assembler.assemble(recipe, lambda _: None)

    def size(self, image: Descriptor) -> int:
        """Bytes of all parts of an image."""
        return sum(self.layout.parts(image).values())

    def copy(self, image: Descriptor, folder: Path) -> None:
        """Copy the same bytes, each file durably: as fast as images could be moved on one disk."""
        folder.mkdir()
        for digest in self.layout.parts(image):
            with (folder / digest).open("wb") as file:
                for chunk in self.blobs.chunks(digest):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())

    def measure_hand_over(self, *images: Descriptor) -> None:
        """Print how long a container engine takes to take in images, one after the other."""
        if missing := missing_for_podman():
            print(f"hand-over to the container engine: skipped, it {missing}")
            return
        with running_podman() as podman:
            engine = EngineImages(ContainerEngine(podman.socket), self.blobs)
            reference = ImageReference(host="127.0.0.1:5000", name="flops/learner")
            for image, what in zip(images, ("first", "after a change of code"), strict=True):
                index = read_manifest(self.blobs.get(image.digest), image.media_type)
                assert isinstance(index, Index)
                found = index.manifests[0]
                measure(f"hand-over to the engine, {what}", partial(engine.load, reference, found))


def main(example: Path) -> None:
    """Print the table."""
    folder = Path(tempfile.mkdtemp(prefix="flops-images-"))
    print(f"{example.name}; load of this machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs\n")
    try:
        bench = Bench(folder, example)
        one = (Platform.AMD64,)
        image, _ = measure("build, nothing cached, linux/amd64", lambda: bench.image(*one))
        measure("build of the other platform, linux/arm64", lambda: bench.image(*Platform))
        measure("build, all cached, linux/amd64", lambda: bench.image(*one))
        changed, _ = measure(
            "build after a change of code, linux/amd64", lambda: bench.image(*one, change="x")
        )
        _, copy_s = measure(
            "copy of the same bytes, file by file", lambda: bench.copy(image, folder / "copy")
        )
        with own_registry(folder / "registry") as host:
            reference = ImageReference(host=host, name="flops/learner", tag="v1")
            registry = OciRegistry()

            def push(what: Descriptor) -> int:
                return registry.push(reference, what, bench.blobs, lambda _: None)

            sent, push_s = measure("push to the embedded registry", lambda: push(image))
            sent_again, _ = measure("push after a change of code", lambda: push(changed))
            pulled = FileBlobs(folder / "pulled")
            _, pull_s = measure(
                "pull from the embedded registry", lambda: registry.pull(reference, pulled, lambda _: None)
            )
        bench.measure_hand_over(image, changed)
        print(f"\nsize of the image, compressed, linux/amd64 {bench.size(image) / MB:14.1f} MB")
        print(f"sent by the first push                     {sent / MB:14.1f} MB")
        print(f"sent after a change of code                {sent_again / MB:14.3f} MB")
        print(f"push to copy {push_s / copy_s:.1f} : 1, pull to copy {pull_s / copy_s:.1f} : 1")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--example", type=Path, default=ROOT / "examples" / "mnist_sklearn")
    main(parser.parse_args().example)
