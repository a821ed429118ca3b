"""Measures the inference server: requests per second and latency, against MLflow's own server.

Run from the root of the repository: ``.venv/bin/python benchmarks/inference.py``, or ``make
bench-inference``. One scikit-learn model on 64 numbers is served by FLOps, by ``mlflow models serve`` and
by a bare FastAPI handler that calls the model's ``predict`` on what json gives: nothing that checks and
answers with Python can be much faster. All three are one process, and are asked by the same clients over
connections that they keep; the answers have to be the same. The clients are a process of their own, on
the same machine.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import mlflow
import numpy as np
from harness import Figure, Report, arguments
from mlflow.models import infer_signature
from sklearn.linear_model import LogisticRegression

from flops.actor import ActorContext
from flops.settings import inherited_environment
from flops.testing.waiting import until

WIDTH = 64
CLIENTS = 4
BARE = """
import sys
import mlflow, numpy, uvicorn
from fastapi import FastAPI, Request

model = mlflow.sklearn.load_model(sys.argv[1])
app = FastAPI()

@app.post("/invocations")
async def answer(request: Request):
    body = await request.json()
    return {"predictions": model.predict(numpy.asarray(body["inputs"])).tolist()}

@app.get("/ping")
async def ping():
    return ""

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)
"""


def save_model(folder: Path) -> Path:
    """A classifier of ten classes, saved by MLflow."""
    random = np.random.default_rng(1)
    rows = random.random((500, WIDTH))
    model = LogisticRegression(max_iter=500).fit(rows, random.integers(0, 10, 500))
    signature = infer_signature(rows, model.predict(rows))
    mlflow.sklearn.save_model(
        model, folder, signature=signature, pip_requirements=["scikit-learn"], serialization_format="skops"
    )
    return folder


def flops_command(model: Path, port: int) -> list[str]:
    """What serves a model with FLOps."""
    work_dir = model.with_name("service")
    work_dir.mkdir(exist_ok=True)
    context = ActorContext(
        "inference-p",
        "p",
        "node-1",
        str(work_dir),
        repo_dir=str(model),
        config={"project_id": "p", "model_name": "digits", "model_version": "1", "port": port},
    )
    return [sys.executable, "-m", "flops.serving.app", str(context.save())]


def mlflow_command(model: Path, port: int) -> list[str]:
    """What serves a model with MLflow, in one process."""
    program = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--workers", "1"]
    return [*program, "--model-uri", str(model), "--port", str(port)]


def bare_command(model: Path, port: int) -> list[str]:
    """What serves a model with next to nothing."""
    return [sys.executable, "-c", BARE, str(model), str(port)]


SERVERS = {"flops": flops_command, "mlflow": mlflow_command, "bare": bare_command}


@contextlib.contextmanager
def serving(argv: Sequence[str], port: int) -> Iterator[int]:
    """A server, for as long as the block runs; gives its port."""
    quiet = subprocess.DEVNULL
    env = inherited_environment()
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # MLflow looks for uvicorn there
    with subprocess.Popen(argv, env=env, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        try:
            until(partial(_is_up, port), timeout_s=120)
            yield port
        finally:
            # The session, not the process: MLflow's command starts its server as a child.
            os.killpg(process.pid, signal.SIGKILL)


def _is_up(port: int) -> bool:
    with contextlib.suppress(OSError):
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/ping")
        status = connection.getresponse().status
        connection.close()
        return status == HTTPStatus.OK
    return False


def ask(port: int, body: bytes, duration_s: float) -> tuple[list[float], list[int]]:
    """Ask from several connections for a while; returns the latencies in seconds, and one answer."""
    latencies: list[float] = []
    answers: list[list[int]] = []
    end_s = time.monotonic() + duration_s

    def client() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        while True:
            started_s = time.perf_counter()
            connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
            raw = connection.getresponse().read()
            latencies.append(time.perf_counter() - started_s)
            if time.monotonic() > end_s:
                answers.append(json.loads(raw)["predictions"])
                connection.close()
                return

    threads = [Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, answers[0]


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    batches, runs, duration_s = ((1, 100), 1, 0.3) if options.smoke else ((1, 100, 1_000), 5, 3.0)
    report = Report(
        "inference", ("rows", *(f"{name}: requests/s, p50, p99 in ms" for name in SERVERS), "FLOps / MLflow")
    )
    random = np.random.default_rng(2)
    with (
        tempfile.TemporaryDirectory(prefix="flops-bench-") as folder,
        contextlib.ExitStack() as stack,
        multiprocessing.get_context("spawn").Pool(1) as clients,
    ):
        model = save_model(Path(folder) / "model")
        ports = {}
        for name, command in SERVERS.items():
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = int(free.getsockname()[1])
            ports[name] = stack.enter_context(serving(command(model, port), port))
        for rows in batches:
            body = json.dumps({"inputs": random.random((rows, WIDTH)).tolist()}).encode()
            rates: dict[str, list[float]] = {name: [] for name in SERVERS}
            latencies: dict[str, list[float]] = {name: [] for name in SERVERS}
            answers = {}
            for _ in range(runs):
                for name, port in ports.items():
                    found, answers[name] = clients.apply(ask, (port, body, duration_s))
                    rates[name].append(CLIENTS / statistics.mean(found))
                    latencies[name] += found
            if len({json.dumps(answer) for answer in answers.values()}) != 1:
                raise SystemExit(f"The servers answer differently to {rows} rows.")
            add_row(report, rows, rates, latencies)
    report.print()


def add_row(
    report: Report, rows: int, rates: dict[str, list[float]], latencies: dict[str, list[float]]
) -> None:
    """Add what was measured with requests of so many rows."""
    figures = {f"{name}_per_s": Figure.of(values) for name, values in rates.items()}
    cells, tails = [], {}
    for name, values in latencies.items():
        p50, p99 = (1_000 * float(np.percentile(values, share)) for share in (50, 99))
        tails |= {f"{name}_p50_ms": p50, f"{name}_p99_ms": p99}
        cells.append(f"{figures[f'{name}_per_s'].text()}, {p50:.1f}, {p99:.1f}")
    ratio = figures["flops_per_s"].median / figures["mlflow_per_s"].median
    report.add([f"{rows:,}", *cells, f"{ratio:.1f}"], request_rows=rows, **figures, **tails)


if __name__ == "__main__":
    main()
