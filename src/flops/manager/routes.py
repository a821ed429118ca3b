"""The REST API's endpoints, as `flops.wire.rest` lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from flops.core.cluster import Service
from flops.core.deployment import Deployment
from flops.core.ids import ProjectId
from flops.core.plan import ProjectPlan
from flops.core.project import Project
from flops.core.sla import MockDataSla, ProjectSla, parse_mock_data_sla, parse_project_sla
from flops.errors import ErrorCode, FlopsError
from flops.manager.bodies import read_json_object, receive_blob
from flops.manager.engine import Engine
from flops.manager.event_stream import stream_events
from flops.manager.images import ImageShelf
from flops.manager.project_logs import read_logs
from flops.ports import BlobStreams
from flops.wire.join import MANAGER_AUTHORITY_PATH, AuthorityShown
from flops.wire.rest import (
    BlobStored,
    ControlStatus,
    DeployRequest,
    ImageList,
    Message,
    MockDataCreated,
    MockDataList,
    Model,
    ModelList,
    NodeList,
    ProjectCreated,
    ProjectList,
    ProjectLogs,
    PrunedImages,
    ServiceList,
    TrackingServer,
)

JsonObject = Annotated[dict[str, Any], Depends(read_json_object)]
TailBytes = Annotated[int, Query(ge=1, le=1_048_576, description="how much of each at most")]

_SLA_BODY = {"$ref": f"#/components/schemas/{ProjectSla.__name__}"}
_MOCK_BODY = {
    "allOf": [{"$ref": f"#/components/schemas/{MockDataSla.__name__}"}],
    "properties": {"dataset_blob": {"type": "string", "description": "digest of a stored dataset file"}},
}


def _json_body(schema: dict[str, Any], *, is_required: bool = True) -> dict[str, Any]:
    return {"requestBody": {"required": is_required, "content": {"application/json": {"schema": schema}}}}


def build_routes(
    engine: Engine, status: Callable[[], ControlStatus], blobs: BlobStreams, images: ImageShelf
) -> APIRouter:
    """All endpoints below ``/api/flops``."""
    router = APIRouter(prefix="/api/flops")
    _add_projects(router, engine)
    _add_project_actions(router, engine)
    _add_models(router, engine)
    _add_images(router, images)
    _add_mock_data(router, engine)
    _add_cluster(router, engine, status)
    _add_administration(router, engine, blobs)
    return router


def _add_projects(router: APIRouter, engine: Engine) -> None:
    @router.post("/projects", tags=["projects"], openapi_extra=_json_body(_SLA_BODY))
    def create_project(sla: JsonObject) -> ProjectCreated:
        """Start a project. Nothing starts when the SLA is invalid."""
        return ProjectCreated(project_id=engine.submit(parse_project_sla(sla)).id)

    @router.post("/projects/plan", tags=["projects"], openapi_extra=_json_body(_SLA_BODY))
    def plan_project(sla: JsonObject) -> ProjectPlan:
        """What placement would decide about a project now, and why. Nothing is started or stored."""
        return engine.plan(parse_project_sla(sla))

    @router.get("/projects", tags=["projects"])
    def list_projects() -> ProjectList:
        """All projects, newest first."""
        return ProjectList(projects=tuple(engine.projects()))

    @router.get("/projects/{project_id}", tags=["projects"])
    def show_project(project_id: str) -> Project:
        """A project, whole."""
        return engine.get(ProjectId(project_id))

    @router.get("/projects/{project_id}/events", tags=["projects"], response_class=StreamingResponse)
    async def watch_project(
        project_id: str,
        after: Annotated[int, Query(ge=0, description="only events with a higher id")] = 0,
        follow: Annotated[bool, Query(description="go on until the project has ended")] = True,
        last_event_id: Annotated[str | None, Header(description="wins over `after`")] = None,
    ) -> StreamingResponse:
        """The project's history as server-sent events, each a `ProjectEvent`."""
        await run_in_threadpool(engine.get, ProjectId(project_id))
        start = int(last_event_id) if last_event_id and last_event_id.isdecimal() else after
        events = stream_events(engine, ProjectId(project_id), after=start, is_followed=follow)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def _add_project_actions(router: APIRouter, engine: Engine) -> None:
    @router.get("/projects/{project_id}/logs", tags=["projects"])
    def show_logs(
        project_id: str,
        service: Annotated[
            str | None, Query(description="only this service, or services of this kind")
        ] = None,
        after: Annotated[
            list[str] | None, Query(description="where to begin: SERVICE:PLACE, or PLACE")
        ] = None,
        tail_bytes: TailBytes = 65_536,
    ) -> ProjectLogs:
        """The outputs of a project's services: their ends, or what follows the given places."""
        return read_logs(engine, ProjectId(project_id), service, after or (), tail_bytes)

    @router.post("/projects/{project_id}/stop", tags=["projects"])
    def stop_project(project_id: str) -> Message:
        """Stop a project; of a completed one, its inference service. An ended one is left as it is."""
        project = engine.stop(ProjectId(project_id))
        return Message(message=f"Project {project_id} is {project.stage.value}. {project.doing}")

    @router.delete("/projects/{project_id}", tags=["projects"])
    def delete_project(project_id: str) -> Message:
        """Stop a project, and remove it with its services and its experiment."""
        engine.delete(ProjectId(project_id))
        return Message(message=f"Project {project_id} is being deleted.")


def _add_models(router: APIRouter, engine: Engine) -> None:
    deployments = engine.deployments

    @router.get("/models", tags=["models"])
    def list_models() -> ModelList:
        """Trained models, newest first, and where they are served."""
        return ModelList(models=tuple(_models(engine.projects(), deployments.all())))

    @router.get("/models/{name}/deployment", tags=["models"])
    def show_deployment(name: str) -> Deployment:
        """Where a model is deployed, in which version, and which versions were before."""
        return deployments.get(name)

    @router.post("/models/{name}/deployment", tags=["models"])
    def deploy_model(name: str, wanted: DeployRequest | None = None) -> Deployment:
        """Deploy a version of a model. It takes over when it answers; until then the one before goes on."""
        wanted = wanted or DeployRequest()
        return deployments.deploy(name, version=wanted.version, node=wanted.node, port=wanted.port)

    @router.post("/models/{name}/deployment/rollback", tags=["models"])
    def roll_model_back(name: str) -> Deployment:
        """Deploy the version that was deployed before the present one."""
        return deployments.rollback(name)

    @router.delete("/models/{name}/deployment", tags=["models"])
    def undeploy_model(name: str) -> Deployment:
        """Stop what serves the model. Its address is kept for the next version."""
        return deployments.undeploy(name)


def _add_images(router: APIRouter, images: ImageShelf) -> None:
    @router.get("/images", tags=["images"])
    def list_images() -> ImageList:
        """Images in the control plane's registry, used last first, and what uses them."""
        return images.all()

    @router.post("/images/prune", tags=["images"])
    def prune_images(
        dry_run: Annotated[bool, Query(description="only say what would be removed")] = False,
    ) -> PrunedImages:
        """Remove all images that no project in progress and no deployed model uses."""
        return images.prune(is_dry_run=dry_run)


def _add_mock_data(router: APIRouter, engine: Engine) -> None:
    @router.post("/mocks", tags=["mock data"], openapi_extra=_json_body(_MOCK_BODY))
    def create_mock_data(sla: JsonObject) -> MockDataCreated:
        """Push a dataset to learner nodes, as their devices would."""
        content = dict(sla)
        blob = content.pop("dataset_blob", None)
        if blob is not None and not isinstance(blob, str):
            raise FlopsError(
                ErrorCode.SLA_INVALID,
                f"The mock-data SLA is invalid: dataset_blob: not a string, got {blob!r}.",
            )
        return MockDataCreated(mock_data_id=engine.create_mock_data(parse_mock_data_sla(content), blob).id)

    @router.get("/mocks", tags=["mock data"])
    def list_mock_data() -> MockDataList:
        """All mock data providers, newest first."""
        return MockDataList(mock_data=tuple(engine.mock_data()))


def _add_cluster(router: APIRouter, engine: Engine, status: Callable[[], ControlStatus]) -> None:
    @router.get("/status", tags=["cluster"])
    def show_status() -> ControlStatus:
        """State of the control plane."""
        return status()

    @router.get("/nodes", tags=["cluster"])
    def list_nodes() -> NodeList:
        """All nodes, connected or not, each with its health."""
        return NodeList(nodes=tuple(engine.examined_nodes()))

    @router.delete("/nodes/{name}", tags=["cluster"])
    def remove_node(
        name: str,
        force: Annotated[bool, Query(description="also with services: they have failed then")] = False,
    ) -> Message:
        """Forget a node that is gone for good; lock out one that joined by a token, at once."""
        node = engine.remove_node(name, is_forced=force)
        return Message(message=f"Node {node.name} ({node.id}) was removed.")

    @router.get("/services", tags=["cluster"])
    def list_services() -> ServiceList:
        """All services. Their configurations are left out: they hold tokens."""
        return ServiceList(services=tuple(_without_config(service) for service in engine.services()))

    @router.get("/tracking", tags=["cluster"])
    def show_tracking_server() -> TrackingServer:
        """Where the MLflow server is; the same for every customer."""
        return TrackingServer(tracking_server_url=status().tracking_url)


def build_authority(certificate: str) -> APIRouter:
    """The endpoint by which machines of users learn whom to trust.

    Args:
        certificate: of the cluster's authority, PEM; "" when the manager shows none of it.
    """
    router = APIRouter()

    @router.get(MANAGER_AUTHORITY_PATH, tags=["cluster"])
    def show_authority() -> AuthorityShown:
        """The certificate of the authority that the manager is known by. Needs no token."""
        return AuthorityShown(certificate=certificate)

    return router


def _add_administration(router: APIRouter, engine: Engine, blobs: BlobStreams) -> None:
    @router.delete("/database", tags=["administration"])
    async def reset_database(
        request: Request,
        force: Annotated[bool, Query(description="stop what runs, instead of refusing")] = False,
    ) -> Message:
        """Forget all projects, mock data records and environments. Experiments in MLflow stay."""
        await _check_customer(request)
        await run_in_threadpool(engine.reset, is_forced=force)
        return Message(message="Successfully reset the database.")

    @router.delete("/registry", tags=["administration"])
    def clear_registry() -> Message:
        """Forget all built environments: the next project builds its own."""
        count = engine.clear_registry()
        return Message(message=f"Successfully cleared the registry: {count} environments forgotten.")

    @router.post("/blobs", tags=["administration"])
    async def store_blob(request: Request) -> BlobStored:
        """Store bytes, such as a dataset for mock data; the answer has their SHA-256."""
        return BlobStored(digest=await receive_blob(request, blobs))


async def _check_customer(request: Request) -> None:
    """Clients of the ancestor say who they are in the body; whoever says somebody else is refused."""
    if not await request.body():
        return
    customer = (await read_json_object(request)).get("customerID", "Admin")
    if customer != "Admin":
        raise FlopsError(ErrorCode.FORBIDDEN, "Only Admins are allowed to reset the database!")


def _without_config(service: Service) -> Service:
    return service.model_copy(update={"spec": service.spec.model_copy(update={"config": {}})})


def _models(projects: list[Project], deployments: list[Deployment]) -> list[Model]:
    deployed = {
        (launch.project_id, launch.version): (deployment.state, launch)
        for deployment in deployments
        for launch in deployment.launched
    }
    models = []
    for project in projects:
        if (model := project.model) is None:
            continue
        state, launch = deployed.get((project.id, model.version), ("", None))
        models.append(
            Model(
                project_id=project.id,
                name=model.name,
                version=model.version,
                round=model.round,
                accuracy=model.accuracy,
                loss=model.loss,
                run_id=model.run_id,
                model_uri=model.model_uri,
                tracking_url=project.tracking_url,
                inference_url=project.inference_url,
                deployment=state,
                deployment_url=launch.url if launch is not None else "",
                deployment_node=launch.node if launch is not None else "",
            )
        )
    return models
