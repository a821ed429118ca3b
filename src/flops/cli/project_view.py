"""How a project is written for people: its facts, rounds, services, history, and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from flops.adapters.system_clock import SystemClock
from flops.cli.output import duration, print_facts, print_line, print_table, say, timestamp
from flops.core.cluster import Service
from flops.core.ids import NodeId
from flops.core.learner_states import LearnerStanding, last_words
from flops.core.project import Project, ProjectEvent, Round, Training
from flops.core.rounds import terms_for

_WORDS_SHOWN = 10  # last lines of a service that ended unexpectedly


def show_project(
    project: Project,
    learners: Sequence[LearnerStanding],
    services: Sequence[Service],
    history: Sequence[ProjectEvent],
    nodes: Mapping[NodeId, str],
) -> None:
    """Print everything there is to know about a project.

    Args:
        project: the project.
        learners: where its learners stand.
        services: its services.
        history: its events so far.
        nodes: node names by node id.
    """
    _show_facts(project)
    if project.training is not None and project.training.history:
        is_hierarchical = bool(project.training.clusters)
        print_line("\nCycles" if is_hierarchical else "\nRounds")
        show_rounds(project.training.history, project.training.best_round, is_hierarchical=is_hierarchical)
    if project.training is not None and project.training.clusters:
        print_line("\nClusters")
        _show_clusters(project, project.training)
    if learners:
        print_line("\nLearners")
        print_table(
            ["service", "node", "rows", "state", "since", "doing", "last reason"],
            [_learner_row(learner) for learner in learners],
        )
    if services:
        print_line("\nServices")
        print_table(
            ["service", "node", "state", "memory MB", "CPU %", "detail"],
            [_service_row(service, nodes) for service in services],
        )
    print_line("\nHistory")
    print_table(["time", "event"], [(timestamp(e.time_s), e.message) for e in history])
    _show_last_words(history)
    _show_tracebacks(project, history)


def show_rounds(rounds: Sequence[Round], best: int | None, *, is_hierarchical: bool = False) -> None:
    """Print a table of rounds, or of cycles with their clusters; the best one is marked."""
    first, last = ("cycle", "clusters") if is_hierarchical else ("round", "learners")
    print_table(
        [first, "accuracy", "loss", "duration", last],
        [
            (
                f"{r.number}{' *' if r.number == best else ''}",
                metric(r.accuracy),
                metric(r.loss),
                f"{r.duration_s:.2f} s",
                ", ".join(
                    f"{p.cluster or p.node} ({p.rows:,} rows)"
                    for p in sorted(r.participants, key=lambda p: p.learner)
                ),
            )
            for r in rounds
        ],
    )


def _show_clusters(project: Project, training: Training) -> None:
    rounds = project.sla.training_configuration.training_rounds
    rows = []
    for cluster in training.clusters:
        own = [
            r for c in training.history for p in c.participants if p.cluster == cluster.name for r in p.rounds
        ]
        state = "left out" if cluster.is_given_up else "joined" if cluster.is_joined else "not joined"
        cycle, number = divmod(max(cluster.round_now - 1, 0), rounds)
        joined = sum(learner in training.learners for learner in cluster.learners)
        rows.append(
            (
                cluster.name,
                cluster.aggregator,
                state,
                f"cycle {cycle + 1}, round {number + 1} of {rounds}" if cluster.round_now else "",
                f"{joined} of {len(cluster.learners)}",
                metric(own[-1].accuracy) if own else "",
            )
        )
    print_table(["cluster", "aggregator", "state", "last round", "learners", "own accuracy"], rows)


def tell_result(project: Project) -> None:
    """Tell what a completed project has brought."""
    say(f"Project {project.id} is {project.stage}.")
    model = project.model
    if model is not None:
        numbers = f"accuracy {metric(model.accuracy) or '-'}, loss {metric(model.loss) or '-'}"
        say(f"Best model:  {_word(project)} {model.round}, {numbers}")
        say(f"Registered:  {model.name}, version {model.version}")
    if project.tracking_url:
        say(f"Tracking:    {project.tracking_url}")
    if project.inference_url:
        say(f"Inference:   {project.inference_url}/invocations")
    say(f"Durations:   {durations(project)}")
    if project.inference_url:
        say(f"Next: flops model predict {project.id} FILE")


def durations(project: Project) -> str:
    """How long each stage took."""
    spent = [
        f"{span.stage} {following.entered_at_s - span.entered_at_s:.1f} s"
        for span, following in pairwise(project.spans)
        if following.entered_at_s - span.entered_at_s >= 0.05
    ]
    return ", ".join(spent)


def _word(project: Project) -> str:
    """What a round of the project's aggregator is called."""
    return terms_for(has_clusters=project.sla.training_configuration.is_hierarchical).round.lower()


def progress(project: Project) -> str:
    """``round/rounds``, empty before the training."""
    training = project.training
    return f"{training.round_now}/{training.rounds_total}" if training is not None else ""


def best_accuracy(project: Project) -> float | None:
    """Accuracy of the best round so far."""
    if project.training is None:
        return None
    best = project.training.best_round
    return next((r.accuracy for r in project.training.history if r.number == best), None)


def metric(value: float | None) -> str:
    """A metric with four digits; empty when there is none."""
    return "" if value is None else f"{value:.4f}"


def doing_since(project: Project) -> str:
    """Since when the project does what it does, and for how long while it goes on; empty when unknown."""
    if not project.doing or not project.doing_since_s:
        return ""
    since = timestamp(project.doing_since_s)
    return (
        since
        if project.stage.is_final
        else f"{since} ({duration(SystemClock().now_s() - project.doing_since_s)})"
    )


def _learner_row(learner: LearnerStanding) -> tuple[object, ...]:
    reason = " ".join(learner.reason.split())
    return (
        learner.service,
        learner.node,
        "" if learner.rows is None else f"{learner.rows:,}",
        learner.state,
        "" if learner.since_s is None else timestamp(learner.since_s),
        learner.doing,
        f"{timestamp(learner.reason_at_s)} {reason}" if reason else "",
    )


def _show_last_words(history: Sequence[ProjectEvent]) -> None:
    """What services printed before their last unexpected end."""
    ended = {e.data.get("service"): e for e in history if e.kind in {"service_restarting", "service_failed"}}
    for service, event in ended.items():
        if lines := last_words(event).splitlines():
            print_line(f"\nLast output of {service} before {timestamp(event.time_s)}")
            for line in lines[-_WORDS_SHOWN:]:
                print_line(f"  {line}")


def _show_tracebacks(project: Project, history: Sequence[ProjectEvent]) -> None:
    """The traceback of the project's failure, and where the code of each learner failed last."""
    details = project.failure.details if project.failure is not None else {}
    if text := str(details.get("traceback") or "").rstrip():
        print_line(f"\nTraceback\n{text}")
    failed = {e.data.get("learner"): e for e in history if e.kind == "learner_failed"}
    for learner, event in failed.items():
        if learner != details.get("learner") and (words := last_words(event)):
            print_line(f"\nTraceback of {learner} in round {event.data.get('round')}\n{words}")


def _service_row(service: Service, nodes: Mapping[NodeId, str]) -> tuple[object, ...]:
    status = service.status
    usage = status.usage
    return (
        service.spec.id,
        nodes.get(service.spec.node_id, service.spec.node_id),
        status.state,
        f"{usage.memory_mb:.0f}" if usage.processes else "",
        f"{usage.cpu_percent:.0f}" if usage.processes else "",
        status.detail,
    )


def _show_facts(project: Project) -> None:
    sla, failure = project.sla, project.failure
    since = f" since {timestamp(project.spans[-1].entered_at_s)}" if project.spans else ""
    commit = f" at {project.repository.commit[:12]}" if project.repository is not None else ""
    facts: list[tuple[str, object]] = [
        ("Project", project.id),
        ("Stage", f"{project.stage}{since}"),
        ("Doing", project.doing),
        ("Doing since", doing_since(project)),
        ("Created", timestamp(project.created_at_s)),
        ("Repository", f"{sla.ml_repo_url}{commit}"),
        ("Data tags", ", ".join(sla.training_configuration.data_tags)),
        (_word(project).capitalize(), progress(project)),
        ("Best accuracy", metric(best_accuracy(project))),
        ("Tracking", project.tracking_url),
        ("Inference", project.inference_url and f"{project.inference_url}/invocations"),
        ("Durations", durations(project)),
    ]
    if project.environment is not None:
        facts += [("Environment", note) for note in project.environment.notes]
    if failure is not None:
        where = [f"{name} {failure.details[name]}" for name in ("node", "round") if name in failure.details]
        facts += [
            ("Failure", f"{failure.message} [{failure.code}]"),
            ("Where", ", ".join(where)),
            ("Hint", failure.hint),
        ]
    print_facts(facts)
