"""`flops up`, `status` and `down` with the real control plane."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import psutil
import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.cli.control import read_endpoint
from flops.control.kept_ports import KeptPorts
from flops.errors import CATALOGUE, ErrorCode
from flops.testing.waiting import until
from flops.wiring.site_packages import site_packages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

FLOPS = Path(sys.executable).parent / "flops"
FREE_PORTS = ("--manager-port=0", "--cluster-port=0", "--tracking-port=0")


def exit_code(code: ErrorCode) -> int:
    return CATALOGUE[code].exit_code


class Home:
    """A home of its own, and the commands that use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.control = folder / "control"
        self.environ = {**os.environ, "FLOPS_HOME": str(folder), "HOME": str(folder)}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [FLOPS, *arguments], env=self.environ, capture_output=True, text=True, timeout=120, check=False
        )

    def endpoint(self) -> Mapping[str, object]:
        endpoint = read_endpoint(self.control)
        assert endpoint is not None
        return endpoint


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    yield home
    home.run("down")


@pytest.mark.parametrize("index", [None, "http://127.0.0.1:1/simple"])
def test_the_cluster_serves_packages_where_an_index_is_named(home: Home, index: str | None) -> None:
    home.environ |= {} if index is None else {"FLOPS_PACKAGE_INDEX": index}
    up = home.run("up", *FREE_PORTS)
    assert up.returncode == 0, up.stderr
    lock = "# python 3.11\none==1 --hash=sha256:" + 64 * "a" + "\n"
    FileBlobs(home.control / "blobs").put(lock.encode())
    api = f"http://{home.endpoint()['cluster_address']}/api"
    with site_packages(f"{api}/blobs", dict).serving(lock) as served:
        assert served == ("" if index is None else f"{api}/packages/simple/")
    page = httpx.get(f"{api}/packages/simple/one/", timeout=30)
    assert page.status_code == (404 if index is None else 503), page.text


def test_up_status_and_down(home: Home) -> None:
    up = home.run("up", *FREE_PORTS, "--format", "json")
    assert up.returncode == 0, up.stderr
    endpoint = json.loads(up.stdout)["data"]
    token_file = Path(endpoint["token_file"])
    assert token_file.stat().st_mode & 0o077 == 0
    assert token_file.read_text().strip() not in up.stdout + up.stderr
    family = [endpoint["pid"], *(p.pid for p in psutil.Process(endpoint["pid"]).children(recursive=True))]

    status = home.run("status")
    for key in ("manager_url", "cluster_address", "tracking_url"):
        assert str(endpoint[key]) in status.stdout

    again = home.run("up", *FREE_PORTS)
    assert again.returncode == exit_code(ErrorCode.ALREADY_RUNNING)
    assert str(endpoint["pid"]) in again.stderr
    assert endpoint["manager_url"] in again.stderr

    down = home.run("down")
    assert down.returncode == 0
    assert f"Ended process {endpoint['pid']}" in down.stderr
    assert not [pid for pid in family if psutil.pid_exists(pid)]
    assert home.run("down").returncode == exit_code(ErrorCode.NOT_RUNNING)
    assert home.run("status").returncode == exit_code(ErrorCode.UNREACHABLE)


def test_a_control_plane_that_encrypts_is_known_over_restarts(home: Home) -> None:
    home.environ["FLOPS_ENCRYPTION"] = "on"
    up = home.run("up", *FREE_PORTS)
    assert up.returncode == 0, up.stderr
    assert str(home.endpoint()["manager_url"]).startswith("https://127.0.0.1:")
    assert str(home.control / "authority.crt") in up.stdout
    line = home.run("status", "--connect", "--address", "127.0.0.1").stdout.strip()
    own = home.run("connect", line)
    assert own.returncode == exit_code(ErrorCode.CONFLICT)
    elsewhere = Home(home.folder / "elsewhere")
    assert elsewhere.run("connect", line).returncode == 0
    home.run("down")
    assert home.run("up", *FREE_PORTS).returncode == 0  # with another certificate, of the same authority
    assert elsewhere.run("node", "list").returncode == 0


def test_settings_that_contradict_each_other_are_named(home: Home) -> None:
    home.environ |= {"FLOPS_TLS_CERTIFICATE": "nowhere.pem", "FLOPS_ENCRYPTION": "off"}
    failed = home.run("up", *FREE_PORTS)
    assert failed.returncode == exit_code(ErrorCode.CONFIG_INVALID), failed.stderr
    assert "FLOPS_TLS_CERTIFICATE names nowhere.pem" in failed.stderr


def test_up_removes_what_nothing_refers_to_and_what_killed_writers_left(home: Home) -> None:
    old = FileBlobs(home.control / "blobs").put(b"of a project that was deleted")
    unfinished = home.control / f".endpoint.json.{'0' * 32}.tmp"
    unfinished.touch()
    for path in (home.control / "blobs" / old[:2] / old, unfinished):
        os.utime(path, (1, 1))
    new = FileBlobs(home.control / "blobs").put(b"of a project that is about to be submitted")
    assert home.run("up", *FREE_PORTS).returncode == 0
    until(lambda: not unfinished.exists(), "the sweep")
    assert FileBlobs(home.control / "blobs").digests() == [new]
    assert f"removed blob {old[:12]}" in (home.control / "control.log").read_text()


def test_down_ends_a_control_plane_that_does_not_listen_to_signals(home: Home) -> None:
    assert home.run("up", *FREE_PORTS).returncode == 0
    pid = int(str(home.endpoint()["pid"]))
    family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    (home.control / "endpoint.json").unlink()  # whoever did that: the lock still tells
    down = home.run("down", "--format", "json")
    assert json.loads(down.stdout)["data"]["pid"] == pid
    assert not [pid for pid in family if psutil.pid_exists(pid)]


def test_down_ends_the_frozen_mlflow_server_of_a_killed_control_plane(home: Home) -> None:
    assert home.run("up", *FREE_PORTS).returncode == 0
    control_plane = psutil.Process(int(str(home.endpoint()["pid"])))
    (tracking,) = control_plane.children()
    tracking.suspend()  # so that it does not notice the end of its parent
    family = [tracking, *tracking.children(recursive=True)]
    control_plane.kill()
    control_plane.wait(timeout=10)
    assert tracking.is_running()
    down = home.run("down", "--format", "json")
    assert down.returncode == 0, down.stderr
    assert json.loads(down.stdout)["data"]["pid"] == tracking.pid
    assert "left over" in down.stderr
    psutil.wait_procs(family, timeout=5)
    assert not [process for process in family if process.is_running()]
    assert home.run("down").returncode == exit_code(ErrorCode.NOT_RUNNING)


def test_free_ports_stay_the_same_after_a_kill(home: Home) -> None:
    addresses = ("manager_url", "cluster_address", "tracking_url")
    assert home.run("up", *FREE_PORTS).returncode == 0
    first = home.endpoint()
    psutil.Process(int(str(first["pid"]))).kill()
    again = home.run("up", *FREE_PORTS)
    assert again.returncode == 0, again.stderr
    assert [home.endpoint()[key] for key in addresses] == [first[key] for key in addresses]
    home.run("down")
    port = int(str(first["cluster_address"]).rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        occupied = home.run("up", *FREE_PORTS)
    assert occupied.returncode == exit_code(ErrorCode.PORT_OCCUPIED)
    assert f"Port {port}" in occupied.stderr
    assert "another one with --cluster-port." in occupied.stderr


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"manager": "x"}'])
def test_a_damaged_file_of_ports_keeps_nothing_from_starting(tmp_path: Path, damage: str) -> None:
    (tmp_path / "ports.json").write_text(damage)
    ports = KeptPorts(tmp_path)
    assert ports.wanted("manager", 0) == 0
    ports.keep({"manager": 7})
    assert (KeptPorts(tmp_path).wanted("manager", 0), KeptPorts(tmp_path).wanted("manager", 5)) == (7, 5)


def test_the_foreground_ends_on_a_signal(home: Home) -> None:
    with subprocess.Popen(
        [FLOPS, "up", "--foreground", *FREE_PORTS],
        env=home.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while lines[-1] and "Admin token" not in lines[-1]:
            lines.append(process.stdout.readline())
        pid = int(str(home.endpoint()["pid"]))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert lines[0].startswith("Manager ")
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("option", ["--manager-port", "--cluster-port", "--tracking-port"])
def test_an_occupied_port_is_named_with_its_option(home: Home, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        others = [item for item in FREE_PORTS if not item.startswith(option)]
        up = home.run("up", f"{option}={port}", *others)
    assert up.returncode == exit_code(ErrorCode.PORT_OCCUPIED)
    assert str(port) in up.stderr
    assert f"choose another one with {option}." in up.stderr
    assert "Traceback" not in up.stderr
    assert read_endpoint(home.control) is None


def test_one_that_is_starting_is_not_started_twice(home: Home) -> None:
    home.control.mkdir(parents=True)
    with (home.control / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        up = home.run("up", *FREE_PORTS)
    assert up.returncode == exit_code(ErrorCode.ALREADY_RUNNING)
    assert "starting or stopping" in up.stderr


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = Home(tmp_path / "file" / "home")
    up = home.run("up", *FREE_PORTS)
    assert up.returncode == exit_code(ErrorCode.FILE_UNREADABLE)
    assert "State cannot be kept in" in up.stderr


def test_a_stale_endpoint_is_nobody(tmp_path: Path) -> None:
    for content in ("{", "{}", '{"pid": "x"}', json.dumps({"pid": os.getpid()}), '{"pid": 4194999}'):
        (tmp_path / "endpoint.json").write_text(content)
        assert read_endpoint(tmp_path) is None
