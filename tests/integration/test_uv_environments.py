"""Environments built by uv for real, against wheels made by hand: conflicts, kills, races and full disks."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import uv

from flops.adapters.uv_cache import UvCache
from flops.adapters.uv_environments import UvEnvironments
from flops.command import StoppedError, stopped_when
from flops.core.resolution import locked_versions
from flops.errors import ErrorCode, FlopsError
from flops.settings import inherited_environment
from flops.testing.contracts.ml_repos import REPOSITORY
from flops.testing.disk import small_disk
from flops.testing.waiting import until
from flops.testing.wheels import (
    lock_of,
    make_platform_wheels,
    make_source_package,
    make_wheel,
    use_only,
)

MLFLOW = "3.17.2"


class Site:
    """A package index of hand-made wheels, a repository, and environments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        make_platform_wheels(self.wheels, mlflow_version=MLFLOW)
        self.root = folder / "environments"
        self.environ = {**inherited_environment(), **use_only(self.wheels, folder / "cache")}

    def environments(self, root: Path | None = None, **changes: str) -> UvEnvironments:
        return UvEnvironments(
            root or self.root,
            uv=Path(uv.find_uv_bin()),
            environ={**self.environ, **changes},
            mlflow_version=MLFLOW,
        )

    def repository(self, requirements: str, **files: str) -> Path:
        folder = self.folder / "repository"
        folder.mkdir(exist_ok=True)
        for name, text in {**REPOSITORY, "requirements.txt": requirements}.items():
            (folder / name).write_text(text)
        for stem, text in files.items():
            (folder / f"{stem}.py").write_text(text)
        return folder

    def lock(self, requirements: str) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
        locks = self.environments().lock(self.repository(requirements), "sklearn", lambda _: None)
        return locked_versions(locks[0]), locked_versions(locks[1]), locks[2].notes


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def ignore(_message: str) -> None:
    pass


def test_old_pins_stay_exactly_in_both_environments(site: Site) -> None:
    for name, versions in {
        "numpy": ["1.26.4"],
        "scikit-learn": ["1.4.2", "1.9"],
        "packaging": ["26.0"],
    }.items():
        for version in versions:
            make_wheel(site.wheels, name, version)
    project, model, notes = site.lock("numpy==1.26.4\nscikit-learn==1.4.2\npackaging==24.0\n")
    for found in (project, model):
        assert (found["numpy"], found["scikit-learn"], found["packaging"]) == ("1.26.4", "1.4.2", "24.0")
    assert model["mlflow-skinny"] == MLFLOW
    assert "mlflow-skinny" not in project
    assert notes == ()


def test_a_pin_that_mlflow_cannot_do_with_is_loosened_for_the_model_only(site: Site) -> None:
    make_wheel(site.wheels, "packaging", "19.0")
    project, model, notes = site.lock("packaging==19.0\n")
    assert project["packaging"] == "19.0"
    assert model["packaging"] == "24.0"
    assert len(notes) == 2
    assert "packaging==19.0 was loosened" in notes[0]
    assert "mlflow-skinny" in notes[0]


def test_a_transitive_pin_gives_way_silently_for_the_user(site: Site) -> None:
    make_wheel(site.wheels, "tool", "1", requires=["protobuf"])
    project, model, notes = site.lock("tool\n")
    assert (project["protobuf"], model["protobuf"]) == ("8.0", "7.0")
    assert notes == ("The environment that saves and serves the model has protobuf 7.0 instead of 8.0.",)


def test_what_the_learner_cannot_do_with_is_loosened(site: Site) -> None:
    make_wheel(site.wheels, "pyarrow", "12.0", modules=["pyarrow"])
    project, _, notes = site.lock("pyarrow==12.0\n")
    assert project["pyarrow"] == "16.0"
    assert "pyarrow==12.0 was loosened" in notes[0]


@pytest.mark.parametrize(
    ("requirements", "expected", "help_"),
    [
        ("numpy==2.1.0\nnumpy<2\n", ["numpy==2.1.0 and numpy<2"], "Loosen or correct"),
        ("numpy==99.1\n", ["numpy==99.1"], "a version that the package index has"),
        ("no-such-package\nnumpy\n", ["no-such-package was not found"], "Correct the name"),
        ("old\nnew\n", ["new depend on protobuf>=8", "old depend on protobuf<8"], "Loosen or correct"),
        ("only-arm\nnumpy\n", ["only-arm", "manylinux_2_28_aarch64"], "wheels for the platform"),
        ("outer\n", ["outer depend on only-arm", "manylinux_2_28_aarch64"], "wheels for the platform"),
        ("only-old\n", ["only-old", "cp310"], "wheels for this Python"),
    ],
)
def test_requirements_that_cannot_be_met_are_named(
    site: Site, requirements: str, expected: list[str], help_: str
) -> None:
    make_wheel(site.wheels, "only-arm", "1", tag="cp311-cp311-manylinux_2_28_aarch64")
    make_wheel(site.wheels, "only-old", "1", tag="cp310-cp310-manylinux_2_28_x86_64")
    make_wheel(site.wheels, "outer", "1", requires=["only-arm"])
    make_wheel(site.wheels, "old", "1", requires=["protobuf<8"])
    make_wheel(site.wheels, "new", "1", requires=["protobuf>=8"])
    with pytest.raises(FlopsError) as caught:
        site.lock(requirements)
    assert caught.value.code is ErrorCode.DEPENDENCIES_UNRESOLVABLE
    assert "requirements.txt" in caught.value.message
    assert len(caught.value.message) < 1_000
    for text in expected:
        assert text in caught.value.message
    assert help_ in caught.value.hint


def test_a_lock_without_a_wheel_for_this_machine_is_told(site: Site) -> None:
    """Locked on a node of another platform, for which the package has a wheel."""
    wheel = make_wheel(site.wheels, "only-arm", "1", tag="cp311-cp311-manylinux_2_28_aarch64")
    with pytest.raises(FlopsError) as caught:
        site.environments().materialise(lock_of(wheel, python="3.11"), ignore)
    assert caught.value.code is ErrorCode.ENVIRONMENT_BUILD_FAILED
    assert "only-arm" in caught.value.message
    assert "manylinux_2_28_aarch64" in caught.value.message


def test_a_hash_in_the_file_must_be_the_packages(site: Site) -> None:
    with pytest.raises(FlopsError) as caught:
        site.lock(f"numpy==2.1.0 --hash=sha256:{'0' * 64}\n")
    assert caught.value.code is ErrorCode.DEPENDENCIES_UNRESOLVABLE
    assert "numpy" in caught.value.message


def test_an_index_that_cannot_be_reached_is_not_the_users_fault(site: Site) -> None:
    configuration = site.folder / "other.toml"
    configuration.write_text('index-url = "http://127.0.0.1:1/simple"\n')
    environments = site.environments(UV_CONFIG_FILE=str(configuration), UV_HTTP_RETRIES="0")
    with pytest.raises(FlopsError) as caught:
        environments.lock(site.repository("numpy\nscipy\n"), "sklearn", ignore)
    assert caught.value.code is ErrorCode.UNREACHABLE


def test_a_lock_names_no_index(site: Site) -> None:
    environments = site.environments(UV_EMIT_INDEX_URL="1")
    lock, model_lock, _ = environments.lock(site.repository("numpy\n"), "sklearn", ignore)
    for text in (lock, model_lock):
        assert "://" not in text
        assert str(site.wheels) not in text


def test_a_python_that_is_not_there_is_told(site: Site) -> None:
    folder = site.repository("numpy\n")
    (folder / "conda.yml").write_text("dependencies: [python=3.9, numpy]\n")
    _, _, environment = site.environments().lock(folder, "sklearn", ignore)
    assert environment.python == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert "3.9" in environment.notes[0]


def test_the_modules_of_the_repository_are_compiled_when_it_is_built(site: Site) -> None:
    make_wheel(site.wheels, "scikit-learn", "1.4.2", modules=["sklearn", "sklearn.linear_model"])
    folder = site.repository(
        "scikit-learn\n", model_manager="import sklearn.linear_model, absent\nclass ModelManager: pass\n"
    )
    environments = site.environments(PYTHONDONTWRITEBYTECODE="1")
    lock, _, _ = environments.lock(folder, "sklearn", ignore)
    told: list[str] = []
    python = environments.materialise(lock, told.append)
    packages = next((python.parent.parent / "lib").glob("python*/site-packages"))
    assert list((packages / "sklearn" / "linear_model" / "__pycache__").glob("*.pyc"))
    assert any("absent" in message for message in told)


def test_an_environment_in_which_the_learner_cannot_run_is_refused(site: Site) -> None:
    make_wheel(site.wheels, "pyarrow", "17.0", modules=["pyarrow"])  # no pyarrow.flight
    environments = site.environments()
    lock, _, _ = environments.lock(site.repository("numpy\n"), "sklearn", ignore)
    with pytest.raises(FlopsError) as caught:
        environments.materialise(lock, ignore)
    assert caught.value.code is ErrorCode.ENVIRONMENT_BUILD_FAILED
    assert "pyarrow.flight" in caught.value.message
    assert not list(site.root.glob("[0-9a-f]*/bin"))


def test_another_wheel_than_the_locked_one_is_refused(site: Site) -> None:
    environments = site.environments()
    lock, _, _ = environments.lock(site.repository("numpy\n"), "sklearn", ignore)
    make_wheel(site.wheels, "numpy", "2.1.0", modules=["numpy", "evil"])
    with pytest.raises(FlopsError) as caught:
        site.environments(UV_CACHE_DIR=str(site.folder / "other")).materialise(lock, ignore)
    assert caught.value.code is ErrorCode.ENVIRONMENT_BUILD_FAILED
    assert "numpy" in caught.value.message


def test_a_python_that_is_not_on_the_node_is_named(site: Site) -> None:
    with pytest.raises(FlopsError) as caught:
        site.environments().materialise("# python 3.99\nnumpy==2.1.0\n", ignore)
    assert caught.value.code is ErrorCode.ENVIRONMENT_BUILD_FAILED
    assert "3.99" in caught.value.message


def test_two_builders_at_once_build_once(site: Site) -> None:
    lock, _, _ = site.environments().lock(site.repository("numpy\n"), "sklearn", ignore)
    told: list[str] = []
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(site.environments().materialise(lock, told.append)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert sum(message.startswith("Building an environment") for message in told) == 1


BUILD = """
import json, sys
from pathlib import Path
from flops.adapters.uv_environments import UvEnvironments
from flops.command import StoppedError, stopped_when
given = json.loads(sys.argv[1])
root, uv, environ = Path(given["root"]), Path(given["uv"]), given["environ"]
UvEnvironments(root, uv=uv, environ=environ, mlflow_version="1").materialise(given["lock"], print)
"""


def _exists(root: Path, pattern: str) -> bool:
    try:
        return any(root.glob(f"*/{pattern}"))
    except FileNotFoundError:  # a folder went while it was looked through
        return False


def test_a_build_that_was_killed_is_begun_anew(site: Site) -> None:
    for number in range(30):
        make_wheel(site.wheels, f"part{number}", "1", modules=[f"part{number}.a{i}" for i in range(20)])
    names = "".join(f"part{number}\n" for number in range(30))
    lock, _, _ = site.environments().lock(site.repository(names), "sklearn", ignore)
    given = {"root": str(site.root), "uv": uv.find_uv_bin(), "environ": site.environ, "lock": lock}
    for moment in ("bin/python", "lib/python*/site-packages/part*"):
        with subprocess.Popen(
            [sys.executable, "-c", BUILD, json.dumps(given)],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        ) as builder:
            deadline = time.monotonic() + 20
            while builder.poll() is None and not _exists(site.root, moment):
                assert time.monotonic() < deadline
            os.kill(builder.pid, signal.SIGKILL)
    python = site.environments().materialise(lock, ignore)
    done = subprocess.run([python, "-I", "-c", "import numpy, part0.a0, part29.a19"], check=False)
    assert done.returncode == 0
    assert sorted(path.name[64:] for path in site.root.iterdir() if not path.name.startswith(".")) == [
        "",
        ".lock",
    ]


ENDLESS = """
import os, time
def build_wheel(*_arguments, **_options):
    with open({pid_file!r}, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(3600)
"""


def source_package(wheels: Path, name: str, code: str) -> str:
    """Make a source package with a backend of its own; returns a lock with it."""
    backend = f'[build-system]\nrequires = []\nbuild-backend = "{name}"\nbackend-path = ["."]\n'
    path = make_source_package(wheels, name, {"pyproject.toml": backend, f"{name}.py": code})
    return lock_of(path, python="3.11")


def test_a_source_package_that_does_not_build_is_named_with_what_helps(site: Site) -> None:
    lock = source_package(site.wheels, "broken", "raise SystemExit('gcc: command not found')\n")
    with pytest.raises(FlopsError) as caught:
        site.environments().materialise(lock, lambda _: None)
    assert caught.value.code is ErrorCode.ENVIRONMENT_BUILD_FAILED
    assert "broken==1" in caught.value.message
    assert "gcc: command not found" in caught.value.message
    assert caught.value.hint.startswith("broken==1 has no wheel for this machine")
    assert "build-essential" in caught.value.hint


def test_builds_that_nobody_needs_any_more_end_and_leave_nothing(site: Site) -> None:
    pid_file = site.folder / "pid"
    lock = source_package(site.wheels, "endless", ENDLESS.format(pid_file=str(pid_file)))
    is_needless = threading.Event()
    ended: list[float] = []
    told: list[str] = []

    def build() -> None:
        with stopped_when(is_needless.is_set), pytest.raises(StoppedError):
            site.environments().materialise(lock, told.append)
        ended.append(time.monotonic())

    threads = [threading.Thread(target=build) for _ in range(2)]  # the second one waits for the first
    for thread in threads:
        thread.start()
    until(lambda: pid_file.exists() and pid_file.read_text() != "", "the build")
    until(lambda: any("another build" in message for message in told), "the second build")
    asked = time.monotonic()
    is_needless.set()
    for thread in threads:
        thread.join(10)
    assert max(ended) - asked < 2
    assert len(ended) == 2
    until(lambda: not psutil.pid_exists(int(pid_file.read_text())), "the end of the package's own build")
    assert [path.suffix for path in site.root.iterdir()] == [".lock"]


def test_what_a_killed_build_left_is_removed_by_the_next_one(site: Site) -> None:
    half = site.root / ("0" * 64)
    (half / "bin").mkdir(parents=True)
    (site.root / f".building-{half.name}-x").mkdir()
    of_others = site.root / "notes"
    of_others.mkdir()
    lock, _, _ = site.environments().lock(site.repository("numpy\n"), "sklearn", ignore)
    with (site.root / f"{half.name}.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        site.environments().materialise(lock, ignore)
        assert half.exists()  # somebody builds it
    complete = next(site.root.glob("*/.complete")).parent
    shutil.rmtree(complete)
    site.environments().materialise(lock, ignore)
    assert not half.exists()
    assert not list(site.root.glob(".building-*"))
    assert of_others.exists()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("size", ["64k", "1m"])
def test_a_full_disk_is_told_and_leaves_nothing(site: Site, size: str) -> None:
    make_wheel(site.wheels, "big", "1", data_bytes=3_000_000)
    lock, _, _ = site.environments().lock(site.repository("big\n"), "sklearn", ignore)
    with small_disk(site.folder / "disk", size):
        root = site.folder / "disk" / "environments"
        with pytest.raises(FlopsError) as caught:
            site.environments(root).materialise(lock, ignore)
        assert caught.value.code is ErrorCode.DISK_FULL
        assert not list(root.glob("[0-9a-f]*/bin"))


def test_a_use_is_marked(site: Site) -> None:
    environments = site.environments()
    lock, _, _ = environments.lock(site.repository("numpy\n"), "sklearn", ignore)
    folder = environments.materialise(lock, ignore).parent.parent
    os.utime(folder / ".complete", (0, 0))
    started = time.monotonic()
    environments.materialise(lock, ignore)
    assert time.monotonic() - started < 0.05
    assert (folder / ".complete").stat().st_mtime > 0


def test_an_environment_whose_python_is_gone_is_built_anew(site: Site) -> None:
    environments = site.environments()
    lock, _, _ = environments.lock(site.repository("numpy\n"), "sklearn", ignore)
    python = environments.materialise(lock, ignore)
    python.unlink()
    python.symlink_to("/nowhere/python")
    assert environments.materialise(lock, ignore).exists()


def test_a_version_that_the_index_does_not_list_for_a_moment_is_asked_for_again(site: Site) -> None:
    for version in ("0.9", "1"):
        make_wheel(site.wheels, "tool", version)
    (lock, _, _) = site.environments().lock(site.repository("tool\n"), "sklearn", ignore)
    hidden = [path.rename(site.folder / path.name) for path in site.wheels.glob("tool-1-*")]
    told: list[str] = []

    def report(message: str) -> None:
        told.append(message)
        if "trying again" in message:
            for path in hidden:
                if path.exists():
                    path.rename(site.wheels / path.name)

    python = site.environments().materialise(lock, report)
    assert python.exists()
    assert any("trying again" in message for message in told)


def test_the_cache_is_emptied_beyond_its_limit_and_environments_stay_whole(site: Site) -> None:
    make_wheel(site.wheels, "big", "1", data_bytes=3_000_000, modules=["big.code"])
    lock, _, _ = site.environments().lock(site.repository("big\n"), "sklearn", ignore)
    python = site.environments().materialise(lock, ignore)

    def cache(max_bytes: int | None, **changes: str) -> UvCache:
        return UvCache(Path(uv.find_uv_bin()), {**site.environ, **changes}, max_bytes)

    size = cache(None).size_bytes()
    assert size > 3_000_000
    cache(None).shrink(is_disk_low=True)
    cache(100_000_000).shrink(is_disk_low=False)
    cache(1_000_000, UV_LINK_MODE="symlink").shrink(is_disk_low=True)
    assert cache(None).size_bytes() > 3_000_000
    cache(1_000_000).shrink(is_disk_low=False)
    assert cache(None).size_bytes() < 1_000_000
    assert subprocess.run([python, "-I", "-c", "import big.code, numpy"], check=False).returncode == 0
    shutil.rmtree(site.root)
    assert site.environments().materialise(lock, ignore).exists()


def test_a_build_loses_nothing_when_the_cache_is_to_be_emptied(site: Site) -> None:
    pid_file = site.folder / "pid"
    lock = source_package(site.wheels, "endless", ENDLESS.format(pid_file=str(pid_file)))
    is_needless = threading.Event()

    def build() -> None:
        with stopped_when(is_needless.is_set), pytest.raises(StoppedError):
            site.environments().materialise(lock, ignore)

    thread = threading.Thread(target=build)
    thread.start()
    try:
        until(lambda: pid_file.exists() and pid_file.read_text() != "", "the build")
        with pytest.raises(FlopsError) as caught, stopped_when(is_needless.is_set):
            UvCache(Path(uv.find_uv_bin()), {**site.environ}, 0, lock_timeout_s=1).shrink(is_disk_low=False)
        assert caught.value.code is not ErrorCode.INTERNAL
        assert psutil.pid_exists(int(pid_file.read_text()))
    finally:
        is_needless.set()
        thread.join(10)
