"""An ML data server as a process, as a node's daemon starts it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from flops.adapters.certificates import FileAuthority
from flops.data import DataClient
from flops.testing.waiting import until
from flops.wire.flight import IDENTITY_FILE, data_server_name
from flops.wire.server_trust import ServerTrust, with_trust

DEADLINE_S = 20.0


class ServerProcess:
    """A data server in a folder.

    Args:
        folder: of its data and its endpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trust: ServerTrust | None = None  # what it is known by, once it has been given a certificate
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it, and wait until it can be found."""
        (self.folder / "endpoint.json").unlink(missing_ok=True)
        argv = [sys.executable, "-m", "flops.wiring", "data-server", "--dir", str(self.folder), "--port", "0"]
        if self.trust is not None:
            argv += ["--identity", str(self.folder / IDENTITY_FILE)]
        self.process = subprocess.Popen([*argv, *options], stderr=subprocess.DEVNULL)
        until((self.folder / "endpoint.json").exists, timeout_s=DEADLINE_S)

    def encrypt(self, authority: FileAuthority, now_s: float, *, node_id: str = "n1") -> None:
        """Give it a certificate as the node of an encrypting cluster has it; before `start`."""
        name = data_server_name(node_id)
        authority.keep_server_identity(self.folder / IDENTITY_FILE, name, now_s, 3_600.0)
        self.trust = ServerTrust(name, authority.pem)

    @property
    def pid(self) -> int:
        """Its process id, as it tells it."""
        return int(json.loads((self.folder / "endpoint.json").read_text())["pid"])

    @property
    def address(self) -> str:
        """Where it listens."""
        endpoint = json.loads((self.folder / "endpoint.json").read_text())
        return f"{endpoint['host']}:{endpoint['port']}"

    @property
    def token(self) -> str:
        """Its own token, which may do everything, with what it is known by."""
        return with_trust((self.folder / "token").read_text().strip(), self.trust)

    def client(self, token: str | None = None) -> DataClient:
        """A client with a token, its own if none is given."""
        return DataClient(self.address, token or self.token)

    def files(self) -> list[str]:
        """Names of all that is stored, and of what comes in."""
        return [path.name for path in self.folder.glob("*/*") if path.parent.name == "incoming"] + [
            path.name for path in self.folder.glob("tags/*/*")
        ]

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; returns its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """Kill it if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGKILL)
