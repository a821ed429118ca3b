"""Seconds of a round of Flower's deployment engine: ``LEARNERS PARAMETERS ROUNDS``, told as JSON."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

APP = Path(__file__).parent / "flower_app"
BIN = Path(sys.executable).parent
PATIENCE_S = 900.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in sockets]


@contextlib.contextmanager
def running(argv: Sequence[str], env: dict[str, str], log: Path) -> Iterator[None]:
    """A process, for as long as the block runs."""
    with log.open("ab") as output, subprocess.Popen(argv, env=env, stdout=output, stderr=output) as process:
        try:
            yield
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def main(learners: int, size: int, rounds: int) -> None:
    """Start a SuperLink and SuperNodes, run the app, and print what it told."""
    with tempfile.TemporaryDirectory(prefix="bench-flower-") as folder, contextlib.ExitStack() as stack:
        home = Path(folder)
        told = home / "told.json"
        port, *node_ports = free_ports(1 + learners)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "bench"\n'
            f'[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        environ = dict(os.environ)  # noqa: TID251 (no part of FLOps)
        env = {
            **environ,
            "FLWR_HOME": folder,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{BIN}:{environ['PATH']}",
        }
        log = home / "log"
        link = [str(BIN / "flower-superlink"), "--insecure", f"--port={port}"]
        stack.enter_context(running(link, env, log))
        await_port(port, log)
        for own in node_ports:
            node = [
                str(BIN / "flower-supernode"),
                "--insecure",
                f"--superlink=127.0.0.1:{port}",
                f"--port={own}",
            ]
            stack.enter_context(running(node, env, log))
        config = f'learners={learners} size={size} rounds={rounds} told="{told}"'
        subprocess.run(
            [str(BIN / "flwr"), "run", str(APP), "bench", "--run-config", config],
            env=env, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline_s = time.monotonic() + PATIENCE_S
        while not told.exists() or not told.read_text():
            if time.monotonic() > deadline_s:
                raise SystemExit(f"The run has not ended:\n{log.read_text()[-3_000:]}")
            time.sleep(0.2)
        print(told.read_text())


def await_port(port: int, log: Path) -> None:
    """Wait until somebody listens."""
    deadline_s = time.monotonic() + 60.0
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.1)
    raise SystemExit(f"Nobody listens on port {port}:\n{log.read_text()[-3_000:]}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:4]))
