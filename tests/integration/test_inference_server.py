"""The inference server answers as MLflow's own scoring code does, and lives as a service does."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from mlflow.pyfunc import scoring_server
from sklearn.linear_model import LinearRegression, LogisticRegression

from flops.actor import ActorContext
from flops.errors import CATALOGUE, ErrorCode, FlopsError
from flops.serving.app import BODY_BYTES_MOST, Model, StatusError, application, listen, take_over
from flops.testing.hammer import Hammer
from flops.testing.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

JSON = "application/json"
ROWS = np.array([[0.0, 1, 2, 3], [4.0, 0, 1, 2], [1.0, 5, 2, 0], [9.0, 9, 8, 7]])


def save(model: Any, rows: Any, folder: Path, *, has_signature: bool = True) -> Path:
    mlflow.sklearn.save_model(
        model,
        folder,
        signature=infer_signature(rows, model.predict(rows)) if has_signature else None,
        pip_requirements=["scikit-learn"],
        serialization_format="skops",
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    frame = pd.DataFrame(ROWS, columns=list("abcd"))
    numbers = LogisticRegression().fit(ROWS, [0, 1, 2, 1])
    texts = LogisticRegression().fit(ROWS, ["no", "yes", "no", "grün"])
    floats = LinearRegression().fit(ROWS.astype(np.float32), np.array([0.1, 2.5, 3.3, 1.7], dtype=np.float32))
    return {
        "numbers": save(numbers, ROWS, folder / "numbers"),
        "texts": save(texts, ROWS, folder / "texts"),
        "floats": save(floats, ROWS.astype(np.float32), folder / "floats"),
        "columns": save(LinearRegression().fit(frame, [1.0, 2, 3, 4]), frame, folder / "columns"),
        "unsigned": save(numbers, ROWS, folder / "unsigned", has_signature=False),
    }


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    return {name: Model(folder) for name, folder in folders.items()}


def answer_of(model: Model, body: bytes, content_type: str) -> tuple[int, Any]:
    """Status and predictions; None instead of them for an error."""
    try:
        return 200, json.loads(model.answer(body, content_type))["predictions"]
    except StatusError as exc:
        return int(exc.status), None


def answer_of_mlflow(model: Model, body: bytes, content_type: str) -> tuple[int, Any]:
    try:
        result = scoring_server.invocations(
            body, content_type, model.pyfunc, model.pyfunc.metadata.get_input_schema()
        )
    except MlflowException as exc:
        return exc.get_http_status_code(), None
    return result.status, json.loads(result.response)["predictions"] if result.status == 200 else None


BODIES = [
    {"inputs": ROWS.tolist()},
    {"instances": ROWS.tolist()},
    {"inputs": [[1, 2, 3, 4]]},
    {"inputs": [[1, 2.5, 3, -4]]},
    {"inputs": [[1, 2, 3]]},
    {"inputs": [[1, 2, 3], [1]]},
    {"inputs": [1, 2, 3, 4]},
    {"inputs": [[True, False, True, True]]},
    {"inputs": [["1", "2", "3", "4"]]},
    {"inputs": [["a", "b", "c", "d"]]},
    {"inputs": [[1, None, 2, 3]]},
    {"inputs": []},
    {"inputs": [[]]},
    {"inputs": {"a": [1.0], "b": [1.0], "c": [1.0], "d": [1.0]}},
    {"inputs": [[1, 2, 3, 4]], "params": {}},
    {"inputs": [[1, 2, 3, 4]], "instances": [[1, 2, 3, 4]]},
    {"dataframe_split": {"columns": list("abcd"), "data": ROWS.tolist()}},
    {"dataframe_split": {"columns": list("dcba"), "data": [[4.0, 3, 2, 1]]}},
    {"dataframe_split": {"columns": list("abc"), "data": [[1.0, 2, 3]]}},
    {"dataframe_split": {"data": ROWS.tolist()}},
    {"dataframe_split": [[1]]},
    {"dataframe_records": [{"a": 1.5, "b": 2.0, "c": 3.0, "d": 4.0}]},
    {"dataframe_records": [{"a": 1.5, "b": 2.0, "c": 3.0, "x": 4.0}]},
    {"dataframe_records": []},
    {},
    [],
    "text",
    7,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: json.dumps(body)[:60])
@pytest.mark.parametrize("name", ["numbers", "texts", "floats", "columns", "unsigned"])
def test_json_is_answered_as_mlflow_does(models: dict[str, Model], name: str, body: Any) -> None:
    content = json.dumps(body).encode()
    expected = answer_of_mlflow(models[name], content, JSON)
    assert answer_of(models[name], content, JSON) == expected
    assert answer_of(models[name], content, "application/json; charset=utf-8") == expected


@pytest.mark.parametrize(
    "content_type", ["image/png", "", "application/json; charset=latin-1", "text/csv; x=y"]
)
@pytest.mark.parametrize("name", ["numbers", "columns"])
def test_other_content_is_refused_as_mlflow_does(
    models: dict[str, Model], name: str, content_type: str
) -> None:
    assert answer_of(models[name], b"a,b,c,d\n1,2,3,4\n", content_type) == (415, None)
    assert answer_of_mlflow(models[name], b"", content_type) == (415, None)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"inputs": [[1e999, 0, 0, 0]]}'])
def test_broken_json_is_refused_as_mlflow_does(models: dict[str, Model], body: bytes) -> None:
    assert answer_of(models["numbers"], body, JSON) == answer_of_mlflow(models["numbers"], body, JSON)


def test_csv_is_taken_by_models_with_and_without_columns(models: dict[str, Model]) -> None:
    csv = b"a,b,c,d\n0,1,2,3\n4,0,1,2\n"
    assert answer_of(models["columns"], csv, "text/csv") == answer_of_mlflow(
        models["columns"], csv, "text/csv"
    )
    rows = json.dumps({"inputs": [[0, 1, 2, 3], [4, 0, 1, 2]]}).encode()
    assert answer_of(models["numbers"], csv, "text/csv") == answer_of(models["numbers"], rows, JSON)
    for broken in (b"", b"a,b\n1,2\n", b"a,b,c,d\n1,2,x,4\n", b'a,b\n"'):
        assert answer_of(models["numbers"], broken, "text/csv") == (400, None)


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        ("numbers", {"inputs": [[1, 2, 3]]}, ["(1, 3)", "rows of 4 numbers (float64)"]),
        ("numbers", {"inputs": [["a", "b", "c", "d"]]}, ["'a'", "rows of 4 numbers"]),
        ("columns", {"dataframe_records": [{"a": 1.0}]}, ["'b', 'c', 'd'", "'a': double"]),
        ("unsigned", {"inputs": [[1, 2, 3]]}, ["3 features", "without a signature"]),
        ("numbers", {}, ["exactly one of the input fields", "rows of 4 numbers"]),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_is_expected(
    models: dict[str, Model], name: str, body: Any, expected: list[str]
) -> None:
    with pytest.raises(FlopsError) as caught:
        models[name].answer(json.dumps(body).encode(), JSON)
    for part in expected:
        assert part in caught.value.message
    assert "IMPORTANT" not in caught.value.message
    assert "\n" not in caught.value.message


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(FlopsError) as caught:
        Model(tmp_path)
    assert caught.value.code is ErrorCode.MODEL_UNLOADABLE


def context_of(folder: Path, model: Path, port: int, **more: Any) -> ActorContext:
    config = {"project_id": "p", "model_name": "digits", "model_version": "3", "port": port, **more}
    return ActorContext("inference-p", "p", "edge-1", str(folder), repo_dir=str(model), config=config)


def test_every_error_has_our_shape(models: dict[str, Model], tmp_path: Path) -> None:
    app = application(models["numbers"], context_of(tmp_path, tmp_path, 0), lambda: None)

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://model") as client:
            return [
                await client.get("/nowhere"),
                await client.get("/invocations"),
                await client.post("/invocations", content=b"x" * (BODY_BYTES_MOST + 1)),
                await client.post("/invocations", json={"inputs": [[1]]}),
                await client.post("/invocations", content=b"x", headers={"content-type": "image/png"}),
            ]

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [404, 405, 413, 400, 415]
    codes = [answer.json()["code"] for answer in answers]
    assert codes == ["not_found", "usage", "input_invalid", "input_invalid", "input_invalid"]
    for answer in answers:
        assert answer.json().keys() == {"code", "message", "hint", "details"}


def test_a_taken_port_is_replaced_by_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with listen("127.0.0.1", port) as listener:
            assert listener.getsockname()[1] != port
    with listen("127.0.0.1", port) as listener:
        assert listener.getsockname()[1] == port
    with pytest.raises(FlopsError) as caught:
        listen("192.0.2.1", port)
    assert caught.value.code is ErrorCode.CONFIG_INVALID


def test_a_fixed_port_is_shared_with_its_like_and_with_nothing_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(FlopsError, match=f"Port {port}") as caught:
            listen("127.0.0.1", port, is_fixed=True)
        assert caught.value.code is ErrorCode.PORT_OCCUPIED
    with listen("127.0.0.1", port, is_fixed=True), listen("127.0.0.1", port) as elsewhere:
        assert elsewhere.getsockname()[1] != port
    with listen("127.0.0.1", port, is_fixed=True), listen("127.0.0.1", port, is_fixed=True) as second:
        assert second.getsockname()[1] == port
    with pytest.raises(FlopsError) as caught:
        listen("192.0.2.1", port, is_fixed=True)
    assert caught.value.code is ErrorCode.CONFIG_INVALID


def test_new_connections_come_to_the_one_that_takes_over_and_to_whoever_is_left() -> None:
    def connect(port: int) -> list[socket.socket]:
        return [socket.create_connection(("127.0.0.1", port)) for _ in range(32)]

    def accepted(listener: socket.socket) -> int:
        listener.setblocking(False)
        count = 0
        with suppress(BlockingIOError):
            while True:
                listener.accept()[0].close()
                count += 1
        return count

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with listen("127.0.0.1", port, is_fixed=True) as first:
        take_over(first)
        clients = connect(port)
        assert accepted(first) == 32
        with listen("127.0.0.1", port, is_fixed=True) as second:
            take_over(second)
            clients += connect(port)
            assert (accepted(first), accepted(second)) == (0, 32)
            first.close()
            clients += connect(port)
            assert accepted(second) == 32
    for client in clients:
        client.close()


class Service:
    """The server as a process, as a node starts it."""

    def __init__(self, folder: Path, model: Path, port: int = 0, **config: Any) -> None:
        with socket.create_server(("127.0.0.1", port)) if port == 0 else nullcontext() as other:
            self.port = other.getsockname()[1] if other is not None else port
        self.events_file = folder / "events.jsonl"
        context = context_of(folder, model, self.port, **config).save()
        self.process = subprocess.Popen([sys.executable, "-m", "flops.serving.app", str(context)])

    def wait_for(self, kind: str) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while True:
            lines = self.events_file.read_text().splitlines() if self.events_file.exists() else []
            for event in map(json.loads, lines):
                if event["kind"] == kind:
                    return dict(event)
            assert time.monotonic() < deadline, lines
            threading.Event().wait(0.02)


@pytest.fixture
def service(tmp_path: Path, folders: dict[str, Path]) -> Iterator[Service]:
    service = Service(tmp_path, folders["numbers"])
    yield service
    service.process.kill()
    service.process.wait()


def test_the_service_tells_its_address_answers_and_ends_in_peace(
    service: Service, models: dict[str, Model]
) -> None:
    address = service.wait_for("listening")["address"]
    assert address == f"127.0.0.1:{service.port}"
    with httpx.Client(base_url=f"http://{address}") as client:
        assert [client.get(path).status_code for path in ("/ping", "/health")] == [200, 200]
        assert client.get("/version").text == mlflow.__version__
        described = client.get("/").json()
        assert described["model"] == {"name": "digits", "version": "3"}
        assert described["project_id"] == "p"
        assert "rows of 4 numbers" in described["expected"]
        body = {"inputs": ROWS.tolist()}
        answer = client.post("/invocations", json=body)
        assert answer.headers["content-type"] == "application/json"
        expected = answer_of_mlflow(models["numbers"], json.dumps(body).encode(), JSON)
        assert (answer.status_code, answer.json()["predictions"]) == expected
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(20) == 0


@pytest.fixture
def shared_service(tmp_path: Path, folders: dict[str, Path]) -> Iterator[Service]:
    """A service whose port another one may take over."""
    service = Service(tmp_path, folders["numbers"], is_port_fixed=True)
    yield service
    service.process.kill()
    service.process.wait()


def test_a_service_that_is_told_to_end_goes_on_for_a_moment_and_lets_its_clients_go(
    shared_service: Service,
) -> None:
    url = f"http://{shared_service.wait_for('listening')['address']}/ping"
    with httpx.Client(trust_env=False) as client:
        assert client.get(url).headers.get("connection") != "close"
        shared_service.process.send_signal(signal.SIGTERM)
        until(
            lambda: client.get(url).headers.get("connection") == "close", "an answer that ends a connection"
        )
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            assert client.get(url).status_code == 200
    assert shared_service.process.wait(20) == 0


@pytest.mark.timeout(300)
def test_one_service_takes_over_from_another_and_no_request_is_refused(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    first = Service(tmp_path, folders["numbers"], model_version="1", is_port_fixed=True)
    services = [first]
    address = first.wait_for("listening")["address"]
    assert address == f"127.0.0.1:{first.port}"
    hammer = Hammer(f"http://{address}")
    try:
        for version in ("2", "3"):
            folder = tmp_path / version
            folder.mkdir()
            config = {"model_version": version, "is_port_fixed": True}
            services.append(Service(folder, folders["numbers"], first.port, **config))
            assert services[-1].wait_for("listening")["address"] == address
            services[-2].process.send_signal(signal.SIGTERM)
            assert services[-2].process.wait(20) == 0
            hammer.wait_for_only(version)
    finally:
        hammer.stop()
        for service in services:
            service.process.kill()
            service.process.wait()
    assert hammer.failures == []
    assert set(hammer.versions) == {"1", "2", "3"}


def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    service = Service(tmp_path, tmp_path)
    assert service.process.wait(60) == CATALOGUE[ErrorCode.MODEL_UNLOADABLE].exit_code
    assert service.wait_for("failed")["error"]["code"] == "model_unloadable"
