"""The REST API over a real server, on a cluster that the test plays."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from flops.adapters.http_server import HttpServer
from flops.adapters.memory_store import MemoryProjectStore
from flops.core.cluster import ServiceState
from flops.core.ids import ProjectId, ServiceId
from flops.core.output import Output
from flops.core.project import Stage
from flops.errors import CATALOGUE, ErrorCode
from flops.manager.app import build_app
from flops.testing.one_cluster import OneCluster
from flops.testing.projects import PlayedCluster, played_cluster, raw_sla
from flops.testing.waiting import until
from flops.wire.rest import ControlStatus, ErrorBody

TOKEN = "s3cret-token"
API = "/api/flops"
ENDPOINTS = [
    ("GET", f"{API}/status"),
    ("POST", f"{API}/projects"),
    ("POST", f"{API}/projects/plan"),
    ("GET", f"{API}/projects"),
    ("GET", f"{API}/projects/nothing"),
    ("GET", f"{API}/projects/nothing/events"),
    ("GET", f"{API}/projects/nothing/logs"),
    ("POST", f"{API}/projects/nothing/stop"),
    ("DELETE", f"{API}/projects/nothing"),
    ("GET", f"{API}/images"),
    ("POST", f"{API}/images/prune"),
    ("POST", f"{API}/invitations"),
    ("GET", f"{API}/clusters"),
    ("POST", f"{API}/clusters/{{name}}/invitation"),
    ("DELETE", f"{API}/clusters/{{name}}"),
    ("POST", f"{API}/mocks"),
    ("GET", f"{API}/mocks"),
    ("GET", f"{API}/nodes"),
    ("DELETE", f"{API}/nodes/nothing"),
    ("GET", f"{API}/services"),
    ("GET", f"{API}/models"),
    ("GET", f"{API}/models/nothing/deployment"),
    ("POST", f"{API}/models/nothing/deployment"),
    ("POST", f"{API}/models/nothing/deployment/rollback"),
    ("DELETE", f"{API}/models/nothing/deployment"),
    ("GET", f"{API}/tracking"),
    ("DELETE", f"{API}/database"),
    ("DELETE", f"{API}/registry"),
    ("POST", f"{API}/blobs"),
]


def _status() -> ControlStatus:
    return ControlStatus(
        version="0",
        manager_url="http://m",
        cluster_address="127.0.0.1:10100",
        tracking_url="http://mlflow.example",
        is_tracking_ready=True,
        home="/h",
        started_at_s=1.0,
        nodes_connected=2,
        nodes_total=2,
        projects_active=0,
        projects_total=0,
    )


class _BrokenStore(MemoryProjectStore):
    def all(self) -> list[Any]:
        raise RuntimeError("a secret inside")


class Api:
    """A served manager, and a client with the token."""

    def __init__(self, cluster: PlayedCluster) -> None:
        self.cluster = cluster
        app = build_app(
            cluster.engine,
            token=TOKEN,
            status=_status,
            blobs=cluster.blobs,
            images=cluster.shelf(),
            clusters=OneCluster(),
        )
        self.server = HttpServer(app, "127.0.0.1", 0)
        self.server.start()
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.client = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20, trust_env=False
        )

    def close(self) -> None:
        self.client.close()
        self.cluster.engine.close()
        self.server.close()

    def create(self, **training: Any) -> ProjectId:
        answer = self.client.post(f"{API}/projects", json=raw_sla(**training))
        assert answer.status_code == 200, answer.text
        return ProjectId(answer.json()["project_id"])

    def complete(self) -> ProjectId:
        project_id = self.create()
        self.cluster.play_to_the_end(project_id)
        self.cluster.wait(project_id, lambda p: p.stage is Stage.COMPLETED and len(p.services) == 1)
        return project_id


@pytest.fixture
def api() -> Iterator[Api]:
    with played_cluster() as cluster:
        served = Api(cluster)
        try:
            yield served
        finally:
            served.close()


def assert_error(answer: httpx.Response, code: ErrorCode, *, status: int | None = None) -> ErrorBody:
    body = ErrorBody.model_validate_json(answer.text)
    assert (body.code, answer.status_code) == (code.value, status or CATALOGUE[code].http_status), answer.text
    assert set(answer.json()) == {"code", "message", "hint", "details", "request_id"}
    assert body.request_id == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return body


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]


def test_the_root_says_ok_without_a_token(api: Api) -> None:
    answer = httpx.get(f"{api.url}/", trust_env=False)
    assert (answer.status_code, answer.json()) == (200, {"message": "ok"})


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}])
def test_every_endpoint_needs_the_token(api: Api, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=api.url, trust_env=False, headers=headers) as client:
        for method, path in ENDPOINTS:
            answer = client.request(method, path, content=b"{")
            assert_error(answer, ErrorCode.UNAUTHENTICATED)
            assert answer.headers["www-authenticate"] == "Bearer"


def test_every_endpoint_is_served_with_a_trailing_slash_too(api: Api) -> None:
    for method, path in ENDPOINTS:
        plain, slashed = (api.client.request(method, p) for p in (path, f"{path}/"))
        assert plain.status_code == slashed.status_code
        assert plain.json().get("code") == slashed.json().get("code")
        assert "location" not in slashed.headers


def test_the_endpoints_are_those_of_the_description(api: Api) -> None:
    for path in ("/openapi.json", "/openapi/openapi.json"):
        document = httpx.get(f"{api.url}{path}", trust_env=False).json()
        described = {
            (method.upper(), route)
            for route, operations in document["paths"].items()
            for method in operations
        }
        assert described == {("GET", "/"), ("GET", f"{API}/authority")} | {
            (method, path.replace("nothing", "{project_id}" if "projects" in path else "{name}"))
            for method, path in ENDPOINTS
        }
    schemas = document["components"]["schemas"]
    assert {"ProjectSla", "MockDataSla", "Project", "ErrorBody", "TrainingConfiguration"} <= set(schemas)
    references = set(json.dumps(document).split('"#/components/schemas/')[1:])
    assert {reference.split('"')[0] for reference in references} <= set(schemas)
    assert document["paths"][f"{API}/projects"]["post"]["security"] == [{"token": []}]
    assert httpx.get(f"{api.url}/docs", trust_env=False).status_code == 200


def test_the_frameworks_own_errors_have_the_one_shape(api: Api) -> None:
    assert_error(api.client.get(f"{API}/nowhere"), ErrorCode.NOT_FOUND)
    answer = api.client.put(f"{API}/projects")
    assert "GET" in assert_error(answer, ErrorCode.USAGE, status=405).message
    assert answer.headers["allow"]
    project_id = api.create()
    answer = api.client.get(f"{API}/projects/{project_id}/events", params={"after": "x"})
    assert "query.after" in assert_error(answer, ErrorCode.USAGE).message
    answer = api.client.get(f"{API}/projects/{project_id}/logs", params={"tail_bytes": 0})
    assert "tail_bytes" in assert_error(answer, ErrorCode.USAGE).message


def test_an_unexpected_exception_shows_a_request_id_and_no_inside() -> None:
    cluster = PlayedCluster(store=_BrokenStore())
    served = Api(cluster)
    try:
        answer = served.client.get(f"{API}/projects", headers={"X-Request-ID": "mine-1"})
        body = assert_error(answer, ErrorCode.INTERNAL)
        assert body.request_id == "mine-1"
        assert "secret inside" not in answer.text
    finally:
        served.close()


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b'{"a": NaN}', b'{"a": 1e999}', b"\xff", b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "nan", "infinite", "bytes", "deep"],
)
@pytest.mark.parametrize("path", ["projects", "mocks"])
def test_a_malformed_body_is_an_error_and_starts_nothing(api: Api, path: str, body: bytes) -> None:
    assert_error(api.client.post(f"{API}/{path}", content=body), ErrorCode.SLA_UNREADABLE)
    assert api.cluster.engine.projects() == []
    assert api.cluster.engine.mock_data() == []


@pytest.mark.parametrize(
    "change",
    [
        {"training_rounds": 0},
        {"data_tags": []},
        {"unknown": 1},
        {"min_fit_clients": 3},
        {"min_clusters": 2},
        {"training_cycles": 0},
    ],
)
def test_an_invalid_sla_starts_nothing(api: Api, change: dict[str, Any]) -> None:
    body = assert_error(api.client.post(f"{API}/projects", json=raw_sla(**change)), ErrorCode.SLA_INVALID)
    assert next(iter(change)) in body.message
    assert api.client.get(f"{API}/projects").json() == {"projects": []}
    assert api.cluster.orchestrator.services() == []


def test_a_project_is_created_shown_and_listed(api: Api) -> None:
    answer = api.client.post(f"{API}/projects/", json=raw_sla())
    project_id = answer.json()["project_id"]
    assert answer.json()["message"] == "New FLOps project started successfully"
    assert len(project_id) == 12
    int(project_id, 16)
    shown = api.client.get(f"{API}/projects/{project_id}").json()
    assert shown["id"] == project_id
    assert shown["sla"]["customerID"] == "Admin"
    assert [p["id"] for p in api.client.get(f"{API}/projects").json()["projects"]] == [project_id]
    assert_error(api.client.get(f"{API}/projects/abc"), ErrorCode.PROJECT_NOT_FOUND)


def test_events_are_streamed_until_the_project_has_ended(api: Api) -> None:
    project_id = api.create()
    player = threading.Thread(target=api.cluster.play_to_the_end, args=(project_id,))
    player.start()
    with api.client.stream("GET", f"{API}/projects/{project_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of(answer)
    player.join()
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    assert events[-1]["kind"] == "project_completed"
    assert [e["data"]["round"] for e in events if e["kind"] == "round_started"] == [1, 2, 3]


def test_a_stream_goes_on_after_the_last_event_seen(api: Api) -> None:
    project_id = api.complete()
    path = f"{API}/projects/{project_id}/events"
    whole = events_of(api.client.get(path))
    assert events_of(api.client.get(path, params={"after": 5})) == whole[5:]
    assert events_of(api.client.get(path, headers={"Last-Event-ID": "7"}, params={"after": 2})) == whole[7:]
    assert events_of(api.client.get(path, params={"after": 10_000})) == []
    lines = api.client.get(path).text.splitlines()
    assert lines[:2] == ["id: 1", "event: submitted"]


def test_a_stream_can_be_read_without_following(api: Api) -> None:
    project_id = api.create()
    api.cluster.wait(project_id, lambda p: p.stage is Stage.BUILDING)
    answer = api.client.get(f"{API}/projects/{project_id}/events", params={"follow": "false"})
    assert [e["kind"] for e in events_of(answer)] == ["submitted", "repository_resolved", "placement_decided"]


def test_a_stream_ends_with_its_project_and_with_the_engine(api: Api) -> None:
    deleted, kept = api.create(), api.create()
    for project_id in (deleted, kept):
        api.cluster.wait(project_id, lambda p: p.stage is Stage.BUILDING)
    for project_id, end in (
        (deleted, lambda: api.client.delete(f"{API}/projects/{deleted}")),
        (kept, api.cluster.engine.close),
    ):
        with api.client.stream("GET", f"{API}/projects/{project_id}/events") as answer:
            lines = answer.iter_lines()
            assert next(lines) == "id: 1"
            end()
            for _ in lines:
                pass


def test_an_unknown_project_has_no_stream(api: Api) -> None:
    assert_error(api.client.get(f"{API}/projects/abc/events"), ErrorCode.PROJECT_NOT_FOUND)


def test_logs_of_a_projects_services(api: Api) -> None:
    project_id = api.create()
    builder = api.cluster.wait_for_service(f"builder-{project_id}")
    api.cluster.orchestrator.logs[builder] = "resolving\ndone\n"
    path = f"{API}/projects/{project_id}/logs"
    (log,) = api.client.get(path).json()["services"]
    assert (log["service_id"], log["node"], log["kind"]) == (builder, "alpha", "builder")
    assert log["text"] == "resolving\ndone\n"
    answer = api.client.get(path, params={"service": builder, "tail_bytes": 5})
    assert answer.json()["services"][0]["text"] == "done\n"
    assert answer.json() == api.client.get(path, params={"service": "builder", "tail_bytes": 5}).json()
    for after in (f"{builder}:10", "10", ["0", f"{builder}:10"]):
        (log,) = api.client.get(path, params={"after": after}).json()["services"]
        assert (log["text"], log["start"], log["end"], log["total"]) == ("done\n", 10, 15, 15)
    assert "'x'" in assert_error(api.client.get(path, params={"after": "x"}), ErrorCode.USAGE).message
    assert_error(api.client.get(path, params={"service": "other"}), ErrorCode.SERVICE_NOT_FOUND)
    node = next(n for n in api.cluster.orchestrator.nodes() if n.name == "alpha")
    api.cluster.orchestrator.leave(node.id)
    assert "alpha" in api.client.get(path).json()["services"][0]["problem"]
    assert_error(api.client.get(path, params={"service": builder}), ErrorCode.NODE_LOST)


def test_logs_of_services_are_fetched_at_once(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    project_id = api.create()
    cluster = api.cluster
    cluster.wait(project_id, lambda p: p.placement is not None)
    cluster.build(project_id)
    cluster.listen(project_id)
    cluster.join_learners(project_id)
    all_at_once = threading.Barrier(2, timeout=20)
    fetch = cluster.orchestrator.service_logs

    def fetch_together(*arguments: Any, **options: Any) -> Output:
        all_at_once.wait()
        return fetch(*arguments, **options)

    monkeypatch.setattr(cluster.orchestrator, "service_logs", fetch_together)
    answer = api.client.get(f"{API}/projects/{project_id}/logs", params={"service": "learner"})
    assert len(answer.json()["services"]) == 2


def test_a_project_is_stopped_and_deleted(api: Api) -> None:
    project_id = api.create()
    api.cluster.wait_for_service(f"builder-{project_id}")
    assert api.client.post(f"{API}/projects/{project_id}/stop").status_code == 200
    api.cluster.wait(project_id, lambda p: p.stage is Stage.STOPPED)
    again = api.client.post(f"{API}/projects/{project_id}/stop")
    assert again.json()["message"].startswith(f"Project {project_id} is stopped.")
    assert api.client.delete(f"{API}/projects/{project_id}").status_code == 200
    until(lambda: api.client.get(f"{API}/projects/{project_id}").status_code == 404)
    assert_error(api.client.get(f"{API}/projects/{project_id}"), ErrorCode.PROJECT_NOT_FOUND)
    assert api.cluster.orchestrator.services() == []
    for method, path in (("POST", "stop"), ("DELETE", "")):
        answer = api.client.request(method, f"{API}/projects/{project_id}/{path}")
        assert_error(answer, ErrorCode.PROJECT_NOT_FOUND)


def test_nodes_services_models_and_tracking(api: Api) -> None:
    project_id = api.complete()
    nodes = api.client.get(f"{API}/nodes").json()["nodes"]
    assert {(n["name"], n["data_tags"][0]["rows"]) for n in nodes} == {("alpha", 100), ("beta", 100)}
    services = api.client.get(f"{API}/services").json()["services"]
    assert len(services) == 5
    assert "learner_token" not in json.dumps(services)
    (model,) = api.client.get(f"{API}/models").json()["models"]
    assert (model["project_id"], model["accuracy"], model["inference_url"]) == (
        project_id,
        0.73,
        "http://127.0.0.1:8080",
    )
    answer = api.client.request("GET", f"{API}/tracking/", json={"customerID": "Admin"})
    assert answer.json() == {"tracking_server_url": "http://mlflow.example"}
    assert api.client.get(f"{API}/status").json()["nodes_total"] == 2


def test_a_node_that_is_gone_is_removed_by_its_name_or_id(api: Api) -> None:
    cluster = api.cluster.orchestrator
    alpha, beta = cluster.nodes()
    assert_error(api.client.delete(f"{API}/nodes/alpha"), ErrorCode.CONFLICT)
    cluster.leave(alpha.id)
    answer = api.client.delete(f"{API}/nodes/alpha")
    assert answer.json() == {"message": f"Node alpha ({alpha.id}) was removed."}
    assert_error(api.client.delete(f"{API}/nodes/alpha"), ErrorCode.NODE_NOT_FOUND)
    cluster.join(beta.model_copy(update={"id": "beta-installed-anew"}))
    cluster.leave(beta.id)
    answer = api.client.delete(f"{API}/nodes/beta")
    assert_error(answer, ErrorCode.CONFLICT)
    assert f"{beta.id} (gone), beta-installed-anew (connected)" in answer.json()["message"]
    assert api.client.delete(f"{API}/nodes/{beta.id}").status_code == 200
    assert [node.id for node in cluster.nodes()] == ["beta-installed-anew"]


def test_a_project_whose_aggregators_node_is_removed_by_force_fails_with_the_reason(api: Api) -> None:
    project_id = api.create()
    api.cluster.build(project_id)
    aggregator = api.cluster.listen(project_id)
    api.cluster.join_learners(project_id)
    cluster = api.cluster.orchestrator
    (node,) = (s.spec.node_id for s in cluster.services() if s.spec.id == aggregator)
    cluster.leave(node)
    refused = api.client.delete(f"{API}/nodes/{node}")
    assert_error(refused, ErrorCode.CONFLICT)
    assert aggregator in refused.json()["message"]
    assert api.client.delete(f"{API}/nodes/{node}?force=true").status_code == 200
    project = api.cluster.wait(project_id, lambda project: project.stage is Stage.FAILED)
    assert project.failure is not None
    assert (project.failure.code, "was removed" in project.failure.message) == ("node_lost", True)


def test_tokens_of_learners_are_never_shown(api: Api) -> None:
    project_id = api.complete()
    learner = next(s for s in api.cluster.orchestrator.services() if s.spec.kind == "learner")
    token = learner.spec.config["learner_token"]
    for path in ("projects", f"projects/{project_id}", f"projects/{project_id}/events", "services", "models"):
        assert token not in api.client.get(f"{API}/{path}").text


def test_mock_data_is_pushed_by_a_provider_per_node(api: Api) -> None:
    digest = api.client.post(f"{API}/blobs", content=b"PAR1").json()["digest"]
    sla = {
        "customerID": "Admin",
        "mock_data_configuration": {"number_of_partitions": 3, "data_tag": "mnist"},
        "dataset_blob": digest,
    }
    answer = api.client.post(f"{API}/mocks/", json=sla)
    assert answer.json()["message"] == "New Mock-Data-Provider started successfully"
    services = api.cluster.orchestrator.services(answer.json()["mock_data_id"])
    assert [s.spec.config["partitions"] for s in services] == [[0, 2], [1]]
    assert {s.spec.config["dataset_blob"] for s in services} == {digest}
    (record,) = api.client.get(f"{API}/mocks").json()["mock_data"]
    assert (record["state"], record["nodes"]) == ("running", ["alpha", "beta"])


def test_mock_data_with_an_unknown_blob_or_a_wrong_sla_starts_nothing(api: Api) -> None:
    sla: dict[str, Any] = {"mock_data_configuration": {"data_tag": "mnist"}}
    assert_error(api.client.post(f"{API}/mocks", json={**sla, "dataset_blob": "00"}), ErrorCode.NOT_FOUND)
    assert_error(api.client.post(f"{API}/mocks", json={**sla, "dataset_blob": 7}), ErrorCode.SLA_INVALID)
    sla["mock_data_configuration"]["data_tag"] = "../x"
    assert_error(api.client.post(f"{API}/mocks", json=sla), ErrorCode.SLA_INVALID)
    assert api.cluster.engine.mock_data() == []


def test_an_empty_blob_is_refused(api: Api) -> None:
    assert_error(api.client.post(f"{API}/blobs"), ErrorCode.USAGE)


def test_the_database_is_reset_only_while_nothing_runs_unless_forced(api: Api) -> None:
    project_id = api.create()
    api.cluster.wait_for_service(f"builder-{project_id}")
    assert project_id in assert_error(api.client.delete(f"{API}/database"), ErrorCode.CONFLICT).message
    answer = api.client.request("DELETE", f"{API}/database", json={"customerID": "Somebody"})
    assert_error(answer, ErrorCode.FORBIDDEN)
    answer = api.client.request(
        "DELETE", f"{API}/database/", params={"force": "true"}, json={"customerID": "Admin"}
    )
    assert answer.json() == {"message": "Successfully reset the database."}
    assert api.client.get(f"{API}/projects").json() == {"projects": []}
    assert api.cluster.orchestrator.services() == []


def test_clearing_the_registry_has_the_next_project_built_anew(api: Api) -> None:
    api.complete()
    second = api.create()
    assert api.cluster.wait(second, lambda p: p.stage is Stage.PLACING).environment is not None
    assert api.client.delete(f"{API}/registry").status_code == 200
    third = api.create()
    api.cluster.wait(third, lambda p: p.stage is Stage.BUILDING)


def test_a_failure_is_told_whole(api: Api) -> None:
    project_id = api.create()
    api.cluster.wait(project_id, lambda p: p.stage is Stage.BUILDING)
    api.cluster.build(project_id)
    api.cluster.listen(project_id)
    error = {
        "code": "user_code_failed",
        "message": "The repository's code raised.",
        "hint": "h",
        "details": {"traceback": "model_manager.py, line 7", "round": 1},
    }
    api.cluster.orchestrator.tell(ServiceId(f"aggregator-{project_id}"), "failed", error=error)
    events = events_of(api.client.get(f"{API}/projects/{project_id}/events"))
    failure = api.client.get(f"{API}/projects/{project_id}").json()["failure"]
    assert events[-1]["kind"] == "project_failed"
    assert events[-1]["data"]["failure"] == failure
    assert failure["code"] == "user_code_failed"
    assert failure["details"]["traceback"] == "model_manager.py, line 7"
    assert failure["details"]["node"] == "alpha"
    for service in api.cluster.orchestrator.services():
        assert service.status.state in {ServiceState.COMPLETED, ServiceState.STOPPED}


@pytest.mark.parametrize(
    "body", [{"version": 1}, {"port": 0}, {"port": 70_000}, {"node": ""}, {"nodes": "a"}]
)
def test_a_wrong_deployment_request_is_told_by_its_key(api: Api, body: dict[str, Any]) -> None:
    answer = api.client.post(f"{API}/models/digits/deployment", json=body)
    (key,) = body
    assert f"body.{key}" in assert_error(answer, ErrorCode.USAGE).message
