"""What the clusters of a hierarchical training do. Parts of `flops.core.lifecycle`.

The root aggregator is as in a classic training, but for its learners, which are the clusters' aggregators.
"""

from __future__ import annotations

from typing import Any

from flops.core import training_moves
from flops.core.change import Change
from flops.core.cluster import ServiceKind
from flops.core.effects import EffectKind
from flops.core.endings import stop_services
from flops.core.events import (
    AggregatorListening,
    LearnerFailed,
    LearnerJoined,
    LearnerLeft,
    RoundCompleted,
    RoundStarted,
)
from flops.core.ids import ServiceId, make_service_id, renewed
from flops.core.project import ClusterState, Project, Stage, Training
from flops.core.service_moves import cluster_of, learner_ids, with_cluster


def aggregator_listening(change: Change, event: AggregatorListening) -> None:
    """An aggregator is ready: those below it can be started, or replaced when its address is another one."""
    if not change.project.sla.training_configuration.is_hierarchical:
        if change.project.stage is Stage.PLACING:
            training_moves.start_learners(change, event)
        else:
            training_moves.replace_learners(change, event)
        return
    cluster = cluster_of(change.project, event.service_id)
    if cluster is not None:
        _start_learners(change, cluster, event.address)
    elif event.service_id == make_service_id(ServiceKind.AGGREGATOR.value, change.project.id):
        _start_clusters(change, event.address)


def learner_joined(change: Change, event: LearnerJoined) -> None:
    """A learner takes part from now on, or a whole cluster."""
    cluster = cluster_of(change.project, event.learner)
    if cluster is None:
        training_moves.learner_joined(change, event)
        return
    if not cluster.is_joined:
        _update(change, cluster, is_joined=True)
        change.note(
            f"The cluster {cluster.name} has joined the root aggregator with {event.rows} rows.",
            kind="cluster_joined",
            cluster=cluster.name,
            aggregator=cluster.aggregator,
            node=event.node,
            rows=event.rows,
        )


def learner_left(change: Change, event: LearnerLeft) -> None:
    """A learner takes part no more, for now, or a whole cluster."""
    cluster = cluster_of(change.project, event.learner)
    if cluster is None:
        training_moves.learner_left(change, event)
        return
    if cluster.is_joined:
        _update(change, cluster, is_joined=False)
        change.note(
            f"The cluster {cluster.name} has left: {event.reason.rstrip('.')}. Cycles go on without it until "
            f"it is back, while {change.project.sla.training_configuration.min_clusters} or more are there.",
            kind="cluster_left",
            cluster=cluster.name,
            aggregator=cluster.aggregator,
            node=event.node,
            reason=event.reason,
        )


def learner_failed(change: Change, event: LearnerFailed) -> None:
    """A learner's code has failed, or a cluster could not do its part of a cycle."""
    cluster = cluster_of(change.project, event.learner)
    if cluster is None:
        training_moves.learner_failed(change, event)
        return
    change.note(
        f"Cycle {event.round}, {event.phase}: without the cluster {cluster.name}: {event.failure.message}",
        kind="cluster_failed",
        cluster=cluster.name,
        cycle=event.round,
        failure=event.failure.model_dump(mode="json"),
    )


def round_started(change: Change, event: RoundStarted) -> None:
    """A round begins, or a cycle, or a round in a cluster."""
    cluster = cluster_of(change.project, event.aggregator)
    if cluster is None:
        training_moves.round_started(change, event)
        return
    if event.round <= cluster.round_now:
        return
    _update(change, cluster, round_now=event.round)
    change.set(doing=_doing(change.project, event.rounds))
    count = training_moves.count(len(event.learners), "learner")
    change.note(
        f"{_where(cluster, event.round, event.rounds)} begins with {count}.",
        kind="cluster_round_started",
        cluster=cluster.name,
        round=event.round,
        learners=list(event.learners),
    )


def round_completed(change: Change, event: RoundCompleted) -> None:
    """A round has ended, or a cycle, or a round in a cluster."""
    record = event.record
    cluster = cluster_of(change.project, event.aggregator)
    if cluster is None:
        training_moves.round_completed(change, event)
        return
    if record.number <= cluster.rounds_done:
        return
    _update(change, cluster, rounds_done=record.number, round_now=max(cluster.round_now, record.number))
    record = training_moves.with_finite_metrics(record)
    change.note(
        f"{_where(cluster, record.number, event.rounds)}: {training_moves.result(record)}",
        kind="cluster_round_completed",
        cluster=cluster.name,
        record=record.model_dump(mode="json"),
        learners=[part.learner for part in record.participants],
    )


def _start_clusters(change: Change, address: str) -> None:
    """The root aggregator is ready: start the clusters' aggregators."""
    project = change.project
    if address == project.aggregator_address:
        return
    training = project.training
    generations = [cluster.generation for cluster in training.clusters] if training else []
    attempt = max([project.learner_generation, *generations]) + 1  # no id is used twice
    if training is None:
        training = Training(rounds_total=project.sla.training_configuration.training_cycles)
        change.set(training=training)
        change.enter(Stage.TRAINING, "Starts the clusters' aggregators.")
    else:
        earlier = {*(c.aggregator for c in training.clusters), *learner_ids(project)}
        change.note(f"The root aggregator listens at another address, {address}: its clusters are replaced.")
        stop_services(change, (s for s in project.services if s in earlier))
    clusters = _clusters(project, attempt)
    change.set(
        training=training.model_copy(update={"clusters": clusters, "learners": ()}),
        aggregator_address=address,
        learner_generation=attempt,
        failed_learners=(),
        services=(*change.project.services, *(cluster.aggregator for cluster in clusters)),
    )
    names = ", ".join(cluster.name for cluster in clusters)
    change.note(
        f"Federated training starts: the root aggregator is at {address}, "
        f"and waits for {training_moves.count(len(clusters), 'cluster')}: {names}.",
        address=address,
        clusters=[cluster.name for cluster in clusters],
    )
    change.request(EffectKind.START_CLUSTERS, address=address, attempt=attempt)


def _clusters(project: Project, generation: int) -> tuple[ClusterState, ...]:
    """The clusters of the placement; learners are numbered through from the first to the last."""
    found: list[ClusterState] = []
    first = 1
    for number, placed in enumerate(project.placement.clusters if project.placement else (), start=1):
        found.append(
            ClusterState(
                name=placed.name,
                aggregator=make_service_id(ServiceKind.AGGREGATOR.value, project.id, number, generation),
                learners=_learners(project, first, len(placed.learners), generation),
                generation=generation,
            )
        )
        first += len(placed.learners)
    return tuple(found)


def _learners(project: Project, first: int, count: int, generation: int) -> tuple[ServiceId, ...]:
    return tuple(
        make_service_id(ServiceKind.LEARNER.value, project.id, number, generation)
        for number in range(first, first + count)
    )


def _start_learners(change: Change, cluster: ClusterState, address: str) -> None:
    """A cluster's aggregator is ready: start its learners, or replace those of its former address."""
    if address == cluster.address or cluster.is_given_up:
        return
    project = change.project
    generation, learners = cluster.generation, cluster.learners
    if cluster.address:
        generation += 1
        stop_services(change, (s for s in project.services if s in cluster.learners))
        change.note(
            f"The aggregator of {cluster.name} listens at another address, {address}: its learners are "
            "replaced.",
            cluster=cluster.name,
        )
        learners = tuple(renewed(learner, generation) for learner in cluster.learners)
    _update(change, cluster, address=address, generation=generation, learners=learners)
    gone = set(cluster.learners) - set(learners)
    training = change.project.training
    if training is not None and gone:
        joined = tuple(s for s in training.learners if s not in gone)
        change.set(training=training.model_copy(update={"learners": joined}))
    change.set(services=(*change.project.services, *learners))
    change.note(
        f"The aggregator of {cluster.name} is at {address}; "
        f"it waits for {training_moves.count(len(learners), 'learner')}.",
        cluster=cluster.name,
        address=address,
        learners=list(learners),
    )
    change.request(EffectKind.START_LEARNERS, address=address, generation=generation, cluster=cluster.name)


def _update(change: Change, cluster: ClusterState, **fields: Any) -> None:
    training = change.project.training
    if training is not None:
        change.set(training=with_cluster(training, cluster, **fields))


def _where(cluster: ClusterState, number: int, rounds: int) -> str:
    cycle, before = divmod(number - 1, rounds)
    return f"Cycle {cycle + 1}, {cluster.name}: round {before + 1} of {rounds}"


def _doing(project: Project, rounds: int) -> str:
    training = project.training or Training(rounds_total=0)
    at_work = [
        f"{cluster.name} in round {(cluster.round_now - 1) % rounds + 1} of {rounds}"
        for cluster in training.clusters
        if cluster.is_joined and cluster.round_now
    ]
    return f"Trains cycle {training.round_now} of {training.rounds_total}: {', '.join(at_work)}."
