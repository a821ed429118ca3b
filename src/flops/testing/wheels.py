"""Wheels made by hand, so that tests of environments run uv for real and need no package index."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

PLATFORM_WHEELS: Mapping[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "pyarrow": ("pyarrow", "pyarrow.flight"),
    "datasets": ("datasets",),
    "pillow": ("PIL",),
    "mlflow-skinny": ("mlflow", "mlflow.sklearn", "mlflow.pyfunc", "mlflow.models"),
    "pandas": ("pandas",),
    "starlette": ("starlette", "starlette.applications"),
    "uvicorn": ("uvicorn",),
    "httptools": ("httptools",),
    "uvloop": ("uvloop",),
    "orjson": ("orjson",),
    "skops": ("skops",),
}


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    *,
    requires: Iterable[str] = (),
    modules: Iterable[str] = (),
    data_bytes: int = 0,
    tag: str = "py3-none-any",
) -> Path:
    """Write a wheel whose modules are empty packages, and one file of zeros; returns its path."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    files = {f"{module.replace('.', '/')}/__init__.py": "" for module in modules}
    if data_bytes:
        files[f"{name}.data.bin"] = "0" * data_bytes
    files[f"{info}/METADATA"] = "\n".join(metadata) + "\n"
    files[f"{info}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    path = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in files.items():
            archive.writestr(zipfile.ZipInfo(inner), text)
    return path


def make_source_package(folder: Path, name: str, files: Mapping[str, str]) -> Path:
    """Write version 1 of a package that has sources only; returns its path."""
    path = folder / f"{name}-1.tar.gz"
    described = {"PKG-INFO": f"Metadata-Version: 2.2\nName: {name}\nVersion: 1\n"}
    with tarfile.open(path, "w:gz") as archive:
        for inner, text in {**described, **files}.items():
            member = tarfile.TarInfo(f"{name}-1/{inner}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def lock_of(*wheels: Path, python: str) -> str:
    """A lock of wheels, or of source packages, as environments and images are made from."""
    lines = [f"# python {python}\n"]
    for wheel in wheels:
        name, version = wheel.name.removesuffix(".tar.gz").split("-")[:2]
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{name}=={version} \\\n    --hash=sha256:{digest}\n")
    return "".join(lines)


def use_only(wheels: Path, cache: Path) -> dict[str, str]:
    """Environment variables that have uv take packages from a folder, and from nowhere else."""
    configuration = cache.with_suffix(".toml")
    configuration.write_text(f"no-index = true\nfind-links = [{str(wheels)!r}]\n")
    return {"UV_CONFIG_FILE": str(configuration), "UV_CACHE_DIR": str(cache)}


def make_platform_wheels(folder: Path, *, mlflow_version: str) -> None:
    """Write wheels of everything that the platform adds to environments."""
    for name, version in (("packaging", "24.0"), ("protobuf", "7.0"), ("protobuf", "8.0")):
        make_wheel(folder, name, version)
    for name, modules in PLATFORM_WHEELS.items():
        version = {"mlflow-skinny": mlflow_version, "numpy": "2.1.0"}.get(name, "16.0")
        requires = ("packaging>=20", "protobuf<8") if name == "mlflow-skinny" else ()
        make_wheel(folder, name, version, requires=requires, modules=modules)
