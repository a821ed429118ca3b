"""Services as containers: the contract, and what is particular to engines."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from flops.adapters.containers.engine import ContainerEngine
from flops.adapters.containers.images import EngineImages
from flops.adapters.containers.runtime import ContainerRuntime
from flops.adapters.file_blobs import FileBlobs
from flops.core.cluster import Resources, ServiceState
from flops.core.image_reference import parse_reference
from flops.core.images import INDEX, Descriptor, index_bytes
from flops.core.reach import Reach
from flops.errors import ErrorCode, FlopsError
from flops.ports import Runtime
from flops.testing.contracts.runtime import S1, SLEEP, RuntimeContract, until
from flops.testing.docker import missing_for_docker, running_docker
from flops.testing.images import make_image, make_layer
from flops.testing.podman import Podman, missing_for_podman, running_podman

pytestmark = pytest.mark.skipif(bool(missing_for_podman()), reason=missing_for_podman())


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with running_podman() as podman:
        yield podman


@pytest.fixture(scope="module")
def engine(podman: Podman) -> ContainerEngine:
    return ContainerEngine(podman.socket)


@pytest.fixture(scope="module", params=["podman"] if missing_for_docker() else ["podman", "docker"])
def any_engine(request: pytest.FixtureRequest) -> Iterator[ContainerEngine]:
    if request.param == "podman":
        yield request.getfixturevalue("engine")
    else:
        with running_docker() as engine:
            yield engine


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


class CountingEngine(ContainerEngine):
    """Knows how many bytes each archive had that was handed over; loses an image before it takes one in."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sent: list[int] = []
        self.removed_next = ""

    def load(self, archive: Iterator[bytes]) -> None:
        pieces = list(archive)
        if self.removed_next:
            self.remove_image(self.removed_next)
            self.removed_next = ""
        self.sent.append(sum(map(len, pieces)))
        super().load(iter(pieces))


def make_runtime(folder: Path, engine: ContainerEngine) -> ContainerRuntime:
    return ContainerRuntime(folder / "runtime", folder / "output", engine)


class TestContainerRuntime(RuntimeContract):
    @pytest.fixture
    def runtime(self, folder: Path, any_engine: ContainerEngine) -> Iterator[Runtime]:
        runtime = make_runtime(folder, any_engine)
        yield runtime
        runtime.remove(S1)

    @pytest.fixture
    def reopen(self, folder: Path, any_engine: ContainerEngine) -> Callable[[], Runtime]:
        return lambda: make_runtime(folder, any_engine)


class TestContainers:
    run = RuntimeContract.run
    end = RuntimeContract.end
    status = RuntimeContract.status

    @pytest.fixture
    def runtime(self, folder: Path, engine: ContainerEngine) -> Iterator[ContainerRuntime]:
        runtime = ContainerRuntime(folder / "runtime", folder / "output", engine, output_bytes=100_000)
        yield runtime
        runtime.remove(S1)

    def test_nothing_of_an_ended_service_is_left_in_the_engine(
        self, runtime: ContainerRuntime, podman: Podman, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, "print('done')")
        assert self.end(runtime).state is ServiceState.COMPLETED
        assert podman.run("ps", "--all", "--quiet") == ""
        assert podman.run("volume", "ls", "--quiet") == ""

    def test_it_has_no_rights(self, runtime: ContainerRuntime, tmp_path: Path) -> None:
        code = (
            "import os, pathlib\n"
            "status = dict(line.split(':\\t', 1) for line in open('/proc/self/status').read().splitlines())\n"
            "print(status['Uid'].split(), status['CapBnd'], status['NoNewPrivs'], status['Seccomp'])\n"
            "for path in ('/x', '/usr/x', '/etc/x', '/run/x', '/dev/x'):\n"
            "    try: pathlib.Path(path).write_text('x'); print('written', path)\n"
            "    except OSError: pass\n"
            "pathlib.Path('/tmp/x').write_text('x')\n"
            "print(sorted(set(os.listdir('/')) - {'bin', 'lib', 'lib64', 'usr'}))\n"
            "print(os.environ['TMPDIR'])"
        )
        self.run(runtime, tmp_path, code)
        assert self.end(runtime).state is ServiceState.COMPLETED, runtime.output(S1)
        rights, folders, temporary = runtime.output(S1).splitlines()
        assert rights == "['65532', '65532', '65532', '65532'] 0000000000000000 1 2"
        shown = {Path(path).parts[1] for path in (str(tmp_path), sys.prefix, sys.base_prefix)}
        own = {"sbin", "dev", "etc", "proc", "run", "sys", "tmp", "var", ".dockerenv"}  # the container's
        assert set(ast.literal_eval(folders)) <= own | shown
        assert temporary == f"{tmp_path}/tmp"

    def test_it_sees_of_the_node_what_it_may(self, runtime: ContainerRuntime, tmp_path: Path) -> None:
        home = tmp_path / "home"
        for name in ("secret", "bundles/own/code", "bundles/other/code"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text("x")
        work = home / "work"
        code = (
            "import pathlib, sys\n"
            "for name in sys.argv[1:]: print(pathlib.Path(name).exists())\n"
            "pathlib.Path('own').write_text('x')"
        )
        seen, hidden = home / "bundles/own/code", [home / "bundles/other", home / "secret", "/etc/shadow"]
        argv = [sys.executable, "-I", "-c", code, str(seen), *map(str, hidden)]
        runtime.start(S1, argv, {}, work, Resources(), Reach(readable=(str(seen.parent),)))
        assert self.end(runtime).state is ServiceState.COMPLETED, runtime.output(S1)
        assert runtime.output(S1).split() == ["True", "False", "False", "False"]
        assert (work / "own").read_text() == "x"

    def test_services_outlive_a_killed_engine(
        self, runtime: ContainerRuntime, podman: Podman, folder: Path, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, "import time; print('up', flush=True); time.sleep(3); print('down')")
        until(lambda: runtime.output(S1) != "")
        podman.kill()
        try:
            assert self.status(runtime).state is ServiceState.RUNNING
            assert runtime.running() == [S1]
            assert runtime.usage(S1).processes == 1
            assert runtime.output(S1) == "up\n"
            until(lambda: runtime.usage(S1).processes == 0)
            until(lambda: "does not answer" in self.status(runtime).detail)
            assert self.status(runtime).state is ServiceState.RUNNING  # nobody knows better
        finally:
            podman.start()
        assert self.end(runtime).state is ServiceState.COMPLETED
        assert runtime.output(S1) == "up\ndown\n"

    def test_a_service_is_ended_while_the_engine_is_away(
        self, runtime: ContainerRuntime, podman: Podman, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, f"import os; os.fork(); {SLEEP}")
        until(lambda: runtime.usage(S1).processes == 2)
        podman.kill()
        try:
            with pytest.raises(FlopsError) as caught:
                self.run(ContainerRuntime(tmp_path / "r", tmp_path / "o", runtime._engine), tmp_path, SLEEP)
            assert caught.value.code is ErrorCode.UNREACHABLE
            runtime.stop(S1, grace_s=0.5)
            assert runtime.usage(S1).processes == 0
        finally:
            podman.start()
        until(lambda: self.status(runtime).state is ServiceState.STOPPED)

    def test_a_service_that_is_killed_under_a_memory_limit_says_what_it_may_be(
        self, runtime: ContainerRuntime, tmp_path: Path
    ) -> None:
        for resources, code in (
            (Resources(memory_mb=200), ErrorCode.OUT_OF_MEMORY),
            (Resources(), ErrorCode.SERVICE_FAILED),
        ):
            self.run(runtime, tmp_path, "import os; os.kill(os.getpid(), 9)", resources)
            status = self.end(runtime)
            assert status.exit_code == -9
            assert status.error is not None
            assert status.error["code"] == code.value
            assert ("most likely" in status.detail) is (code is ErrorCode.OUT_OF_MEMORY)

    def test_a_container_that_someone_removes_has_failed(
        self, runtime: ContainerRuntime, podman: Podman, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, SLEEP)
        podman.run("rm", "--force", "--time", "0", "--all")
        assert "was removed" in self.end(runtime).detail
        self.run(runtime, tmp_path, "print('again')")
        assert self.end(runtime).state is ServiceState.COMPLETED

    def test_a_kill_between_making_and_starting_a_container_is_no_start(
        self, runtime: ContainerRuntime, podman: Podman, folder: Path, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, SLEEP)
        names = podman.run("ps", "--format", "{{.Names}}").split()
        image = podman.run("ps", "--format", "{{.Image}}").strip()
        podman.run("rm", "--force", "--time", "0", *names)
        podman.run("create", "--name", names[0], image, "x")
        (folder / "runtime" / S1 / "run.json").unlink()
        assert runtime.status(S1) is None
        self.run(runtime, tmp_path, "print('started')")
        assert self.end(runtime).state is ServiceState.COMPLETED
        assert runtime.output(S1).endswith("started\n")

    def test_a_restart_of_the_machine_is_no_failure(
        self, runtime: ContainerRuntime, folder: Path, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, SLEEP)
        file = folder / "runtime" / S1 / "launch.json"
        launch = json.loads(file.read_text())
        file.write_text(json.dumps({**launch, "boot_id": "another"}))
        assert self.status(runtime).state is ServiceState.STOPPED

    def test_two_starts_at_once_run_it_once(
        self, runtime: ContainerRuntime, folder: Path, engine: ContainerEngine, podman: Podman, tmp_path: Path
    ) -> None:
        others = [make_runtime(folder, engine) for _ in range(3)]
        threads = [threading.Thread(target=self.run, args=(r, tmp_path, SLEEP)) for r in (runtime, *others)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert runtime.running() == [S1]
        assert len(podman.run("ps", "--quiet", "--all").split()) == 1

    def test_output_is_taken_once_however_often_it_is_asked_for(
        self, runtime: ContainerRuntime, tmp_path: Path
    ) -> None:
        code = "import time\nfor i in range(60): print(i, flush=True); time.sleep(0.03)"
        self.run(runtime, tmp_path, code)
        place, said = 0, ""
        while self.status(runtime).state is ServiceState.RUNNING:
            piece = runtime.read_output(S1, place, 100_000)
            place, said = piece.end, said + piece.text
        said += runtime.read_output(S1, place, 100_000).text
        assert said == "".join(f"{i}\n" for i in range(60))

    def test_a_flood_of_output_does_not_fill_the_disk(
        self, runtime: ContainerRuntime, podman: Podman, folder: Path, tmp_path: Path
    ) -> None:
        self.run(runtime, tmp_path, "for i in range(20_000): print(f'{i:99}')")
        assert self.end(runtime).state is ServiceState.COMPLETED
        sizes = [file.stat().st_size for file in (folder / "output").iterdir()]
        assert sum(sizes) <= 210_000
        assert runtime.output(S1).endswith("19999\n")

    def test_an_end_is_told_on_a_full_disk_and_kept_when_there_is_space(
        self, engine: ContainerEngine, podman: Podman, folder: Path, tmp_path: Path
    ) -> None:
        disk = folder / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "flops-test", disk], check=True)
        runtime = ContainerRuntime(disk / "runtime", folder / "output", engine)
        try:
            self.run(runtime, tmp_path, "import time; print('up', flush=True); time.sleep(1); exit(4)")
            with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
                while True:
                    filler.write(b"x" * 1024)
            assert self.end(runtime).exit_code == 4
            assert len(podman.run("ps", "--all", "--quiet").split()) == 1
            (disk / "filler").unlink()
            assert self.status(runtime).exit_code == 4
            assert podman.run("ps", "--all", "--quiet") == ""
            assert runtime.output(S1) == "up\n"
        finally:
            runtime.remove(S1)
            subprocess.run(["umount", disk], check=True)

    def test_an_image_that_is_not_there_is_named(self, runtime: ContainerRuntime, tmp_path: Path) -> None:
        reach = Reach(image="localhost:1/learner:missing")
        with pytest.raises(FlopsError) as caught:
            runtime.start(S1, ["/bin/true"], {}, tmp_path, Resources(), reach)
        assert caught.value.code is ErrorCode.SERVICE_FAILED
        assert "localhost:1/learner:missing" in caught.value.message


class TestImages:
    end = RuntimeContract.end
    status = RuntimeContract.status

    @pytest.fixture
    def runtime(self, folder: Path, any_engine: ContainerEngine) -> Iterator[ContainerRuntime]:
        runtime = make_runtime(folder, any_engine)
        yield runtime
        runtime.remove(S1)

    def test_a_service_runs_in_its_image(
        self, runtime: ContainerRuntime, any_engine: ContainerEngine, tmp_path: Path
    ) -> None:
        blobs = FileBlobs(tmp_path / "blobs")
        images = EngineImages(any_engine, blobs)
        reference = parse_reference("localhost:5000/flops/learner:one")
        image = make_image(blobs, "/opt/of-the-image", "/srv/too")
        name = images.load(reference, image)
        assert name == "localhost:5000/flops/learner:one"
        programs = ("/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix)  # the image has no Python
        code = f"import os; print(os.listdir('/opt'), os.listdir('/srv'), os.getuid()); {SLEEP}"
        reach = Reach(readable=programs, image=name)
        argv = [sys.executable, "-I", "-c", code]
        runtime.start(S1, argv, {}, tmp_path / "work", Resources(memory_mb=200), reach)
        until(lambda: "up" in runtime.output(S1))
        assert runtime.output(S1).startswith("['of-the-image'] ['too'] 65532\n")
        assert not images.unload(reference, image)
        # What holds it to its ports needs nothing of the image, which has neither an interpreter nor a libc.
        runtime.remove(S1)
        runtime.start(S1, ["/missing"], {}, tmp_path, Resources(), Reach(image=name, dials=()))
        if "network" in runtime.limits()[0]:
            assert self.end(runtime).exit_code == 127
            assert runtime.output(S1) == "/missing cannot be started: No such file or directory\n"
        runtime.remove(S1)
        assert images.unload(reference, image)
        assert any_engine.image(name) is None

    def test_an_image_under_a_name_that_another_had_takes_its_place(
        self, any_engine: ContainerEngine, tmp_path: Path
    ) -> None:
        blobs = FileBlobs(tmp_path / "blobs")
        images = EngineImages(any_engine, blobs)
        reference = parse_reference("localhost:5000/flops/learner:moved")
        made = [make_image(blobs, layer) for layer in ("one", "two", "two")]
        names = [images.load(reference, image) for image in made]
        assert len(set(names)) == 1
        layers = (any_engine.image(names[0]) or {})["RootFS"]["Layers"]
        assert layers == [f"sha256:{make_layer(blobs, 'two').diff_id}"]
        assert images.unload(reference, made[-1])

    def test_a_damaged_layer_ends_the_hand_over_and_the_next_try_works(
        self, any_engine: ContainerEngine, tmp_path: Path
    ) -> None:
        blobs = FileBlobs(tmp_path / "blobs")
        images = EngineImages(any_engine, blobs)
        image = make_image(blobs, "good", "bad", size=300_000)
        bad = make_layer(blobs, "bad", 300_000).blob.digest
        file = next(path for path in (tmp_path / "blobs").rglob("*") if path.name == bad)
        whole = file.read_bytes()
        file.chmod(0o600)
        file.write_bytes(whole[:-1] + b"x")
        reference = parse_reference("localhost:5000/flops/damaged:1")
        with pytest.raises(FlopsError) as caught:
            images.load(reference, image)
        assert bad[:12] in caught.value.message
        assert any_engine.image(str(reference)) is None
        file.write_bytes(whole)
        images.load(reference, image)
        assert images.unload(reference, image)

    def test_layers_that_the_engine_has_are_not_sent_again(
        self, any_engine: ContainerEngine, tmp_path: Path
    ) -> None:
        blobs = FileBlobs(tmp_path / "blobs")
        engine = CountingEngine(any_engine.socket)
        images = EngineImages(engine, blobs)
        made = {
            parse_reference(f"localhost:5000/flops/{code}:1"): make_image(
                blobs, "system", "packages", code, size=100_000
            )
            for code in ("one", "two")
        }
        for reference, image in made.items():
            images.load(reference, image)
            images.load(reference, image)
        first, second = engine.sent
        assert first > 300_000
        assert second < 120_000
        assert all(images.unload(reference, image) for reference, image in made.items())

    def test_layers_that_the_engine_has_lost_meanwhile_are_sent(
        self, any_engine: ContainerEngine, tmp_path: Path
    ) -> None:
        blobs = FileBlobs(tmp_path / "blobs")
        engine = CountingEngine(any_engine.socket)
        images = EngineImages(engine, blobs)
        one, two = (make_image(blobs, "system", code, size=100_000) for code in ("one", "two"))
        engine.removed_next = images.load(parse_reference("localhost:5000/flops/one:1"), one)
        reference = parse_reference("localhost:5000/flops/two:1")
        images.load(reference, two)
        _, partial, whole = engine.sent
        assert partial < 120_000 < 200_000 < whole
        assert images.unload(reference, two)

    def test_an_index_is_no_image(self, any_engine: ContainerEngine, tmp_path: Path) -> None:
        blobs = FileBlobs(tmp_path / "blobs")
        data = index_bytes([make_image(blobs, "one")])
        index = Descriptor(media_type=INDEX, digest=blobs.put(data), size=len(data))
        with pytest.raises(FlopsError) as caught:
            EngineImages(any_engine, blobs).load(parse_reference("localhost:5000/flops/index:1"), index)
        assert caught.value.code is ErrorCode.IMAGE_DAMAGED
