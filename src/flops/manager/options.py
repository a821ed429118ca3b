"""What the project engine is told about its surroundings."""

from __future__ import annotations

from dataclasses import dataclass

from flops.core.sla import Packaging


@dataclass(frozen=True)
class EngineOptions:
    """Options of the project engine.

    Args:
        tracking_uri: base URL of the MLflow server for aggregators; see `AggregatorConfig`.
        tracking_public_uri: likewise, for people.
        secret: kept by the control plane over restarts; the tokens of learners are derived from it.
        packaging: what projects run from whose SLA does not say.
        registry: ``host:port`` of the registry for images, "" for the cluster's own.
        base_image: what images are put on, "" for a base of Debian's packages.
        inference_port: first port an inference service tries.
        load_timeout_s: how long a learner may load without a new row.
        retry_for_s: how long an effect is repeated that fails for a reason that may pass.
        reconnect_grace_s: how long placement waits for nodes that may only be about to reconnect.
        workers: effects that run at the same time.
    """

    tracking_uri: str
    secret: bytes
    tracking_public_uri: str = ""
    packaging: Packaging = Packaging.ENVIRONMENT
    registry: str = ""
    base_image: str = ""
    inference_port: int = 8080
    load_timeout_s: float = 600.0
    retry_for_s: float = 60.0
    reconnect_grace_s: float = 10.0
    workers: int = 8
