"""Packages that have no wheel: built in a container of the image's base, and told where that cannot be."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import uv

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.images.assembler import OciAssembler
from flops.adapters.images.build_tools import own_platform
from flops.adapters.images.buildah import Buildah
from flops.adapters.images.debian_base import DebianBase
from flops.adapters.images.layer_cache import LayerCache
from flops.adapters.images.pulled_base import PulledBase
from flops.adapters.images.source_packages import SourcePackages
from flops.adapters.registry_client.client import OciRegistry
from flops.adapters.uv_program import UvProgram
from flops.core.image_reference import ImageReference
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageRecipe
from flops.settings import inherited_environment
from flops.testing.contracts.image_assembler import images_of
from flops.testing.images import shell_base, unpack_layer
from flops.testing.wheels import lock_of, make_source_package, make_wheel

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
HERE = own_platform() or Platform.AMD64
pytestmark = pytest.mark.skipif(bool(Buildah.missing()), reason="needs buildah")

# A backend of the package's own, so that a build needs nothing from an index; it has to run in the base.
BACKEND = """
import os, zipfile
def build_wheel(folder, settings=None, metadata=None):
    {first}
    name = "{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as archive:
        archive.writestr("{name}/__init__.py", f"BUILT_ON = {{os.environ.get('OF')!r}}\\n")
        info = "{name}-1.dist-info"
        archive.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1\\n")
        archive.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        archive.writestr(info + "/RECORD", "")
    return name
"""


def make_source(folder: Path, name: str, first: str = "pass") -> Path:
    """Write a source package whose module says on what it was built; returns its path."""
    described = (
        f'[project]\nname = "{name}"\nversion = "1"\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    backend = BACKEND.format(name=name, first=first)
    return make_source_package(folder, name, {"pyproject.toml": described, "backend.py": backend})


class Site:
    """An index of packages, a base with a Python, and what is made of both."""

    def __init__(self, folder: Path, base: ImageReference, index: str) -> None:
        self.folder, self.base = folder, base
        self.packages = folder / "index"
        self.told: list[str] = []
        self.blobs = FileBlobs(folder / "layout", is_oci_layout=True)
        self.environ = {
            **inherited_environment(),
            "UV_DEFAULT_INDEX": f"{index}/simple",
            "UV_CACHE_DIR": str(folder / "cache"),
            "UV_NO_CONFIG": "1",
        }

    def publish(self, *files: Path) -> None:
        for file in files:
            page = self.packages / "simple" / file.name.split("-")[0] / "index.html"
            page.parent.mkdir(parents=True)
            page.write_text(f'<a href="/{file.name}">{file.name}</a>')

    def assembler(self, *, runs_here: bool = True, builds: Buildah | None = None) -> OciAssembler:
        program = Path(uv.find_uv_bin())
        sources = SourcePackages(
            LayerCache(self.folder / "layers", self.blobs),
            builds or Buildah({}, output=io.BytesIO()),
            UvProgram(program, self.environ),
            partial(FileBlobs, is_oci_layout=True),
            runs_here=lambda _: runs_here,
        )
        bases = PulledBase(self.folder / "bases", OciRegistry(), self.base)
        return OciAssembler(
            self.folder / "layers", self.blobs, bases, uv=program, environ=self.environ, sources=sources
        )

    def site_packages(self, lock: str, *paths: str) -> dict[str, Path]:
        """Make an image with the lock at each path; returns the folders of its packages."""
        recipe = ImageRecipe((HERE,), environments=dict.fromkeys(paths, lock))
        index = self.assembler().assemble(recipe, self.told.append)
        root = self.folder / "root"
        for layer in images_of(self.blobs, index)[HERE].layers[1:]:
            unpack_layer(self.blobs, layer, root)
        return {path: root / path[1:] / f"lib/python{MINOR}/site-packages" for path in paths}

    def failure(self, lock: str, assembler: OciAssembler) -> FlopsError:
        with pytest.raises(FlopsError) as caught:
            assembler.assemble(ImageRecipe((HERE,), lock), self.told.append)
        return caught.value


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageReference]:
    with shell_base(tmp_path_factory.mktemp("base"), has_python=True) as reference:
        yield reference


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder over HTTP; yields its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def site(tmp_path: Path, base: ImageReference) -> Iterator[Site]:
    packages = tmp_path / "site" / "index"
    packages.mkdir(parents=True)
    with served(packages) as url:
        yield Site(tmp_path / "site", base, url)


def test_a_package_without_a_wheel_is_built_on_the_base_once_for_all_environments(site: Site) -> None:
    files = [
        make_wheel(site.packages, "needing", "1", requires=["sourced"], modules=["needing"]),
        make_source(site.packages, "sourced"),
        make_source(site.packages, "another"),
    ]
    site.publish(*files)
    found = site.site_packages(lock_of(*files, python=MINOR), "/opt/project", "/opt/model")
    for folder in found.values():
        for name in ("sourced", "another"):
            assert (folder / name / "__init__.py").read_text() == "BUILT_ON = 'base'\n"
            assert list((folder / name / "__pycache__").glob("*.pyc"))
            assert (folder / f"{name}-1.dist-info" / "METADATA").exists()
        assert (folder / "needing").is_dir()
    assert sum("built from source for" in line for line in site.told) == 1
    assert any(
        "The build of another, sourced" in line or "The build of sourced, another" in line
        for line in site.told
    )


def test_what_a_build_says_is_told(site: Site) -> None:
    file = make_source(site.packages, "broken", "raise SystemExit('there is no compiler')")
    site.publish(file)
    error = site.failure(lock_of(file, python=MINOR), site.assembler())
    assert error.code is ErrorCode.IMAGE_BUILD_FAILED
    assert "broken" in error.message
    assert "there is no compiler" in error.message
    assert "Dockerfile" in error.hint


def test_where_it_cannot_be_built_it_is_said(site: Site) -> None:
    file = make_source(site.packages, "sourced")
    site.publish(file)
    lock = lock_of(file, python=MINOR)
    error = site.failure(lock, site.assembler(runs_here=False))
    assert error.code is ErrorCode.DEPENDENCIES_UNRESOLVABLE
    assert "sourced" in error.message
    assert HERE in error.message
    assert "qemu" in error.hint
    error = site.failure(lock, site.assembler(builds=Buildah({}, program="no-buildah")))
    assert error.code is ErrorCode.IMAGE_BUILD_FAILED
    assert "apt-get install buildah" in error.hint


COMPILED = """
#include <Python.h>
static PyMethodDef methods[] = {{NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "compiled", NULL, -1, methods};
PyMODINIT_FUNC PyInit_compiled(void) { return PyModule_Create(&module); }
"""
SETUP = (
    "from setuptools import Extension, setup\n"
    "setup(name='compiled', version='1', ext_modules=[Extension('compiled', ['compiled.c'])])\n"
)


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.skipif(not DebianBase.is_possible(), reason="needs mmdebstrap")
def test_a_package_is_compiled_with_debians_compilers_when_the_base_is_debian(tmp_path: Path) -> None:
    """Debian's packages and setuptools come from the network."""
    files = {"setup.py": SETUP, "compiled.c": COMPILED}
    lock = lock_of(make_source_package(tmp_path, "compiled", files), python=DebianBase.python())
    program, blobs = Path(uv.find_uv_bin()), FileBlobs(tmp_path / "layout", is_oci_layout=True)
    environ = {**inherited_environment(), "UV_NO_CONFIG": "1"}
    with served(tmp_path) as index:
        page = tmp_path / "simple" / "compiled" / "index.html"
        page.parent.mkdir(parents=True)
        page.write_text('<a href="/compiled-1.tar.gz">compiled-1.tar.gz</a>')
        environ["UV_INDEX"] = f"{index}/simple"
        sources = SourcePackages(
            LayerCache(tmp_path / "layers", blobs),
            Buildah({}, output=io.BytesIO()),
            UvProgram(program, environ),
            partial(FileBlobs, is_oci_layout=True),
            runs_here=lambda _: True,
            toolchain=DebianBase(tmp_path / "bases", uv=program, environ=environ, has_compilers=True),
        )
        base = DebianBase(tmp_path / "bases", uv=program, environ=environ)
        assembler = OciAssembler(
            tmp_path / "layers", blobs, base, uv=program, environ=environ, sources=sources
        )
        index_of = assembler.assemble(ImageRecipe((HERE,), lock), lambda _: None)
    layers = images_of(blobs, index_of)[HERE].layers
    assert len(layers) == 4  # base, wheels, built from source, code
    assert sum(layer.size for layer in layers) < 45_000_000, "the compilers are in the image"
    unpack_layer(blobs, layers[2], tmp_path / "root")
    (made,) = tmp_path.glob("root/opt/env/lib/*/site-packages/compiled.*.so")
    assert made.read_bytes().startswith(b"\x7fELF")
