"""From the aggregator's start to a served model. Parts of `flops.core.lifecycle`."""

from __future__ import annotations

import math

from flops.core.change import Change
from flops.core.cluster import ServiceKind
from flops.core.effects import EffectKind
from flops.core.endings import stop_services
from flops.core.events import (
    AggregatorListening,
    InferenceListening,
    LearnerFailed,
    LearnerJoined,
    LearnerLeft,
    ModelPackaged,
    RoundCompleted,
    RoundStarted,
    TrainingCompleted,
    TrainingStarted,
)
from flops.core.ids import ServiceId
from flops.core.late_nodes import takes_in_nodes
from flops.core.project import Project, Round, Stage, Training
from flops.core.rounds import Terms, best_round, terms_for
from flops.core.service_moves import learner_ids, packager_id, service_id
from flops.core.sla import PostTrainingStep


def start_learners(change: Change, event: AggregatorListening) -> None:
    """The aggregator is ready: start the learners."""
    change.set(training=Training(rounds_total=change.project.sla.training_configuration.training_rounds))
    change.enter(Stage.TRAINING, "Starts the learners.")
    _start_learners(change, event)


def replace_learners(change: Change, event: AggregatorListening) -> None:
    """The aggregator was restarted. At the same address its learners find it by themselves.

    A learner's configuration never changes, so at another address they are replaced by new ones.
    """
    if event.address == change.project.aggregator_address:
        return
    earlier = set(learner_ids(change.project))
    change.note(f"The aggregator listens at another address, {event.address}: its learners are replaced.")
    stop_services(change, (s for s in change.project.services if s in earlier))
    if change.project.training is not None:
        change.set(training=change.project.training.model_copy(update={"learners": ()}))
    _start_learners(change, event)


def _start_learners(change: Change, event: AggregatorListening) -> None:
    change.set(
        aggregator_address=event.address,
        learner_generation=change.project.learner_generation + 1,
        failed_learners=(),
    )
    learners = learner_ids(change.project)
    change.set(services=(*change.project.services, *learners), doing=_waiting(change, ()))
    change.note(
        f"Federated training starts: the aggregator is at {event.address}, "
        f"{count(len(learners), 'learner')} are to join.",
        address=event.address,
        learners=list(learners),
    )
    change.request(
        EffectKind.START_LEARNERS, address=event.address, generation=change.project.learner_generation
    )


def training_started(change: Change, event: TrainingStarted) -> None:
    """The run is open in the tracking server."""
    if event.tracking_url == change.project.tracking_url:
        return
    change.set(tracking_url=event.tracking_url)
    change.note(f"Follow the training at {event.tracking_url}", url=event.tracking_url)


def learner_joined(change: Change, event: LearnerJoined) -> None:
    """A learner takes part from now on."""
    project = change.project
    if project.training is None or event.learner in project.training.learners:
        return
    learners = (*project.training.learners, event.learner)
    change.set(
        training=project.training.model_copy(update={"learners": learners}),
        failed_learners=tuple(s for s in project.failed_learners if s != event.learner),
        service_failures={s: f for s, f in project.service_failures.items() if s != event.learner},
    )
    if project.training.round_now == 0:
        change.set(doing=_waiting(change, learners))
    elif _lacks_learners(project):
        change.set(doing=_training_or_waiting(change.project))
    change.note(
        f"A learner on {event.node} has joined with {event.rows} rows "
        f"({len(learners)} of {len(learner_ids(project))}).",
        learner=event.learner,
        node=event.node,
        rows=event.rows,
    )


def learner_left(change: Change, event: LearnerLeft) -> None:
    """A learner takes part no more, for now."""
    project = change.project
    if project.training is None or event.learner not in project.training.learners:
        return
    learners = tuple(s for s in project.training.learners if s != event.learner)
    change.set(training=project.training.model_copy(update={"learners": learners}))
    data = {"learner": event.learner, "node": event.node, "reason": event.reason}
    if event.failure is not None:
        failures = {**project.service_failures, event.learner: event.failure}
        change.set(service_failures=failures)
    if project.training.round_now == 0:
        change.set(doing=_waiting(change, learners))
    elif _lacks_learners(change.project):
        change.set(doing=_training_or_waiting(change.project))
    change.note(
        f"The learner on {event.node} has left: {event.reason.rstrip('.')}. "
        f"{count(len(learners), 'learner')} left.",
        **data,
    )


def learner_failed(change: Change, event: LearnerFailed) -> None:
    """A learner's code has failed; what that means for the round is the aggregator's to say."""
    details = {
        "service_id": event.learner,
        "learner": event.learner,
        "node": event.node,
        "round": event.round,
        "phase": event.phase,
    }
    failure = event.failure.model_copy(update={"details": {**event.failure.details, **details}})
    failures = change.project.service_failures
    if failures.get(ServiceId(event.learner)) == failure:
        return
    change.set(service_failures={**failures, ServiceId(event.learner): failure})
    change.note(
        f"Round {event.round}, {event.phase}: the learner on {event.node} failed: {failure.message}",
        learner=event.learner,
        node=event.node,
        round=event.round,
        failure=failure.model_dump(mode="json"),
    )


def round_started(change: Change, event: RoundStarted) -> None:
    """A round begins."""
    training = change.project.training
    if training is None or event.round <= training.round_now:
        return
    what = terms_of(change.project)
    learners = count(len(event.learners), what.learner)
    change.set(
        training=training.model_copy(update={"round_now": event.round, "rounds_total": event.rounds}),
        doing=f"Trains {what.round.lower()} {event.round} of {event.rounds} with {learners}.",
    )
    if training.round_now == 0 and takes_in_nodes(change.project):
        change.request(EffectKind.LOOK_FOR_NODES)
    change.note(
        f"{what.round} {event.round} of {event.rounds} begins with {learners}.",
        round=event.round,
        rounds=event.rounds,
        learners=list(event.learners),
    )


def round_completed(change: Change, event: RoundCompleted) -> None:
    """A round has ended, with the numbers of the global model."""
    training = change.project.training
    record = event.record
    if training is None or (training.history and record.number <= training.history[-1].number):
        return
    record = with_finite_metrics(record)
    history = (*training.history, record)
    best = best_round(history)
    change.set(
        training=training.model_copy(
            update={
                "history": history,
                "round_now": max(training.round_now, record.number),
                "rounds_total": event.rounds,
                "best_round": best.number if best else None,
            }
        )
    )
    what = terms_of(change.project)
    text = f"{what.round} {record.number} of {event.rounds}: {result(record, what.learner)}"
    is_last = record.number >= event.rounds
    change.set(doing="Exports and registers the best model." if is_last else text)
    change.note(text, rounds=event.rounds, record=record.model_dump(mode="json"))


def training_completed(change: Change, event: TrainingCompleted) -> None:
    """The best model is registered: learners and aggregator are done."""
    training = change.project.training
    if training is not None:
        change.set(training=training.model_copy(update={"learners": (), "best_round": event.model.round}))
    change.set(model=event.model)
    best = Round(number=event.model.round, accuracy=event.model.accuracy, loss=event.model.loss)
    change.note(
        f"The training is completed. The best model is that of {terms_of(change.project).round.lower()} "
        f"{best.number}: {_numbers(best)}; "
        f"registered as {event.model.name}, version {event.model.version}.",
        model=event.model.model_dump(mode="json"),
    )
    stop_services(change, change.project.services)
    if PostTrainingStep.BUILD_IMAGE in change.project.sla.post_training_steps:
        if change.project.runs_images:
            change.set(services=(*change.project.services, packager_id(change.project)))
        change.enter(Stage.PACKAGING, "Prepares what serves the trained model.")
        change.request(EffectKind.BUILD_INFERENCE)
    else:
        change.note("No post-training steps were asked for.", kind="no_post_training_steps")
        _complete(change)


def model_packaged(change: Change, event: ModelPackaged) -> None:
    """What serves the model is stored."""
    images = change.project.images
    if images is not None and event.image:
        change.set(images=images.model_copy(update={"inference": event.image}))
        change.note(f"The image that serves the trained model is pushed: {event.image}", image=event.image)
    else:
        change.note("What serves the trained model is stored: the model, and the lock of its environment.")
    stop_services(change, {packager_id(change.project)} & set(change.project.services))
    if PostTrainingStep.DEPLOY_IMAGE not in change.project.sla.post_training_steps:
        _complete(change)
        return
    inference = service_id(ServiceKind.INFERENCE.value, change.project)
    change.set(services=(*change.project.services, inference))
    change.enter(Stage.DEPLOYING, "Starts the inference service.")
    change.request(EffectKind.START_INFERENCE)


def inference_listening(change: Change, event: InferenceListening) -> None:
    """The model is served."""
    change.set(inference_url=event.url)
    change.note(f"The trained model is served at {event.url}", url=event.url)
    _complete(change)


def inference_moved(change: Change, event: InferenceListening) -> None:
    """The inference service was restarted; it may have another address now."""
    project = change.project
    if event.url == project.inference_url or event.service_id not in project.services:
        return
    if not project.is_deletion_requested:
        change.set(inference_url=event.url)
        change.note(f"The trained model is served at {event.url} now.", url=event.url)


def _complete(change: Change) -> None:
    model = change.project.model
    change.enter(Stage.COMPLETED, "Completed.")
    url = change.project.inference_url
    change.note(
        "The project is completed." + (f" Its model answers at {url}/invocations" if url else ""),
        kind="project_completed",
        accuracy=model.accuracy if model else None,
        inference_url=url,
    )


def _waiting(change: Change, joined: tuple[str, ...]) -> str:
    wanted = len(learner_ids(change.project))
    if len(joined) >= wanted:
        return "All learners have joined; the first round begins."
    return f"Waits for learners: {len(joined)} of {wanted} have joined."


def _lacks_learners(project: Project) -> bool:
    """Whether a round goes on that fewer learners than needed can take part in."""
    training = project.training
    if training is None or training.round_now <= len(training.history):
        return False
    return len(training.learners) < project.sla.training_configuration.min_fit_clients


def _training_or_waiting(project: Project) -> str:
    """What a project does in a round, after a learner has come or gone."""
    training = project.training or Training(rounds_total=0)
    round_ = f"round {training.round_now} of {training.rounds_total}"
    if not _lacks_learners(project):
        return f"Trains {round_} with {count(len(training.learners), 'learner')}."
    needed = project.sla.training_configuration.min_fit_clients
    return f"Waits in {round_} for learners: {len(training.learners)} of the {needed} needed have joined."


def with_finite_metrics(record: Round) -> Round:
    """The round as JSON can have it, with those of its clusters."""
    finite = {name: value for name, value in record.metrics.items() if math.isfinite(value)}
    parts = tuple(
        part.model_copy(update={"rounds": tuple(with_finite_metrics(own) for own in part.rounds)})
        if part.rounds
        else part
        for part in record.participants
    )
    return record.model_copy(update={"metrics": finite, "participants": parts})


def result(record: Round, learner: str = "learner") -> str:
    """What came of a round, in words: its numbers, who took part and who was left out, how long it took."""
    text = f"{_numbers(record)}, {count(len(record.participants), learner)}, {record.duration_s:.2f} s."
    return f"{text} Left out: {', '.join(record.left_out)}." if record.left_out else text


def terms_of(project: Project) -> Terms:
    """What the project's rounds are called, and those who take part in them."""
    return terms_for(has_clusters=project.sla.training_configuration.is_hierarchical)


def _numbers(record: Round) -> str:
    numbers = [f"{record.accuracy:.4f} accuracy"] if record.accuracy is not None else []
    numbers += [f"{record.loss:.4f} loss"] if record.loss is not None else []
    return ", ".join(numbers) or "no numbers"


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
