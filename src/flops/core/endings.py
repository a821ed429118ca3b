"""How a project ends: by a failure, by a stop, by its deletion. Parts of `flops.core.lifecycle`."""

from __future__ import annotations

from collections.abc import Iterable

from flops.core.change import Change
from flops.core.effects import EffectKind
from flops.core.events import Aborted
from flops.core.ids import ServiceId
from flops.core.project import Failure, Stage


def fail(change: Change, failure: Failure) -> None:
    """End the project with a failure, and stop everything it started."""
    stage = change.project.stage
    change.set(failure=failure)
    change.enter(Stage.FAILED, f"Failed while {stage.value}: {failure.message}")
    change.note(
        f"The project failed while {stage.value}: {failure.message}",
        kind="project_failed",
        stage=stage.value,
        failure=failure.model_dump(mode="json"),
    )
    end_tracking(change)
    stop_services(change, change.project.services)


def abort(change: Change, event: Aborted) -> None:
    """End the project because of a defect of the manager."""
    fail(change, event.failure)
    end_if_nothing_runs(change)


def stop_services(change: Change, services: Iterable[ServiceId]) -> None:
    """Have services stopped; each is forgotten when its end is known."""
    chosen = list(services)
    if chosen:
        change.request(EffectKind.STOP_SERVICES, services=chosen)


def end_tracking(change: Change) -> None:
    """Have the project's run ended, if there may be one: the aggregator that opens it was placed."""
    project = change.project
    if not project.is_deletion_requested and any(span.stage is Stage.PLACING for span in project.spans):
        change.request(EffectKind.END_TRACKING)


def end_if_nothing_runs(change: Change) -> None:
    """End a stopping project, and delete one that is to be deleted, when nothing of it runs any more.

    A service on a node that is gone does not hold the project up: the cluster ends it when the node is back.
    """
    project = change.project
    if set(project.services) - set(project.lost_services):
        return
    if project.stage is Stage.STOPPING:
        change.set(services=(), lost_services=())
        change.enter(Stage.STOPPED, "Stopped.")
        change.note("The project has stopped; nothing of it runs any more.", kind="project_stopped")
        end_tracking(change)
    if project.is_deletion_requested:
        change.set(services=(), lost_services=(), doing="Is being deleted.")
        change.request(EffectKind.DELETE_PROJECT)
        change.request_beyond_end(EffectKind.DELETE_TRACKING)
