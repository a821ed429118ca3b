"""The commands of NodeEngine, as operators type them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flops.adapters.http_server import HttpServer
from flops.adapters.memory_blobs import MemoryBlobs
from flops.adapters.memory_cluster_store import MemoryClusterStore
from flops.adapters.system_clock import SystemClock
from flops.cli.node_engine import main
from flops.errors import CATALOGUE, ErrorCode
from flops.node.home import running_pid
from flops.orchestrator.app import build_app
from flops.orchestrator.cluster import ClusterOrchestrator
from flops.testing.deployment import free_ports
from flops.testing.waiting import until

NODE_ENGINE = str(Path(sys.executable).with_name("NodeEngine"))
ENVIRONMENT = {**os.environ, "FLOPS_DATA_PORT": "0"}


def exit_code(code: ErrorCode) -> int:
    return CATALOGUE[code].exit_code


@dataclass(frozen=True)
class Typed:
    """What a command printed."""

    stdout: str
    stderr: str


class Operator:
    """Types commands for one node."""

    def __init__(self, home: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.home = home
        self._capture = capture

    def configure(self, *arguments: str, expect: int = 0) -> Typed:
        """Run a command that starts nothing, in this process."""
        self._capture.readouterr()
        code = main(["--home", str(self.home), *arguments])
        stdout, stderr = self._capture.readouterr()
        assert code == expect, (arguments, stdout, stderr)
        return Typed(stdout, stderr)

    def type(self, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        result = subprocess.run(
            [NODE_ENGINE, "--home", str(self.home), *arguments],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=60,
            check=False,
        )
        assert result.returncode == expect, (arguments, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        return result

    def start(self, port: int) -> subprocess.CompletedProcess[str]:
        return self.type("-a", "127.0.0.1", "-p", str(port), "-d")

    def state(self) -> dict[str, Any]:
        result = self.type("status", "--format", "json", expect=0 if self.pid else 13)
        data = json.loads(result.stdout)["data"]
        assert isinstance(data, dict)
        return data

    @property
    def pid(self) -> int | None:
        return running_pid(self.home / "nodeengine.pid")

    @property
    def conf(self) -> dict[str, Any]:
        raw = json.loads((self.home / "conf.json").read_text())
        assert isinstance(raw, dict)
        return raw


@pytest.fixture
def operator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Operator]:
    operator = Operator(tmp_path / "home", capsys)
    yield operator
    if operator.pid is not None:
        operator.type("stop")
    assert [p for p in psutil.process_iter(["cmdline"]) if str(operator.home) in str(p.info["cmdline"])] == []


@pytest.fixture
def port() -> int:
    """A port where no cluster is."""
    return free_ports(1)[0]


@pytest.fixture
def cluster(port: int) -> Iterator[ClusterOrchestrator]:
    orchestrator = ClusterOrchestrator(MemoryClusterStore(), SystemClock())
    server = HttpServer(build_app(orchestrator, MemoryBlobs()), "127.0.0.1", port)
    server.start()
    yield orchestrator
    server.close()


def test_preparing_a_learner_worker(operator: Operator, cluster: ClusterOrchestrator, port: int) -> None:
    started = operator.start(port)
    assert started.stdout == "NodeEngine started  🟢\n"
    assert started.stderr.startswith(f"Joined the cluster at 127.0.0.1:{port} as ")
    assert operator.state()["node"]["is_connected"] is True

    switched = operator.type("config", "addon", "FLOps-learner", "on")
    assert "takes effect at the next start" in switched.stderr
    assert "takes effect at the next start" in operator.type("config", "addon").stderr
    stopped = operator.type("stop")
    assert stopped.stdout == "NodeEngine stopped; its addons and services have ended.\n"
    assert [node.is_connected for node in cluster.nodes()] == [False]

    assert operator.type("-d").stdout == "NodeEngine started  🟢\n"
    shown = operator.type("config", "addon")
    assert (shown.stdout, shown.stderr) == ("Configured Addons:\n     - FLOps-learner: 🟢 Active\n", "")
    until(lambda: cluster.nodes()[0].has_addon("FLOps-learner"))
    text = operator.type("status").stdout
    assert "🟢 connected since" in text
    assert "     - FLOps-learner: 🟢 healthy" in text


def test_a_cluster_that_is_away_is_told_and_tried_again(operator: Operator, port: int) -> None:
    started = operator.start(port)
    assert "Not joined yet: No cluster answers at 127.0.0.1" in started.stderr
    assert "keeps trying" in started.stderr
    assert "🔴 not connected" in operator.type("status").stdout
    orchestrator = ClusterOrchestrator(MemoryClusterStore(), SystemClock())
    server = HttpServer(build_app(orchestrator, MemoryBlobs()), "127.0.0.1", port)
    server.start()
    try:
        until(lambda: bool(orchestrator.nodes()))
    finally:
        server.close()


def test_a_second_start_changes_nothing(operator: Operator, port: int) -> None:
    operator.start(port)
    pid, conf = operator.pid, operator.conf
    for arguments in (("-d",), ("-a", "elsewhere", "-d"), ()):
        result = operator.type(*arguments, expect=exit_code(ErrorCode.ALREADY_RUNNING))
        assert f"process {pid}" in result.stderr
    assert (operator.pid, operator.conf) == (pid, conf)


def test_without_a_daemon(operator: Operator) -> None:
    assert operator.type("stop").stdout == "NodeEngine is not running.\n"
    result = operator.type("status", expect=exit_code(ErrorCode.NOT_RUNNING))
    assert "not running" in result.stdout
    assert operator.state()["is_running"] is False
    assert (
        "is the NodeEngine running?" in operator.type("logs", expect=exit_code(ErrorCode.NOT_RUNNING)).stderr
    )
    assert operator.type("config", "addon").stdout == "No Addons Configured.\n"


def test_a_killed_daemon_leaves_its_addon_and_the_next_takes_it_over(operator: Operator, port: int) -> None:
    operator.type("config", "addon", "FLOps", "on")
    operator.start(port)

    def is_healthy() -> bool:
        return [addon["state"] for addon in operator.state()["node"]["addons"]] == ["healthy"]

    until(is_healthy)
    endpoint = json.loads((operator.home / "dataserver/endpoint.json").read_text())
    assert operator.pid is not None
    os.kill(operator.pid, signal.SIGKILL)
    until(lambda: operator.pid is None)
    assert "not running" in operator.type("status", expect=13).stdout
    operator.type("-d")
    until(is_healthy)
    assert json.loads((operator.home / "dataserver/endpoint.json").read_text()) == endpoint
    assert operator.pid is not None
    os.kill(operator.pid, signal.SIGKILL)
    until(lambda: operator.pid is None)
    result = operator.type("stop")
    assert "1 of its services and addons still ran" in result.stderr
    assert not psutil.pid_exists(endpoint["pid"]) or psutil.Process(endpoint["pid"]).status() == "zombie"


def test_in_the_foreground_until_interrupted(operator: Operator, port: int) -> None:
    process = subprocess.Popen(
        [NODE_ENGINE, "--home", str(operator.home), "-a", f"127.0.0.1:{port}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    until(lambda: operator.pid is not None and (operator.home / "status.json").exists())
    assert operator.state()["node"]["cluster_address"] == f"127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, "NodeEngine started  🟢\n")
    assert stderr.endswith("Exiting...\n")
    assert operator.pid is None


def test_logs_are_followed_until_interrupted(operator: Operator, port: int) -> None:
    operator.start(port)
    process = subprocess.Popen(
        [NODE_ENGINE, "logs", "--home", str(operator.home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with (operator.home / "nodeengine.log").open("a") as log:
        until(lambda: bool(log.write("news\n") and log.flush() is None) and _is_reading(process, log.name))
    assert process.stdout.readline() == "news\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (0, "Detatching...\n")
    assert operator.pid is not None


def _is_reading(process: subprocess.Popen[str], name: str) -> bool:
    return any(file.path == name for file in psutil.Process(process.pid).open_files())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("config", "addon", "FLOps", "yes"), ErrorCode.CONFIG_INVALID),
        (("config", "addon", "FLOps"), ErrorCode.USAGE),
        (("config", "addon", "flop", "on"), ErrorCode.ADDON_UNKNOWN),
        (("config", "addon", "FLOps", "on", "off"), ErrorCode.USAGE),
        (("config", "cluster"), ErrorCode.USAGE),
        (("config", "cluster", "http://x"), ErrorCode.CONFIG_INVALID),
        (("config", "cluster", "x", "-p", "0"), ErrorCode.CONFIG_INVALID),
        (("config", "cluster", "x", "-p", "many"), ErrorCode.USAGE),
        (("config", "cluster", "x:1", "-p", "2"), ErrorCode.USAGE),
        (("config", "auth"), ErrorCode.USAGE),
        (("config", "auth", "-c", "/nonexistent"), ErrorCode.FILE_UNREADABLE),
        (("config", "applogs", "/etc/passwd"), ErrorCode.CONFIG_INVALID),
        (("config", "nonsense"), ErrorCode.USAGE),
        (("nonsense",), ErrorCode.USAGE),
        (("-a", "", "-d"), ErrorCode.CONFIG_INVALID),
        (("-a", "x", "-p", "70000", "-d"), ErrorCode.CONFIG_INVALID),
        (("-d", "status"), ErrorCode.USAGE),
    ],
)
def test_what_is_wrong_changes_nothing(
    operator: Operator, arguments: tuple[str, ...], code: ErrorCode
) -> None:
    operator.configure("config", "default")
    before = operator.conf
    assert f"[{code.value}]" in operator.configure(*arguments, expect=exit_code(code)).stderr
    assert operator.conf == before


def test_configuration_is_kept(operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOPS_CONTAINER_SOCKET", str(tmp_path / "no.sock"))
    pem = tmp_path / "x.pem"
    pem.touch()
    operator.configure("config", "cluster", "one", "-p", "1", "-s")
    assert [operator.conf[f"cluster_{key}"] for key in ("address", "port", "ssl")] == ["one", 1, True]
    operator.configure("config", "cluster", "two")
    assert [operator.conf[f"cluster_{key}"] for key in ("address", "port", "ssl")] == ["two", 10100, False]
    operator.configure("config", "applogs", str(tmp_path / "logs"))
    operator.configure("config", "visibility", "public")
    operator.configure("config", "auth", "-c", str(pem))
    operator.configure("config", "addon", "imageBuilder", "enable")
    operator.configure("config", "addon", "FLOps", "true")
    operator.configure("config", "addon", "FLOps-learner", "off")
    conf = operator.conf
    assert conf["app_logs"] == str(tmp_path / "logs")
    assert conf["public_ip"] is True
    assert conf["mqtt_cert_file"] == str(pem)
    assert operator.configure("config", "addon").stdout == (
        "Configured Addons:\n     - image-builder: 🟢 Active\n     - FLOps-learner: ❌ Disabled\n"
    )
    assert operator.configure("config", "virtualization").stdout == (
        "Virtualization Runtimes:\n     - process: 🟢 Active\n"
    )
    switched = operator.configure("config", "virtualization", "container", "on")
    assert switched.stdout == (
        "Virtualization Runtimes:\n     - process: 🟢 Active\n     - container: 🟢 Active\n"
    )
    assert "Install podman" in switched.stderr
    assert operator.conf["virtualizations"][1]["virutalizaiton_active"] is True
    operator.configure("config", "virtualization", "container", "perhaps", expect=16)
    off = operator.configure("config", "virtualization", "container", "off")
    assert "     - container: ❌ Disabled\n" in off.stdout
    assert off.stderr == ""
    operator.configure("config", "visibility", "private")
    assert operator.conf["public_ip"] is False
    assert operator.configure("config", "disclosure").stdout.startswith("Disclosure: full (")
    assert operator.configure("config", "disclosure", "none").stdout.startswith("Disclosure: none (")
    assert operator.conf["failure_disclosure"] == "none"
    assert (
        json.loads(operator.configure("status", "--format", "json", expect=13).stdout)["data"][
            "configured_disclosure"
        ]
        == "none"
    )
    operator.configure("config", "default")
    assert operator.conf["addons"] is None


def tools_folder(folder: Path, *names: str) -> str:
    """A folder with links to programs, to be the whole PATH."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to("/bin/true")
    return str(folder)


def test_what_cannot_be_built_is_said_when_the_builder_is_switched_on(
    operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOPS_CONTAINER_SOCKET", str(tmp_path / "no.sock"))
    monkeypatch.setenv("PATH", tools_folder(tmp_path / "git only", "git"))
    switched = operator.configure("config", "addon", "imageBuilder", "on")
    assert switched.stdout == "Configured Addons:\n     - image-builder: 🟢 Active\n"
    for platform in ("amd64", "arm64"):
        assert f"Images for linux/{platform} are made here" in switched.stderr
        assert f"Images for linux/{platform} are not run here" in switched.stderr
        assert f"Dockerfiles for linux/{platform} are " in switched.stderr
    assert "base image from a registry (missing: mmdebstrap" in switched.stderr
    assert ", without emulation, " in switched.stderr
    monkeypatch.setenv("PATH", tools_folder(tmp_path / "nothing"))
    assert (
        "git cannot be found on PATH." in operator.configure("config", "addon", "imageBuilder", "on").stderr
    )
    assert operator.configure("config", "addon", "imageBuilder", "off").stderr == ""


def test_the_status_shows_what_is_built_for_which_platform(
    operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "PATH", tools_folder(tmp_path / "git only", "git"))
    operator.type("config", "addon", "imageBuilder", "on")
    operator.start(port)
    until(lambda: [addon["state"] for addon in operator.state()["node"]["addons"]] == ["healthy"])
    lines = operator.type("status").stdout.splitlines()
    assert "     - image-builder: 🟢 healthy" in lines
    assert any("⚪ Images for linux/arm64 are made here" in line for line in lines)
    assert "base image from a registry" in operator.state()["node"]["addons"][0]["detail"]


def test_a_corrupt_configuration_is_told_everywhere_and_mended_by_default(operator: Operator) -> None:
    operator.home.mkdir()
    file = operator.home / "conf.json"
    file.write_text('{"cluster_address": "x", ')
    for arguments in (
        ("status",),
        ("config", "addon"),
        ("config", "addon", "FLOps", "on"),
        ("-d",),
        ("-a", "x", "-d"),
    ):
        result = operator.configure(*arguments, expect=exit_code(ErrorCode.CONFIG_CORRUPT))
        assert str(file) in result.stderr
    assert file.read_text() == '{"cluster_address": "x", '
    operator.configure("config", "default")
    assert operator.configure("config", "addon").stdout == "No Addons Configured.\n"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_valid(operator: Operator, tmp_path: Path) -> None:
    unit = tmp_path / "nodeengine.service"
    operator.configure("install", "--unit", str(unit))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    assert "KillMode=process" in unit.read_text()


def test_only_the_machines_own_node_is_installed(operator: Operator) -> None:
    assert operator.configure("install", expect=2 if os.geteuid() == 0 else 6).stdout == ""


def test_version(operator: Operator) -> None:
    assert operator.configure("version").stdout.strip()


def test_commands_load_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom flops.cli.node_engine import main\n"
        f"main(['--home', {str(tmp_path)!r}, 'config', 'addon'])\n"
        "heavy = {'pyarrow', 'mlflow', 'flwr', 'numpy', 'fastapi', 'sqlalchemy', 'httpx', 'websockets'}\n"
        "print(heavy & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"
