"""Bodies of the manager's REST API. Projects, nodes and events cross it as their core types.

| method, path | body | answer |
|---|---|---|
| GET / | | `Message` ("ok") |
| GET /api/flops/authority | | `AuthorityShown` |
| GET /api/flops/status | | `ControlStatus` |
| POST /api/flops/projects | project SLA | `ProjectCreated` |
| POST /api/flops/projects/plan | project SLA | `ProjectPlan` |
| GET /api/flops/projects | | `ProjectList` |
| GET /api/flops/projects/{id} | | `Project` |
| GET /api/flops/projects/{id}/events?after=N&follow=true | | server-sent events, each a `ProjectEvent` |
| GET /api/flops/projects/{id}/logs?service=ID&after=ID:N&tail_bytes=N | | `ProjectLogs` |
| POST /api/flops/projects/{id}/stop | | `Message` |
| DELETE /api/flops/projects/{id} | | `Message` |
| POST /api/flops/mocks | mock-data SLA, optional `dataset_blob` beside its keys | `MockDataCreated` |
| GET /api/flops/mocks | | `MockDataList` |
| GET /api/flops/nodes | | `NodeList` |
| DELETE /api/flops/nodes/{name or id}?force=false | | `Message` |
| GET /api/flops/clusters | | `ClusterList` |
| POST /api/flops/clusters/{name}/invitation | `ClusterInvitationRequest`, optional | likewise `…Made` |
| DELETE /api/flops/clusters/{name}?force=false | | `Message` |
| POST /api/flops/invitations | `InvitationRequest`, optional | `InvitationMade` |
| GET /api/flops/services | | `ServiceList` |
| GET /api/flops/models | | `ModelList` |
| GET /api/flops/models/{name}/deployment | | `Deployment` |
| POST /api/flops/models/{name}/deployment | `DeployRequest`, optional | `Deployment` |
| POST /api/flops/models/{name}/deployment/rollback | | `Deployment` |
| DELETE /api/flops/models/{name}/deployment | | `Deployment` |
| GET /api/flops/images | | `ImageList` |
| POST /api/flops/images/prune?dry_run=false | | `PrunedImages` |
| GET /api/flops/tracking | `{"customerID"}` as body or query, optional | `TrackingServer` |
| DELETE /api/flops/database | | `Message` |
| DELETE /api/flops/registry | | `Message` |
| POST /api/flops/blobs | bytes | `BlobStored` |

Every path is also served with a trailing slash. Errors have one shape, `ErrorBody`. All but ``GET /``, the
authority and the documentation need ``Authorization: Bearer <admin token>``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from flops.core.cluster import IMAGE_BUILDER_ADDON, LEARNER_ADDON, Service
from flops.core.clusters import DEFAULT_CLUSTER
from flops.core.federation import ClusterSummary
from flops.core.health import ExaminedNode
from flops.core.model import StrictValue, Value
from flops.core.project import MockData, Project


class Message(Value):
    """An answer that needs no more than a sentence."""

    message: str


class ErrorBody(Value):
    """Every failure: `FlopsError.to_dict()` and the id under which the log has more.

    `message` stands where clients of the ancestor look for it.
    """

    code: str
    message: str
    hint: str = ""
    details: dict[str, Any] = Field(default_factory=dict)
    request_id: str = ""


class ControlStatus(Value):
    """State of the control plane."""

    version: str
    manager_url: str
    manager_host: str = ""  # the address it listens on
    authority_file: str = ""  # there: certificate that the manager is known by; "" when it needs none of ours
    cluster_address: str  # what to give to `NodeEngine -a`, as host:port
    is_cluster_encrypted: bool = False  # then nodes join by a token
    tracking_url: str  # by the manager's port where that encrypts
    tracking_loopback_url: str = ""  # the same for programs of its machine, without a token
    is_tracking_ready: bool
    tracking_detail: str = ""
    home: str
    started_at_s: float
    nodes_connected: int
    nodes_total: int
    projects_active: int
    projects_total: int


class ProjectCreated(Value):
    """A project was accepted."""

    message: str = "New FLOps project started successfully"
    project_id: str


class ProjectList(Value):
    """All projects, newest first."""

    projects: tuple[Project, ...]


class ServiceLog(Value):
    """A piece of one service's output; the places are those of `flops.core.output`."""

    service_id: str
    kind: str
    node: str
    state: str
    text: str = ""
    start: int = 0
    end: int = 0  # what to ask for next, as `after`
    total: int = 0
    problem: str = ""  # why there is no text, in a sentence


class ProjectLogs(Value):
    """Outputs of a project's services."""

    services: tuple[ServiceLog, ...]


class MockDataCreated(Value):
    """A mock data provider was accepted."""

    message: str = "New Mock-Data-Provider started successfully"
    mock_data_id: str


class MockDataList(Value):
    """All mock data providers, newest first."""

    mock_data: tuple[MockData, ...]


class NodeList(Value):
    """All nodes of the cluster, each with its health."""

    nodes: tuple[ExaminedNode, ...]


class InvitationRequest(StrictValue):
    """Whom to invite: how many nodes, for how long, and what they may switch on."""

    nodes: Annotated[int, Field(ge=1, le=10_000)] = 1
    for_s: Annotated[float, Field(gt=0, le=366 * 86_400)] = 3_600.0
    addons: tuple[str, ...] = (LEARNER_ADDON, IMAGE_BUILDER_ADDON)
    address: str | None = None  # at which the nodes reach the cluster; where it listens if not given
    cluster: str = DEFAULT_CLUSTER  # that they join


class InvitationMade(Value):
    """A token for nodes, shown once."""

    token: str
    cluster: str  # host:port
    nodes: int
    addons: tuple[str, ...]


class ClusterList(Value):
    """All clusters, connected or not, the manager's own first."""

    clusters: tuple[ClusterSummary, ...]


class ClusterInvitationRequest(StrictValue):
    """How long a further cluster may take to join, and where it reaches the manager's cluster."""

    for_s: Annotated[float, Field(gt=0, le=366 * 86_400)] = 3_600.0
    address: str | None = None  # where it listens if not given


class ClusterInvitationMade(Value):
    """A token for the relay of a further cluster, shown once."""

    token: str
    name: str
    manager: str  # host:port of the manager's cluster


class ServiceList(Value):
    """All services of the cluster."""

    services: tuple[Service, ...]


class Model(Value):
    """A trained model of a project, and where it is served."""

    project_id: str
    name: str
    version: str
    round: int
    accuracy: float | None = None
    loss: float | None = None
    run_id: str
    model_uri: str
    tracking_url: str = ""
    inference_url: str = ""  # of its project's own service
    deployment: str = ""  # the deployment's state, when it is this version that is deployed
    deployment_url: str = ""
    deployment_node: str = ""


class ModelList(Value):
    """Trained models, newest first."""

    models: tuple[Model, ...]


class DeployRequest(StrictValue):
    """What of a model to deploy, and where; what is not said stays as it is, or is chosen."""

    version: str | None = None
    node: Annotated[str, Field(min_length=1)] | None = None
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None


class Image(Value):
    """An image in the control plane's registry."""

    name: str
    project_id: str = ""  # whose it is; "" for an image that others pushed
    tags: tuple[str, ...] = ()
    digest: str = ""
    platforms: tuple[str, ...] = ()
    size_bytes: int
    own_bytes: int  # of it, what no other image has: given back when only this one goes
    used_at_s: float  # when it was pushed or asked for last
    use: str = ""  # why it stays, a few words; "" when nothing uses it


class ImageList(Value):
    """Images in the control plane's registry, used last first."""

    images: tuple[Image, ...]
    size_bytes: int  # of all; a part that several have counts once
    max_bytes: int  # beyond it, those go that were used longest ago


class PrunedImages(Value):
    """What was removed from the registry, or would be."""

    images: tuple[Image, ...]
    size_bytes: int  # of the parts that no other image has
    freed_bytes: int  # of them, what is given back already; the rest, used just now, goes within the hour
    is_dry_run: bool


class TrackingServer(Value):
    """Where the MLflow server is."""

    tracking_server_url: str


class BlobStored(Value):
    """Bytes were stored."""

    digest: str
