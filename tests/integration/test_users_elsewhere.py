"""A user on another machine: the REST API and MLflow over the network, by the commands of the documents."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.errors import CATALOGUE, ErrorCode
from flops.testing.deployment import Deployment, deployed
from flops.testing.network import Machine, missing_for_networks, network

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(missing_for_networks()), reason=missing_for_networks()),
]

LOG_AND_LOAD = """
import sys, mlflow
mlflow.set_experiment("from elsewhere")
with mlflow.start_run() as run:
    mlflow.log_metric("rows", 3.0)
    mlflow.log_text("hello", "notes/hello.txt")
text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/notes/hello.txt")
print(text, mlflow.get_run(run.info.run_id).data.metrics)
"""
REACH = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)"


class User:
    """A user's machine with a home of its own."""

    def __init__(self, deployment: Deployment, machine: Machine, home: Path) -> None:
        self.deployment = deployment
        self._prefix = (*machine.prefix, "env", f"FLOPS_HOME={home}")

    def flops(self, *arguments: str, exit_code: int = 0) -> str:
        done = self.deployment.run("flops", *arguments, exit_code=exit_code, prefix=self._prefix)
        return done.stdout + done.stderr

    def python(self, code: str, *arguments: str, exit_code: int = 0, **environ: str) -> str:
        prefix = (*self._prefix, *(f"{name}={value}" for name, value in environ.items()))
        program = Path(sys.executable).name
        return self.deployment.run(program, "-c", code, *arguments, exit_code=exit_code, prefix=prefix).stdout


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    with network() as net, deployed(tmp_path / "home", address=net.here.address) as deployment:
        deployment.home.mkdir()
        deployment.up()
        yield User(deployment, net.add_machine(), tmp_path / "user")


def test_a_user_works_from_another_machine(user: User, tmp_path: Path) -> None:
    deployment = user.deployment
    status = deployment.ask("status")
    url, control = status["manager_url"], tmp_path / "home" / "control"
    assert url.startswith("https://198.18.")
    token = (control / "admin.token").read_text().strip()
    user.flops("connect", deployment.flops("status", "--connect").stdout.strip())
    assert "No node has joined" in user.flops("node", "list")

    mlflow = {"MLFLOW_TRACKING_URI": f"{url}/mlflow", "MLFLOW_TRACKING_TOKEN": token}
    trusted = {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(control / "authority.crt")}
    assert user.flops("tracking").strip() == mlflow["MLFLOW_TRACKING_URI"]
    deployment.wait_for(lambda: deployment.ask("status")["is_tracking_ready"], "MLflow")
    assert "hello {'rows': 3.0}" in user.python(LOG_AND_LOAD, **mlflow, **trusted)

    # MLflow itself, which asks for no token, is not to be reached; nor anything in the clear.
    _, _, port = status["tracking_loopback_url"].rpartition(":")
    host = url.rpartition(":")[0].removeprefix("https://")
    user.python(REACH, host, url.rpartition(":")[2])
    user.python(REACH, host, port, exit_code=1)
    plain = ("--url", url.replace("https", "http"), "--token-file", str(control / "admin.token"), "status")
    assert "--insecure" in user.flops(*plain, exit_code=CATALOGUE[ErrorCode.ENCRYPTION_MISMATCH].exit_code)
    told = user.flops("--insecure", *plain, exit_code=CATALOGUE[ErrorCode.ENCRYPTION_MISMATCH].exit_code)
    assert "encrypts" in told
