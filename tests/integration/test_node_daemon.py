"""A node's daemon as a process, with the real cluster orchestrator; killed, restarted, starved."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.http_server import HttpServer
from flops.adapters.sql_cluster_store import SqlClusterStore
from flops.adapters.system_clock import SystemClock
from flops.core.cluster import Resources, ServiceKind, ServiceSpec, ServiceState, ServiceStatus
from flops.core.ids import Digest, NodeId, ServiceId
from flops.errors import CATALOGUE, ErrorCode, FlopsError
from flops.node.home import running_pid
from flops.node.report import read_report
from flops.orchestrator.app import build_app
from flops.orchestrator.cluster import ClusterOrchestrator
from flops.testing.deployment import free_ports
from flops.testing.podman import Podman, missing_for_podman, running_podman
from flops.testing.waiting import until

SLEEP = "import time; events.tell('progress', message='up'); time.sleep(600)"


class Cluster:
    """The cluster's side: the real orchestrator on its port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (self.port,) = free_ports(1)
        self.start()

    def start(self) -> None:
        self._store = SqlClusterStore(self._folder / "cluster.sqlite")
        self.blobs = FileBlobs(self._folder / "blobs")
        self.orchestrator = ClusterOrchestrator(self._store, SystemClock())
        self._server = HttpServer(build_app(self.orchestrator, self.blobs), "127.0.0.1", self.port)
        self._server.start()

    def stop(self) -> None:
        self._server.close()
        self._store.close()

    @property
    def node_id(self) -> NodeId:
        (node,) = self.orchestrator.nodes()
        return node.id

    def is_connected(self) -> bool:
        return any(node.is_connected for node in self.orchestrator.nodes())

    def run(self, program: str, service_id: str = "learner-p1-0", **spec: Any) -> ServiceId:
        """Have the node run a learner with this program."""
        spec.setdefault("environment", self.blobs.put(b"lock\n"))
        self.orchestrator.start_service(
            ServiceSpec(
                id=ServiceId(service_id),
                project_id="p1",
                kind=ServiceKind.LEARNER,
                node_id=self.node_id,
                config={"program": program, "data_tags": ["t"]},
                **spec,
            )
        )
        return ServiceId(service_id)

    def status(self, service_id: str = "learner-p1-0") -> ServiceStatus:
        return next(s.status for s in self.orchestrator.services() if s.spec.id == service_id)

    def told(self, service_id: str = "learner-p1-0") -> list[str]:
        """Messages of the service's events, in order."""
        events = self.orchestrator.events(after=0)
        return [
            str(e.payload.get("message", e.payload["kind"]))
            for e in events
            if e.kind == "actor" and e.service_id == service_id
        ]

    def wait_for(self, state: ServiceState, service_id: str = "learner-p1-0") -> ServiceStatus:
        until(lambda: self.status(service_id).state is state, f"{service_id} {state}")
        return self.status(service_id)


class PlayedNode:
    """A daemon as a process."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self._script = Path(__file__).with_name("played_node.py")
        self.configure(cluster_address="127.0.0.1", cluster_port=port)
        self._processes: list[subprocess.Popen[bytes]] = []
        data = home / "dataserver"
        data.mkdir()
        (data / "token").write_text("secret\n")
        (data / "endpoint.json").write_text(json.dumps({"host": "127.0.0.1", "port": 1, "pid": 1}))

    def configure(self, **values: Any) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "conf.json").write_text(json.dumps(values))

    def start(self) -> subprocess.Popen[bytes]:
        with (self.home / "nodeengine.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(self._script), "--home", str(self.home)],
                stdout=log,
                stderr=log,
                env={**os.environ, "FLOPS_DATA_PORT": "0"},
            )
        self._processes.append(process)
        return process

    def kill(self) -> None:
        self._processes[-1].kill()
        self._processes[-1].wait(timeout=10)

    def stop(self) -> None:
        self._processes[-1].terminate()
        assert self._processes[-1].wait(timeout=30) == 0

    def shims(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(str(self.home) in part for part in process.info["cmdline"] or ())
            and "service_shim.py" in " ".join(process.info["cmdline"])
        ]

    def files_of(self, service_id: str) -> list[str]:
        """Files and folders with a service's id in their name; others may be vanishing meanwhile."""
        return [
            name for _, folders, files in os.walk(self.home) for name in folders + files if service_id in name
        ]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(timeout=10)
        for shim in self.shims():
            shim.terminate()
        until(lambda: not self.shims(), "the end of all services")

    @property
    def log(self) -> str:
        return (self.home / "nodeengine.log").read_text()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.stop()


@pytest.fixture
def node(tmp_path: Path, cluster: Cluster) -> Iterator[PlayedNode]:
    node = PlayedNode(tmp_path / "home", cluster.port)
    yield node
    node.close()


@pytest.fixture
def joined(node: PlayedNode, cluster: Cluster) -> PlayedNode:
    node.start()
    until(cluster.is_connected, "joined")
    return node


def bundle_of(files: dict[str, str]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return raw.getvalue()


def test_a_service_runs_with_everything_it_needs(joined: PlayedNode, cluster: Cluster) -> None:
    bundle = cluster.blobs.put(bundle_of({"code/model.py": "print(1)"}))
    program = (
        "import json, os, pathlib\n"
        "from dataclasses import asdict\n"
        "events.tell('progress', message=json.dumps(asdict(context)))\n"
        "events.tell('progress', message=json.dumps(dict(os.environ)))\n"
        "events.tell('progress', message=(pathlib.Path(context.repo_dir) / 'code/model.py').read_text())\n"
        "print('said')"
    )
    cluster.run(program, bundle=bundle, resources=Resources(vcpus=1.5))
    cluster.wait_for(ServiceState.COMPLETED)
    context, environment, code = (text for text in cluster.told())
    told, variables = json.loads(context), json.loads(environment)
    assert code == "print(1)"
    assert told["work_dir"] == str(joined.home / "services/learner-p1-0/work")
    assert told["blobs_url"] == f"http://127.0.0.1:{cluster.port}/api/blobs"
    assert told["data_address"] == "127.0.0.1:1"
    assert told["data_token"].startswith("flops1.")
    assert told["environments_dir"] == str(joined.home / "environments")
    assert told["node_name"].endswith("-home")
    assert variables["FLOPS_SERVICE_ID"] == "learner-p1-0"
    assert variables["OMP_NUM_THREADS"] == "2"
    assert variables["PYTHONPATH"] == told["kit_dir"]
    assert "PYTEST_CURRENT_TEST" not in variables
    assert cluster.orchestrator.service_logs(ServiceId("learner-p1-0")).text == "said\n"


def test_events_come_in_order_and_before_the_end(joined: PlayedNode, cluster: Cluster) -> None:
    cluster.run("for i in range(1000): events.tell('progress', message=str(i))")
    cluster.wait_for(ServiceState.COMPLETED)
    assert cluster.told() == [str(i) for i in range(1000)]
    kinds = [
        (e.kind, e.payload.get("state"))
        for e in cluster.orchestrator.events(after=0)
        if e.service_id == "learner-p1-0"
    ]
    assert kinds[-1] == ("service", "completed")


def test_a_service_outlives_a_killed_daemon(joined: PlayedNode, cluster: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    program = (
        "import pathlib, time\nevents.tell('progress', message='before')\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)\n"
        "events.tell('progress', message='after')"
    )
    cluster.run(program)
    until(lambda: cluster.told() == ["before"])
    joined.kill()
    go.touch()
    (shim,) = joined.shims()
    until(lambda: not shim.is_running() or shim.status() == psutil.STATUS_ZOMBIE)
    joined.start()
    cluster.wait_for(ServiceState.COMPLETED)
    assert cluster.told() == ["before", "after"]
    assert cluster.status().restarts == 0


def test_a_running_service_is_taken_over(joined: PlayedNode, cluster: Cluster) -> None:
    cluster.run(SLEEP)
    cluster.wait_for(ServiceState.RUNNING)
    until(lambda: len(joined.shims()) == 1)  # its child looks like a second one between fork and exec
    before = joined.shims()
    joined.kill()
    joined.start()
    until(lambda: "joined the cluster" in joined.log.split("joined the cluster", 1)[1])
    assert joined.shims() == before
    cluster.orchestrator.stop_service(ServiceId("learner-p1-0"))
    cluster.wait_for(ServiceState.STOPPED)
    assert joined.shims() == []


def test_a_failure_that_a_daemon_missed_is_told(joined: PlayedNode, cluster: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    program = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)\n1 / 0"
    cluster.run(program)
    cluster.wait_for(ServiceState.RUNNING)
    joined.kill()
    go.touch()
    until(lambda: not joined.shims())
    joined.start()
    status = cluster.wait_for(ServiceState.FAILED)
    assert status.error is not None
    assert "ZeroDivisionError" in status.error["message"]
    assert status.exit_code == CATALOGUE[ErrorCode.INTERNAL].exit_code


def test_nothing_told_is_lost_when_the_cluster_is_away(
    joined: PlayedNode, cluster: Cluster, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    program = (
        "import pathlib, time\nevents.tell('progress', message='before')\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)\n"
        "for i in range(500): events.tell('progress', message=str(i))"
    )
    cluster.run(program)
    until(lambda: cluster.told() == ["before"])
    cluster.stop()
    go.touch()
    until(lambda: not joined.shims())
    cluster.start()
    cluster.wait_for(ServiceState.COMPLETED)
    assert cluster.told() == ["before", *[str(i) for i in range(500)]]


def test_a_stop_of_the_node_ends_services_and_its_start_runs_them_again(
    joined: PlayedNode, cluster: Cluster
) -> None:
    cluster.run(SLEEP)
    until(lambda: cluster.told() == ["up"])
    joined.stop()
    assert joined.shims() == []
    until(lambda: not cluster.is_connected())
    assert cluster.status().state is ServiceState.LOST
    joined.start()
    cluster.wait_for(ServiceState.RUNNING)
    until(lambda: cluster.told() == ["up", "up"])


def test_a_failing_service_is_started_again_and_then_given_up(joined: PlayedNode, cluster: Cluster) -> None:
    cluster.run("import os; print('no luck', flush=True); os._exit(5)", max_restarts=2)
    status = cluster.wait_for(ServiceState.FAILED)
    assert (status.exit_code, status.restarts) == (5, 2)
    assert status.error is not None
    assert status.error["code"] == ErrorCode.SERVICE_FAILED.value
    lines = status.error["details"]["output"].splitlines()
    assert [line for line in lines if not line.startswith("── started again")] == ["no luck"] * 3
    assert len(lines) == 5


def test_a_server_that_never_comes_up_is_given_up_but_not_one_that_has_served(
    joined: PlayedNode, cluster: Cluster
) -> None:
    crash = "import os; os._exit(5)"
    cluster.run(crash, "a", max_restarts=1_000, max_unheard_restarts=1)
    status = cluster.wait_for(ServiceState.FAILED, "a")
    assert (status.exit_code, status.restarts) == (5, 1)
    assert status.error is not None
    serve = f"events.tell('listening', address='h:1'); {crash}"
    cluster.run(serve, "b", max_restarts=1_000, max_unheard_restarts=1)
    until(lambda: cluster.status("b").restarts >= 2)
    assert not cluster.status("b").state.is_final


def test_a_service_that_needed_a_second_try_completes(joined: PlayedNode, cluster: Cluster) -> None:
    cluster.run(
        "import pathlib\ntry: pathlib.Path('tried').touch(exist_ok=False)\nexcept OSError: pass\nelse: 1 / 0",
        max_restarts=1,
    )
    assert cluster.wait_for(ServiceState.COMPLETED).restarts == 1
    told = [event.payload for event in cluster.orchestrator.events(after=0) if event.kind == "service"]
    restarts = [status for status in told if status["state"] == ServiceState.RESTARTING.value]
    assert all(status["error"] for status in restarts)  # no later step hides the reason


def test_a_killed_shim_is_a_failure_and_a_restart(joined: PlayedNode, cluster: Cluster) -> None:
    cluster.run(SLEEP, max_restarts=1)
    until(lambda: cluster.told() == ["up"])
    (shim,) = joined.shims()
    shim.send_signal(signal.SIGKILL)
    until(lambda: cluster.told() == ["up", "up"])
    assert cluster.wait_for(ServiceState.RUNNING).restarts == 1


def test_what_cannot_be_prepared_fails_with_the_reason(joined: PlayedNode, cluster: Cluster) -> None:
    cluster.run("", "a", environment=cluster.blobs.put(b"fail"))
    cluster.run("", "b", environment=Digest("0" * 64))
    cluster.run("", "c", bundle=cluster.blobs.put(b"no archive"))
    cluster.run("", "d", bundle=cluster.blobs.put(bundle_of({"../outside": "x"})))
    cluster.run("", "e", environment=None)
    errors = {i: cluster.wait_for(ServiceState.FAILED, i).error or {} for i in "abcde"}
    assert errors["a"]["message"] == "No such package."
    assert errors["b"]["code"] == ErrorCode.NOT_FOUND.value
    assert "cannot be unpacked" in errors["c"]["message"]
    assert "lies outside the bundle" in errors["d"]["message"]
    assert "names no environment" in errors["e"]["message"]
    assert not list(joined.home.rglob("outside"))


def test_a_service_can_be_stopped_while_it_is_prepared(joined: PlayedNode, cluster: Cluster) -> None:
    cluster.run("", environment=cluster.blobs.put(b"slow"))
    until(lambda: "building slow" in cluster.status().detail)
    cluster.orchestrator.stop_service(ServiceId("learner-p1-0"))
    cluster.wait_for(ServiceState.STOPPED)
    joined.stop()


def test_an_ended_service_gives_back_its_folder_and_keeps_its_output(
    joined: PlayedNode, cluster: Cluster
) -> None:
    cluster.run("print('the last words')")
    cluster.wait_for(ServiceState.COMPLETED)
    (folder,) = joined.home.glob("services/*")
    until(lambda: not (folder / "work").exists(), "the removal of its work")
    assert "the last words" in cluster.orchestrator.service_logs(ServiceId("learner-p1-0")).text
    joined.kill()
    joined.start()
    until(cluster.is_connected)
    assert cluster.status().state is ServiceState.COMPLETED


def test_a_removed_service_leaves_nothing(joined: PlayedNode, cluster: Cluster) -> None:
    cluster.run(SLEEP)
    until(lambda: cluster.told() == ["up"])
    cluster.orchestrator.remove_service(ServiceId("learner-p1-0"))
    until(lambda: not joined.shims())
    until(lambda: not joined.files_of("learner-p1-0"), "removed files")


def test_a_service_that_was_removed_meanwhile_is_removed(joined: PlayedNode, cluster: Cluster) -> None:
    cluster.run(SLEEP)
    until(lambda: cluster.told() == ["up"])
    joined.kill()
    cluster.orchestrator.remove_service(ServiceId("learner-p1-0"))
    joined.start()
    until(lambda: not joined.shims())
    until(lambda: not joined.files_of("learner-p1-0"), "removed files")


def test_a_second_daemon_does_not_start(joined: PlayedNode) -> None:
    assert running_pid(joined.home / "nodeengine.pid") is not None
    assert joined.start().wait(timeout=20) == 12
    assert "already running" in joined.log


def test_the_report_says_how_things_are(joined: PlayedNode, cluster: Cluster) -> None:
    cluster.run(SLEEP)
    file = joined.home / "status.json"
    until(
        lambda: (
            (r := read_report(file)) is not None
            and bool(r.services)
            and r.services[0].status.usage.processes == 1
        )
    )
    report = read_report(file)
    assert report is not None
    assert report.is_connected
    assert report.services[0].kind == "learner"
    cluster.stop()
    until(lambda: (r := read_report(file)) is not None and not r.is_connected)
    report = read_report(file)
    assert report is not None
    assert "127.0.0.1" in report.link_detail
    cluster.start()
    until(lambda: (r := read_report(file)) is not None and r.is_connected)


def test_a_corrupt_configuration_is_told_and_kept(node: PlayedNode) -> None:
    (node.home / "conf.json").write_text('{"cluster_address": ')
    assert node.start().wait(timeout=20) == 15
    assert (node.home / "conf.json").read_text() == '{"cluster_address": '
    assert json.loads((node.home / "startup_error.json").read_text())["code"] == "config_corrupt"


def fill(file: Path) -> None:
    """Take all space of a disk."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as ballast:
        while ballast.write(b"x" * 4096):
            pass


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_does_not_end_the_node(tmp_path: Path, cluster: Cluster) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    node = PlayedNode(disk / "home", cluster.port)
    try:
        node.start()
        until(cluster.is_connected, "joined")
        fill(disk / "ballast")
        cluster.run("print(1)", "full")
        status = cluster.wait_for(ServiceState.FAILED, "full")
        assert status.error is not None
        assert status.error["code"] == ErrorCode.DISK_FULL.value
        (disk / "ballast").unlink()
        cluster.run("print(1)", "again")
        cluster.wait_for(ServiceState.COMPLETED, "again")
        node.stop()
    finally:
        node.close()
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_bundle_is_shared(joined: PlayedNode, cluster: Cluster) -> None:
    data = bundle_of({"a": "1"})
    digest = cluster.blobs.put(data)
    assert digest == hashlib.sha256(data).hexdigest()
    for name in ("one", "two"):
        cluster.run("events.tell('progress', message=context.repo_dir)", name, bundle=digest)
        cluster.wait_for(ServiceState.COMPLETED, name)
    assert cluster.told("one") == cluster.told("two") == [str(joined.home / "bundles" / digest)]


def test_the_cache_gives_way_but_not_what_a_service_needs(
    node: PlayedNode, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOPS_CACHE_MB", "0")
    node.start()
    until(cluster.is_connected)
    digest = cluster.blobs.put(bundle_of({"a": "1"}))
    cluster.run(SLEEP, bundle=digest)
    until(lambda: cluster.told() == ["up"])
    file = node.home / "status.json"
    until(
        lambda: (r := read_report(file)) is not None and any(line.entries for line in r.caches), "the report"
    )
    report = read_report(file)
    assert report is not None
    assert [(line.name, line.entries) for line in report.caches] == [("bundles", 1)]
    assert report.caches[0].size_bytes > 0
    assert report.cache_limit_bytes == 0
    node.kill()
    node.start()  # a daemon knows what the services need that it takes over
    until(lambda: (r := read_report(file)) is not None and r.pid != report.pid, "the next daemon")
    other = cluster.blobs.put(bundle_of({"b": "2"}))
    cluster.run("pass", "other", bundle=other)
    cluster.wait_for(ServiceState.COMPLETED, "other")
    until(lambda: f"removed from the bundles: {other[:12]}" in node.log, "the removal of what is not needed")
    assert not (node.home / "bundles" / other).exists()
    assert (node.home / "bundles" / digest / "a").exists()
    cluster.orchestrator.stop_service(ServiceId("learner-p1-0"))
    cluster.wait_for(ServiceState.STOPPED)
    node.stop()


LEAKY = "print('patient-4711', flush=True); raise RuntimeError('patient-4711')"
DYING = "import os; print('patient-4711', flush=True); os._exit(5)"


@pytest.mark.parametrize("disclosure", ["message", "none"])
def test_output_of_users_code_stays_on_a_node_that_does_not_reveal_it(
    node: PlayedNode, cluster: Cluster, disclosure: str
) -> None:
    node.configure(cluster_address="127.0.0.1", cluster_port=cluster.port, failure_disclosure=disclosure)
    node.start()
    until(cluster.is_connected, "joined")
    cluster.run(LEAKY)
    cluster.run(DYING, "learner-p1-1", max_restarts=1)
    raised = cluster.wait_for(ServiceState.FAILED)
    died = cluster.wait_for(ServiceState.FAILED, "learner-p1-1")
    assert died.restarts == 1
    told = json.dumps([event.payload for event in cluster.orchestrator.events(after=0)])
    assert "Traceback" not in told
    assert '"output"' not in told
    assert told.count("ended with exit code 5") >= 2  # when it was started again, and at its end
    is_text_told = disclosure == "message"
    assert ("patient-4711" in told) is is_text_told
    assert raised.error is not None
    assert ("RuntimeError: patient-4711" in raised.error["message"]) is is_text_told
    for service_id in ("learner-p1-0", "learner-p1-1"):
        with pytest.raises(FlopsError, match="does not reveal the output of learner-p1") as refused:
            cluster.orchestrator.service_logs(ServiceId(service_id))
        assert refused.value.code is ErrorCode.FORBIDDEN
        assert "patient-4711" in (node.home / f"logs/{service_id}.log").read_text()
    report = read_report(node.home / "status.json")
    assert report is not None
    assert report.disclosure.value == disclosure


def test_a_node_reveals_output_unless_told_otherwise(joined: PlayedNode, cluster: Cluster) -> None:
    cluster.run(DYING)
    failed = cluster.wait_for(ServiceState.FAILED)
    assert failed.error is not None
    assert failed.error["details"]["output"] == "patient-4711"


@pytest.fixture
def podman(node: PlayedNode, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Podman]:
    """An engine for the node, which has joined and runs its services in containers."""
    if missing := missing_for_podman():
        pytest.skip(missing)
    with running_podman() as podman:
        monkeypatch.setenv("FLOPS_CONTAINER_SOCKET", str(podman.socket))
        containers = {"virutalizaiton_name": "container", "virutalizaiton_active": True}
        node.configure(cluster_address="127.0.0.1", cluster_port=cluster.port, virtualizations=[containers])
        node.start()
        until(cluster.is_connected, "joined")
        yield podman
        node.close()


def test_a_container_outlives_a_killed_daemon_and_is_taken_over(
    node: PlayedNode, podman: Podman, cluster: Cluster
) -> None:
    cluster.run(SLEEP, resources=Resources(memory_mb=300, vcpus=1))
    until(lambda: cluster.told() == ["up"])
    before = podman.run("ps", "--quiet")
    assert len(before.split()) == 1
    node.kill()
    node.start()
    until(lambda: "joined the cluster" in node.log.split("joined the cluster", 1)[1])
    assert podman.run("ps", "--quiet") == before
    cluster.orchestrator.stop_service(ServiceId("learner-p1-0"))
    cluster.wait_for(ServiceState.STOPPED)
    until(lambda: podman.run("ps", "--all", "--quiet") == "", "the end of the container")


def test_the_end_of_a_container_that_a_daemon_missed_is_told(
    node: PlayedNode, podman: Podman, cluster: Cluster
) -> None:
    program = (
        "import pathlib, time\nevents.tell('progress', message='before')\n"
        "while not pathlib.Path(context.work_dir, 'go').exists(): time.sleep(0.02)\n"
        "print('said')\nevents.tell('progress', message='after')"
    )
    cluster.run(program)
    until(lambda: cluster.told() == ["before"])
    node.kill()
    (node.home / "services" / "learner-p1-0" / "work" / "go").touch()
    until(lambda: podman.run("ps", "--quiet") == "", "the end of the container")
    node.start()
    cluster.wait_for(ServiceState.COMPLETED)
    assert cluster.told() == ["before", "after"]
    until(cluster.is_connected, "joined")
    assert cluster.orchestrator.service_logs(ServiceId("learner-p1-0")).text == "said\n"
    assert podman.run("ps", "--all", "--quiet") == ""


def test_a_container_reads_what_a_strict_root_has_made(
    node: PlayedNode, podman: Podman, cluster: Cluster
) -> None:
    node.stop()
    before = os.umask(0o077)
    try:
        node.start()
    finally:
        os.umask(before)
    until(cluster.is_connected, "joined")
    bundle = cluster.blobs.put(bundle_of({"code/model.py": "print(1)"}))
    cluster.run("print(open(context.repo_dir + '/code/model.py').read())", bundle=bundle)
    cluster.wait_for(ServiceState.COMPLETED)


def test_a_service_waits_for_an_engine_that_is_away_and_the_nodes_stop_ends_it(
    node: PlayedNode, podman: Podman, cluster: Cluster
) -> None:
    podman.kill()
    cluster.run(SLEEP)
    until(lambda: "The container engine" in cluster.status().detail)
    assert not cluster.status().state.is_final
    podman.start()
    until(lambda: cluster.told() == ["up"])
    node.stop()
    assert podman.run("ps", "--all", "--quiet") == ""
