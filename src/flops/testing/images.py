"""Small images, made by hand, and what moves them about: registries, and connections that break."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uv

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.http_server import HttpServer
from flops.adapters.images.stored_image import store, store_image
from flops.adapters.registry_client.client import OciRegistry
from flops.adapters.system_clock import SystemClock
from flops.adapters.uv_program import own_python
from flops.core.ids import Digest
from flops.core.image_reference import ImageReference
from flops.core.images import (
    INDEX,
    LAYER_GZIP,
    PYTHON_LABEL,
    BaseImage,
    Descriptor,
    ImageRun,
    Layer,
    index_bytes,
)
from flops.core.platforms import Platform
from flops.image_ports import ImageBlobs, Report
from flops.registry.app import build_registry
from flops.registry.repositories import Repositories
from flops.testing.waiting import until

_LEFT_OUT = re.compile(
    r"/(?:tests?|idlelib|tkinter|(?:site|dist)-packages|ensurepip|lib2to3|config-.*|pydoc_.*)/"
)


def make_layer(blobs: ImageBlobs, name: str, size: int = 1_000) -> Layer:
    """A layer with one file of bytes that do not compress; the same name gives the same layer.

    Args:
        blobs: where it is put.
        name: of the file, in the folder ``files`` unless it begins with a slash.
        size: of the file, in bytes.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        info = tarfile.TarInfo(name[1:] if name.startswith("/") else f"files/{name}")
        info.size = size
        tar.addfile(info, io.BytesIO(random.Random(name).randbytes(size)))  # noqa: S311
    packed = gzip.compress(archive.getvalue(), 1, mtime=0)
    diff_id = Digest(hashlib.sha256(archive.getvalue()).hexdigest())
    blob = Descriptor(media_type=LAYER_GZIP, digest=blobs.put(packed), size=len(packed))
    return Layer(blob=blob, diff_id=diff_id, what=name)


def make_image(
    blobs: ImageBlobs, *names: str, size: int = 1_000, platform: str = "linux/amd64"
) -> Descriptor:
    """An image of layers by their names; returns its manifest's descriptor."""
    layers = [make_layer(blobs, name, size) for name in names]
    run = ImageRun(labels={PYTHON_LABEL: "3", "names": " ".join(names)})
    return store_image(blobs, Platform(platform), layers, run)


class HandMadeBase:
    """Implements `flops.image_ports.BaseImages`: a layer with one file per platform, and no system at all."""

    def base(self, platform: Platform, blobs: ImageBlobs, report: Report) -> BaseImage:
        """The base for a platform."""
        report(f"The base for {platform} is made by hand.")
        layers = (make_layer(blobs, "/usr/bin/python3"), make_layer(blobs, platform.architecture))
        return self.foreseen(platform).model_copy(update={"layers": layers})

    def foreseen(self, platform: Platform) -> BaseImage:
        """The base without its layers."""
        return BaseImage(
            platform=platform,
            layers=(),
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
            interpreter="/usr/bin/python3",
            env={"PATH": "/usr/bin", "LANG": "C.UTF-8"},
        )


class HandMadeImages:
    """Implements `flops.image_ports.RepositoryImages`: its own for any Dockerfile."""

    def __init__(self, blobs: ImageBlobs) -> None:
        self._blobs = blobs

    def make(self, repository: Path, platforms: Sequence[Platform], report: Report) -> Descriptor:
        """The image for each platform."""
        report(f"The image of {repository.name} is made by hand.")
        images = (make_image(self._blobs, "/usr/bin/python3.11", p, platform=p) for p in platforms)
        return make_index(self._blobs, *images)


def unpack_layer(blobs: ImageBlobs, layer: Descriptor, folder: Path) -> dict[str, tarfile.TarInfo]:
    """Unpack a layer's files; returns the members of its archive by their path."""
    with tarfile.open(fileobj=io.BytesIO(blobs.get(layer.digest)), mode="r:gz") as archive:
        for member in archive:
            target = folder / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if member.isreg() and (source := archive.extractfile(member)) is not None:
                target.write_bytes(source.read())
            elif member.issym():
                target.symlink_to(member.linkname)
        return {member.name: member for member in archive.getmembers()}


def make_index(blobs: ImageBlobs, *images: Descriptor) -> Descriptor:
    """An index over images."""
    return store(blobs, index_bytes(images), INDEX)


@contextlib.contextmanager
def own_registry(folder: Path, *, password: str | None = None, port: int = 0) -> Iterator[str]:
    """FLOps' registry on a port of this machine; yields its host."""
    blobs = FileBlobs(folder / "blobs")
    app = build_registry(
        blobs, Repositories(folder / "repositories", blobs), SystemClock(), password=password
    )
    server = HttpServer(app, "127.0.0.1", port)
    server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        server.close()


def has_debian_registry() -> bool:
    """Whether Debian's registry is installed."""
    return shutil.which("docker-registry") is not None


@contextlib.contextmanager
def debian_registry(folder: Path, *, users: str = "", tls: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Debian's ``docker-registry`` on a port of this machine; yields its host.

    Args:
        folder: for its state.
        users: content of an htpasswd file; everyone may do everything without.
        tls: files of a certificate and its key; it listens on all addresses then.
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yml"
    text = (
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder / 'data'}\n  delete:\n"
        f"    enabled: true\nhttp:\n  addr: {'127.0.0.1' if tls is None else ''}:{port}\n"
    )
    if tls is not None:
        text += f"  tls:\n    certificate: {tls[0]}\n    key: {tls[1]}\n"
    if users:
        (folder / "users").write_text(users)
        text += f"auth:\n  htpasswd:\n    realm: test\n    path: {folder / 'users'}\n"
    config.write_text(text)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
        try:
            until(lambda: _listens(port), "the registry")
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


class BreakingProxy:
    """Hands connections on to another port, and breaks them after some bytes, while it is told to.

    Args:
        port: where it leads.
        up: breaks a connection after so many bytes to the server; None for not.
        down: the same, to the client.
        times: how many connections it breaks; then it is an honest proxy.
    """

    def __init__(self, port: int, *, up: int | None = None, down: int | None = None, times: int = 1) -> None:
        self._target = port
        self._up = up
        self._down = down
        self._left = times
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self.broken = 0
        self.bytes_up = 0

    @property
    def host(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> BreakingProxy:
        self._begin(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for found in self._sockets:
            _cut(found)
        for thread in self._threads:
            thread.join(10)

    def _begin(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                self._begin(self._pump, client, server, self._up, True)
                self._begin(self._pump, server, client, self._down, False)

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None, is_up: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                passed += len(data)
                if limit is not None and passed > limit and self._may_break():
                    break
                with self._lock:
                    self.bytes_up += len(data) if is_up else 0
                sink.sendall(data)
        _cut(source)
        _cut(sink)

    def _may_break(self) -> bool:
        with self._lock:
            if self._left <= 0:
                return False
            self._left -= 1
            self.broken += 1
            return True


def _cut(found: socket.socket) -> None:
    with contextlib.suppress(OSError):
        found.shutdown(socket.SHUT_RDWR)
    found.close()


def make_shell_base(blobs: ImageBlobs, *programs: str, has_python: bool = False) -> Descriptor:
    """An image with this machine's shell, some of its programs and their libraries.

    It is enough for Dockerfiles to run commands in, and needs no network to be made.

    Args:
        blobs: where it is put.
        programs: that are in it beside the shell.
        has_python: whether it has this machine's Python, or just a file in its place.
    """
    files = {Path("/etc/passwd"): b"root:x:0:0::/:/bin/sh\n", Path("/usr/bin/python3.11"): b"no Python\n"}
    for name in ("sh", *programs):
        program = Path(str(shutil.which(name)))
        files |= {path: path.read_bytes() for path in _libraries(program)}
        files[Path("/bin", name)] = program.read_bytes()
    if has_python:
        files |= _python_files()
        del files[Path("/usr/bin/python3.11")]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, data in sorted(files.items()):
            info = tarfile.TarInfo(str(path)[1:])
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
        folder = tarfile.TarInfo("tmp")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(folder)
    packed = gzip.compress(archive.getvalue(), 1, mtime=0)
    blob = Descriptor(media_type=LAYER_GZIP, digest=blobs.put(packed), size=len(packed))
    layer = Layer(blob=blob, diff_id=Digest(hashlib.sha256(archive.getvalue()).hexdigest()))
    run = ImageRun(env={"PATH": "/usr/local/bin:/bin", "OF": "base"}, user="0:0")
    return store_image(blobs, Platform.of(os.uname().machine), [layer], run)


@contextlib.contextmanager
def shell_base(folder: Path, *programs: str, has_python: bool = False) -> Iterator[ImageReference]:
    """`make_shell_base` in a registry of its own; yields its name there."""
    blobs = FileBlobs(folder / "blobs")
    with own_registry(folder / "registry") as host:
        reference = ImageReference(host=host, name="base", tag="v1")
        image = make_shell_base(blobs, *programs, has_python=has_python)
        OciRegistry().push(reference, make_index(blobs, image), blobs, lambda _: None)
        yield reference


def _libraries(program: Path) -> list[Path]:
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", told)]


def _python_files() -> dict[Path, bytes]:
    """This machine's Python, as much as installs packages, in /usr/local."""
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
    program, library = own_python(), Path(os.__file__).parent
    found = [path for path in library.rglob("*.*") if path.suffix in {".py", ".so"}]
    found = [path for path in found if _LEFT_OUT.search(str(path.relative_to(library.parent))) is None]
    files = {Path("/usr/local/lib", minor, path.relative_to(library)): path.read_bytes() for path in found}
    files[Path("/usr/local/bin", minor)] = program.read_bytes()
    native = [program, Path(uv.find_uv_bin()), *(path for path in found if path.suffix == ".so")]
    return files | {path: path.read_bytes() for each in native for path in _libraries(each)}
