"""MLflow on the manager's port: who gets to it, and that nothing is changed or held on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flops.adapters.http_server import HttpServer
from flops.manager.app import build_app
from flops.manager.tracking_door import TrackingDoor
from flops.testing.one_cluster import OneCluster
from flops.testing.projects import played_cluster
from flops.wiring.tracking_proxy import with_tracking

TOKEN = "s3cret-token"
LARGE = 96 * 1024**2
PIECE = bytes(1024**2)


async def tell(request: Request) -> Response:
    """Stands where MLflow is: tells what has arrived."""
    body = hashlib.sha256()
    async for piece in request.stream():
        body.update(piece)
    headers = {name: value for name, value in request.headers.items() if name not in {"accept", "user-agent"}}
    told = {"path": request.scope["raw_path"].decode(), "query": request.url.query, "headers": headers}
    return JSONResponse({**told, "method": request.method, "body": body.hexdigest()}, 201, {"x-said": "yes"})


async def send_much(_request: Request) -> Response:
    async def pieces() -> Any:
        for _ in range(LARGE // len(PIECE)):
            yield PIECE

    return StreamingResponse(pieces())


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """URL of a manager with a server where MLflow is."""
    methods = ["GET", "POST", "PUT", "DELETE", "PATCH"]
    routes = [Route("/much", send_much), Route("/{path:path}", tell, methods=methods)]
    behind = HttpServer(Starlette(routes=routes), "127.0.0.1", 0)
    behind.start()
    with played_cluster() as cluster:
        api = build_app(
            cluster.engine,
            token=TOKEN,
            status=lambda: pytest.fail("not asked for"),
            blobs=cluster.blobs,
            images=cluster.shelf(),
            clusters=OneCluster(),
        )
        join = with_tracking(api, f"http://127.0.0.1:{behind.port}", lambda a, t: TrackingDoor(a, t, TOKEN))
        manager = HttpServer(join, "127.0.0.1", 0)
        manager.start()
        yield f"http://127.0.0.1:{manager.port}"
        cluster.engine.close()
        manager.close()
    behind.close()


@pytest.fixture
def client(served: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served, trust_env=False, timeout=30) as client:
        yield client


BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "shown",
    [{"headers": BEARER}, {"auth": ("anybody", TOKEN)}, {"headers": {"authorization": f"bearer  {TOKEN}"}}],
)
def test_the_token_opens_it_as_bearer_and_as_password(client: httpx.Client, shown: dict[str, Any]) -> None:
    assert client.get("/mlflow/x", **shown).status_code == 201


@pytest.mark.parametrize(
    "shown",
    [
        {},
        {"headers": {"authorization": "Bearer guessed"}},
        {"headers": {"authorization": "Bearer"}},
        {"headers": {"authorization": "Basic !"}},
        {"headers": {"authorization": b"Bearer \xff\xfe"}},
        {"auth": (TOKEN, "")},
        {"auth": ("anybody", "guessed")},
    ],
)
@pytest.mark.parametrize("path", ["/mlflow", "/mlflow/", "/mlflow/api/2.0/mlflow/runs/create", "/mlflow%2Fx"])
def test_nobody_gets_in_without_it(client: httpx.Client, shown: dict[str, Any], path: str) -> None:
    answer = client.post(path, json={}, **shown)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")
    assert answer.json()["code"] == "unauthenticated"
    assert "x-said" not in answer.headers


def test_the_password_of_a_browser_opens_mlflow_and_nothing_else(client: httpx.Client) -> None:
    assert client.get("/api/flops/projects", auth=("anybody", TOKEN)).status_code == 401
    assert client.get("/api/flops/projects", headers=BEARER).status_code == 200
    assert client.get("/mlflowx", headers=BEARER).status_code == 404


def test_the_gui_is_found_without_a_slash(client: httpx.Client) -> None:
    answer = client.get("/mlflow", headers=BEARER)
    assert answer.status_code == 307
    assert answer.headers["location"].endswith("/mlflow/")


def test_a_request_arrives_as_it_was_sent_but_for_who_sent_it(client: httpx.Client) -> None:
    headers = {**BEARER, "cookie": "a=b", "x-mine": "1", "content-type": "application/x-mine"}
    answer = client.put("/mlflow/a%20b%2Fc/d?q=%2B&e=", content=b"12", headers=headers)
    told = answer.json()
    assert (answer.status_code, answer.headers["x-said"]) == (201, "yes")
    assert (told["path"], told["query"], told["method"]) == ("/a%20b%2Fc/d", "q=%2B&e=", "PUT")
    assert told["body"] == hashlib.sha256(b"12").hexdigest()
    arrived = told["headers"]
    assert (arrived["x-mine"], arrived["content-type"]) == ("1", "application/x-mine")
    assert arrived["content-length"] == "2"
    assert arrived["host"].startswith("127.0.0.1:")
    assert not {"authorization", "cookie", "origin"} & arrived.keys()


@pytest.mark.parametrize("path", ["/mlflow%2F@192.0.2.1/x", "/mlflow/@192.0.2.1/", "/mlflow//192.0.2.1/x"])
def test_no_path_leads_to_another_server(client: httpx.Client, path: str) -> None:
    answer = client.get(path, headers=BEARER)
    assert answer.status_code == 201  # of the server behind


def test_a_foreign_web_page_changes_nothing(client: httpx.Client, served: str) -> None:
    foreign, own = {"origin": "https://evil.example"}, {"origin": served}
    shown = ("anybody", TOKEN)  # as a browser sends it that has logged in
    refused = client.post("/mlflow/api", json={}, headers=foreign, auth=shown)
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert client.post("/mlflow/api", json={}, headers={"origin": "null"}, auth=shown).status_code == 403
    assert client.post("/mlflow/api", json={}, headers=own, auth=shown).status_code == 201
    assert client.get("/mlflow/api", headers=foreign, auth=shown).status_code == 201  # a link


def test_artifacts_are_streamed_both_ways(client: httpx.Client) -> None:
    own = psutil.Process()
    before = own.memory_info().rss
    most, seen = 0, 0
    with client.stream("GET", "/mlflow/much", headers=BEARER) as answer:
        for piece in answer.iter_bytes(1024**2):
            seen += len(piece)
            most = max(most, own.memory_info().rss)
    assert seen == LARGE

    def pieces() -> Iterator[bytes]:
        nonlocal most
        for _ in range(LARGE // len(PIECE)):
            yield PIECE
            most = max(most, own.memory_info().rss)

    told = client.put("/mlflow/much-up", content=pieces(), headers=BEARER).json()
    assert told["body"] == hashlib.sha256(bytes(LARGE)).hexdigest()
    assert most - before < LARGE / 2  # client, proxy and server are this process


def test_a_server_that_is_away_is_told(served: str) -> None:
    app = with_tracking(Starlette(), "http://127.0.0.1:9", lambda a, t: TrackingDoor(a, t, TOKEN))
    manager = HttpServer(app, "127.0.0.1", 0)
    manager.start()
    try:
        answer = httpx.get(f"http://127.0.0.1:{manager.port}/mlflow/x", headers=BEARER, trust_env=False)
    finally:
        manager.close()
    assert (answer.status_code, answer.json()["code"]) == (503, "unreachable")
    assert "MLflow" in answer.json()["message"]
