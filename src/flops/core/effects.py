"""What the lifecycle wants done. Effects are stored with the state that caused them, and run after it.

Running an effect twice must be the same as running it once: the key says which effect it is.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from flops.core.ids import ProjectId
from flops.core.model import Value


class EffectKind(StrEnum):
    """Everything the manager does to the outside world for a project."""

    RESOLVE_REPOSITORY = "resolve_repository"
    DECIDE_PLACEMENT = "decide_placement"
    START_BUILDER = "start_builder"
    START_AGGREGATOR = "start_aggregator"
    START_CLUSTERS = "start_clusters"  # the clusters' aggregators of a hierarchical training
    START_LEARNERS = "start_learners"
    LOOK_FOR_NODES = "look_for_nodes"  # that a training may take in; goes on as long as it may
    ADD_LEARNER = "add_learner"  # payload: the learner of a node that was taken in
    BUILD_INFERENCE = "build_inference"  # verify that what the inference service needs is stored
    START_INFERENCE = "start_inference"
    STOP_SERVICES = "stop_services"  # payload: service ids
    DELETE_PROJECT = "delete_project"
    END_TRACKING = "end_tracking"  # no run of the project goes on in the record of experiments
    DELETE_TRACKING = "delete_tracking"  # payload: project_id; stored beside the project, which it outlives


class Effect(Value):
    """One thing to do for a project; `key` is unique over all projects and times.

    `project_id` is "" for an effect that outlives its project.
    """

    key: str
    project_id: ProjectId
    kind: EffectKind
    payload: dict[str, Any] = Field(default_factory=dict)
