"""A real manager on memory adapters, and the `flops` command that talks to it."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flops.adapters.http_server import HttpServer
from flops.cli.flops import main
from flops.manager.app import build_app
from flops.retention_ports import RegisteredImages
from flops.testing.one_cluster import OneCluster
from flops.testing.projects import PlayedCluster, played_cluster
from flops.wire.rest import ControlStatus

TOKEN = "s3cret-token"


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    exit_code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        envelope = json.loads(self.out)
        assert envelope["schema_version"] == 1
        assert set(envelope) == {"schema_version", "data"}
        return envelope["data"]

    @property
    def error(self) -> Any:
        envelope = json.loads(self.out)
        assert set(envelope) == {"schema_version", "error"}
        return envelope["error"]


class Manager:
    """A served manager that can go away and come back on the same port."""

    def __init__(
        self, cluster: PlayedCluster, tls: ssl.SSLContext | None = None, authority: str = ""
    ) -> None:
        self.cluster = cluster
        self.tls = tls
        self.authority = authority
        self.port = 0
        self.images: RegisteredImages | None = None
        self.start()

    def start(self) -> None:
        app = build_app(
            self.cluster.engine,
            token=TOKEN,
            status=self.status,
            blobs=self.cluster.blobs,
            images=self.cluster.shelf(self.images),
            clusters=OneCluster(),
            authority=self.authority,
        )
        self._server = HttpServer(app, "127.0.0.1", self.port, tls=self.tls)
        self._server.start()
        self.port = self._server.port

    def stop(self) -> None:
        self._server.close()

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}"

    def status(self) -> ControlStatus:
        return ControlStatus(
            version="0",
            manager_url=self.url,
            manager_host="127.0.0.1",
            cluster_address="127.0.0.1:10100",
            tracking_url="http://mlflow.example",
            is_tracking_ready=False,
            tracking_detail="not ready yet",
            home="/h",
            started_at_s=1.0,
            nodes_connected=2,
            nodes_total=2,
            projects_active=0,
            projects_total=0,
        )


Flops = Callable[..., Outcome]


@pytest.fixture
def manager() -> Iterator[Manager]:
    with played_cluster() as cluster:
        manager = Manager(cluster)
        yield manager
        cluster.engine.close()
        manager.stop()


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Flops:
    """Runs `flops` with a home of its own, and without a manager."""
    monkeypatch.setenv("FLOPS_HOME", str(tmp_path / "home"))
    for name in ("FLOPS_URL", "FLOPS_TOKEN_FILE", "FLOPS_AUTHORITY_FILE", "FLOPS_INSECURE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        exit_code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(exit_code, captured.out, captured.err)

    return run


@pytest.fixture
def flops(manager: Manager, command: Flops, tmp_path: Path) -> Flops:
    """Runs `flops` against the manager."""
    token_file = tmp_path / "token"
    token_file.write_text(f"{TOKEN}\n")
    url = f"http://127.0.0.1:{manager.port}"
    return lambda *arguments: command("--url", url, "--token-file", token_file, *arguments)
