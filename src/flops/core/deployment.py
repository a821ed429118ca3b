"""A deployed model: which version answers at its address, which one is to take its place, what was before.

Pure: each function returns the record as it is after something happened, the same one when nothing changes.
A version takes over only when it answers; until then, and when it never does, the one before goes on.
"""

from __future__ import annotations

from flops.core.cluster import ServiceState
from flops.core.ids import NodeId, ProjectId, ServiceId, make_service_id
from flops.core.model import Value
from flops.core.project import Failure
from flops.errors import ErrorCode

STARTS_MOST = 4  # of a version that ends again and again before it has answered
# Told failures that may pass: whether the node's restarts help is seen by how many there are.
_TRANSIENT = {ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT}
_BEFORE_RUNNING = {ServiceState.PENDING, ServiceState.PREPARING, ServiceState.RESTARTING}


class Launch(Value):
    """One service that serves a version of a model, or is to serve it."""

    service_id: ServiceId
    version: str
    project_id: ProjectId  # which trained the version
    node_id: NodeId
    node: str  # the node's name
    port: int
    may_move: bool  # to another port when this one is taken: nobody has asked for it, nobody knows it
    reason: str  # why it was started, a few words
    url: str = ""  # where it answers; "" until it does


class ServedVersion(Value):
    """A line of a model's history: a version that answered, and from when until when."""

    version: str
    project_id: ProjectId
    node: str
    url: str
    reason: str
    since_s: float
    until_s: float | None = None  # None while it serves


class Deployment(Value):
    """A model's address and what answers there. It stays when nothing does, and keeps the address."""

    name: str  # of the model
    serving: Launch | None = None
    starting: Launch | None = None  # takes over as soon as it answers
    node_id: NodeId = NodeId("")  # the address: that of the last version that answered, "" before the first
    node: str = ""
    port: int = 0
    state: str = (
        "stopped"  # starting, serving, swapping, restarting, lost (its node is gone), failed, stopped
    )
    url: str = ""  # where the model answers; "" while nothing serves
    doing: str = ""  # one sentence for people
    failure: Failure | None = None  # of the last attempt, or of the service that served
    history: tuple[ServedVersion, ...] = ()  # oldest first
    launches: int = 0  # so far; numbers the services
    is_lost: bool = False  # the node of `serving` is gone right now
    is_restarting: bool = False  # `serving` is started again, and does not answer yet
    created_at_s: float = 0.0
    updated_at_s: float = 0.0

    @property
    def launched(self) -> tuple[Launch, ...]:
        """What runs, or is to run."""
        return tuple(launch for launch in (self.serving, self.starting) if launch is not None)


def launch_id(project_id: ProjectId, number: int) -> ServiceId:
    """The id of the service that a deployment's launch of this number is."""
    return make_service_id("inference", project_id, number)


def begun(deployment: Deployment, launch: Launch, now_s: float) -> Deployment:
    """A version is started; one that was started before and has not answered yet is given up for it."""
    doing = f"Starts version {launch.version} on {launch.node}."
    launches = deployment.launches + 1
    return _changed(deployment, now_s, starting=launch, launches=launches, failure=None, doing=doing)


def moved_on(deployment: Deployment, port: int, now_s: float) -> Deployment:
    """The starting version found its port taken, and tries another one, as a new service."""
    launch = deployment.starting
    if launch is None:
        return deployment
    number = deployment.launches + 1
    changes = {"service_id": launch_id(launch.project_id, number), "port": port}
    again = launch.model_copy(update=changes)
    doing = f"Port {launch.port} of {launch.node} is taken; tries {port}."
    return _changed(deployment, now_s, starting=again, launches=number, doing=doing)


def withdrawn(deployment: Deployment, now_s: float) -> Deployment:
    """The version that was being started is not wanted any more; what serves goes on."""
    doing = "" if deployment.serving is None else f"Serves version {deployment.serving.version}."
    return _changed(deployment, now_s, starting=None, failure=None, doing=doing)


def undeployed(deployment: Deployment, now_s: float) -> Deployment:
    """Nothing is to answer any more; the address is kept for the next version."""
    if not deployment.launched:
        return deployment
    closed = _closed(deployment, now_s)
    return _changed(
        closed, now_s, serving=None, starting=None, is_lost=False, failure=None, doing="Undeployed."
    )


def answered(deployment: Deployment, service_id: ServiceId, url: str, now_s: float) -> Deployment:
    """A service listens: the starting one takes over, or the serving one is back."""
    serving, starting = deployment.serving, deployment.starting
    if serving is not None and serving.service_id == service_id:
        doing = f"Serves version {serving.version}." if starting is None else deployment.doing
        back = serving.model_copy(update={"url": url})
        return _changed(deployment, now_s, serving=back, is_lost=False, is_restarting=False, doing=doing)
    if starting is None or starting.service_id != service_id:
        return deployment
    launch = starting.model_copy(update={"url": url})
    line = ServedVersion(
        version=launch.version,
        project_id=launch.project_id,
        node=launch.node,
        url=url,
        reason=launch.reason,
        since_s=now_s,
    )
    closed = _closed(deployment, now_s)
    return _changed(
        closed,
        now_s,
        serving=launch,
        starting=None,
        is_lost=False,
        is_restarting=False,
        failure=None,
        node_id=launch.node_id,
        node=launch.node,
        port=launch.port,
        history=(*closed.history, line),
        doing=f"Serves version {launch.version}.",
    )


def progressed(deployment: Deployment, service_id: ServiceId, message: str, now_s: float) -> Deployment:
    """The starting version says what it does."""
    launch = deployment.starting
    if launch is None or launch.service_id != service_id or not message:
        return deployment
    doing = f"Version {launch.version} on {launch.node}: {message}"
    return _changed(deployment, now_s, doing=doing)


def told(deployment: Deployment, service_id: ServiceId, failure: Failure, now_s: float) -> Deployment:
    """A service gave the reason of its end; the starting one is given up for it, unless it may pass."""
    launch = deployment.starting
    if launch is None or launch.service_id != service_id or failure.code in _TRANSIENT:
        return deployment
    return _given_up(deployment, launch, failure, now_s)


def changed(
    deployment: Deployment,
    service_id: ServiceId,
    state: ServiceState,
    failure: Failure,
    restarts: int,
    now_s: float,
) -> Deployment:
    """A service's state has changed.

    Args:
        deployment: the record.
        service_id: whose state.
        state: the new one.
        failure: why it ended, if it has.
        restarts: how often its node has started it again.
        now_s: when.
    """
    serving, starting = deployment.serving, deployment.starting
    if starting is not None and starting.service_id == service_id:
        is_hopeless = state is ServiceState.RESTARTING and restarts >= STARTS_MOST
        if state.is_final or is_hopeless:
            return _given_up(deployment, starting, failure, now_s)
        if state is ServiceState.LOST:
            return _changed(deployment, now_s, doing=f"Waits for {starting.node}, which is gone.")
        return deployment
    if serving is None or serving.service_id != service_id:
        return deployment
    if state.is_final:
        doing = f"Version {serving.version} has ended: {failure.message}"
        closed = _closed(deployment, now_s)
        return _changed(closed, now_s, serving=None, is_lost=False, failure=failure, doing=doing)
    is_lost = state is ServiceState.LOST
    # One that was only out of sight runs on, and does not tell once more that it listens.
    is_restarting = deployment.is_restarting or state in _BEFORE_RUNNING
    doing = deployment.doing
    if starting is None and is_lost:
        doing = f"{serving.node}, which serves version {serving.version}, is gone."
    elif starting is None and deployment.is_lost:
        doing = f"{serving.node} is back, and starts version {serving.version} again."
    return _changed(deployment, now_s, is_lost=is_lost, is_restarting=is_restarting, doing=doing)


def version_before(deployment: Deployment) -> ServedVersion | None:
    """The line of the version that answered before the last one; None when there is none."""
    lines = deployment.history
    present = lines[-1].version if lines else ""
    return next((line for line in reversed(lines) if line.version != present), None)


def _given_up(deployment: Deployment, launch: Launch, failure: Failure, now_s: float) -> Deployment:
    goes_on = "" if deployment.serving is None else f" Version {deployment.serving.version} goes on serving."
    doing = f"Version {launch.version} did not come up: {failure.message.rstrip('.')}.{goes_on}"
    return _changed(deployment, now_s, starting=None, failure=failure, doing=doing)


def _closed(deployment: Deployment, now_s: float) -> Deployment:
    """The record with the end of what serves in its history."""
    if deployment.serving is None or not deployment.history:
        return deployment
    *earlier, last = deployment.history
    ended = last.model_copy(update={"until_s": now_s})
    return deployment.model_copy(update={"history": (*earlier, ended)})


def _changed(deployment: Deployment, now_s: float, **changes: object) -> Deployment:
    after = deployment.model_copy(update=changes)
    url = after.serving.url if after.serving is not None else ""
    after = after.model_copy(update={"state": _state_of(after), "url": url})
    return deployment if after == deployment else after.model_copy(update={"updated_at_s": now_s})


def _state_of(deployment: Deployment) -> str:
    if deployment.starting is not None:
        return "starting" if deployment.serving is None else "swapping"
    if deployment.serving is not None:
        if deployment.is_lost:
            return "lost"
        return "restarting" if deployment.is_restarting else "serving"
    return "stopped" if deployment.failure is None else "failed"
