"""``flops project``: submit, watch, show, stop and delete projects."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flops.cli.connection import connected, read_sla
from flops.cli.output import FormatOption, OutputFormat, print_data, print_facts, print_line, print_table, say
from flops.errors import FlopsError

if TYPE_CHECKING:
    from flops.cli.api_client import ApiClient
    from flops.core.project import Project

project = typer.Typer(help="Submit, watch and control projects.", no_args_is_help=True)

ProjectIdArgument = Annotated[str, typer.Argument(help="Id of the project.")]


@project.command()
def create(
    sla: Annotated[Path, typer.Argument(help="JSON file with the project's SLA.")],
    watch_it: Annotated[bool, typer.Option("--watch", help="Follow it until it has ended.")] = False,
) -> None:
    """Submit a project; prints its id."""
    from flops.core.sla import parse_project_sla
    from flops.wire.rest import ProjectCreated

    content = read_sla(sla)
    parse_project_sla(content)
    repository = sla.parent / str(content["ml_repo_url"])
    if repository.is_dir():
        content["ml_repo_url"] = repository.resolve().as_uri()
    with connected() as api:
        created = api.post("/projects", ProjectCreated, content)
        print_line(created.project_id)
        if watch_it:
            follow(api, created.project_id)
            return
    say(created.message)
    say(f"Watch it with `flops project watch {created.project_id}`.")


@project.command("list")
def list_projects(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """List all projects, newest first."""
    from flops.wire.rest import ProjectList

    with connected() as api:
        projects = api.get("/projects", ProjectList).projects

    def show() -> None:
        rows = [
            (p.id, p.stage, _rounds(p), _metric(_best(p, "accuracy")), _time(p.created_at_s), p.doing)
            for p in projects
        ]
        print_table(
            ["project", "stage", "round", "accuracy", "created", "doing"],
            rows,
            empty="There are no projects yet.",
        )

    print_data(projects, output_format, show)


@project.command("show")
def show_project(project_id: ProjectIdArgument, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Show what a project is doing, its rounds, services, history and failure."""
    from flops.wire.rest import ServiceList

    with connected() as api:
        found = api.project(project_id)
        history = api.history(project_id)
        services = [s for s in api.get("/services", ServiceList).services if s.spec.project_id == project_id]

    def show() -> None:
        _show_facts(found)
        if found.training is not None and found.training.history:
            print_line("\nRounds")
            rows = [
                (r.number, _metric(r.accuracy), _metric(r.loss), len(r.participants), f"{r.duration_s:.2f} s")
                for r in found.training.history
            ]
            print_table(["round", "accuracy", "loss", "learners", "duration"], rows)
        if services:
            print_line("\nServices")
            print_table(
                ["service", "node", "state", "detail"],
                [(s.spec.id, s.spec.node_id, s.status.state, s.status.detail) for s in services],
            )
        print_line("\nHistory")
        print_table(["time", "event"], [(_time(e.time_s), e.message) for e in history])

    print_data({"project": found, "services": services, "history": history}, output_format, show)


@project.command()
def watch(project_id: ProjectIdArgument) -> None:
    """Follow a project until it has ended; the exit code is that of its failure."""
    with connected() as api:
        api.project(project_id)
        follow(api, project_id)


@project.command()
def logs(
    project_id: ProjectIdArgument,
    service: Annotated[str | None, typer.Option("--service", help="Only this service.")] = None,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Print the end of each service's output."""
    from flops.wire.rest import ProjectLogs

    with connected() as api:
        answer = api.get(f"/projects/{project_id}/logs", ProjectLogs, service=service)

    def show() -> None:
        for log in answer.services:
            print_line(f"── {log.service_id} on {log.node}: {log.state}")
            print_line(log.text.rstrip())

    print_data(answer.services, output_format, show)


@project.command()
def stop(project_id: ProjectIdArgument) -> None:
    """Stop a project at any stage; its record and its model stay."""
    from flops.wire.rest import Message

    with connected() as api:
        say(api.post(f"/projects/{project_id}/stop", Message).message)


@project.command()
def delete(project_id: ProjectIdArgument) -> None:
    """Stop a project and remove everything it left."""
    from flops.wire.rest import Message

    with connected() as api:
        say(api.delete(f"/projects/{project_id}", Message).message)


def follow(api: ApiClient, project_id: str) -> None:
    """Tell a project's events as they happen.

    Raises:
        FlopsError: the project's failure.
    """
    for event in api.follow(project_id):
        say(f"{_time(event.time_s)}  {event.message}")
    found = api.project(project_id)
    if found.failure is not None:
        raise FlopsError.from_dict(found.failure.model_dump())
    _tell_result(found)


def _tell_result(found: Project) -> None:
    say(f"Project {found.id} is {found.stage}.")
    if found.model is not None:
        model = found.model
        numbers = f"accuracy {_metric(model.accuracy)}, loss {_metric(model.loss)}"
        say(f"Best model: round {model.round}, {numbers}: {model.name} {model.version}")
    if found.tracking_url:
        say(f"Tracking:  {found.tracking_url}")
    if found.inference_url:
        say(f"Inference: {found.inference_url}/invocations")


def _show_facts(found: Project) -> None:
    facts: list[tuple[str, Any]] = [
        ("Project", found.id),
        (
            "Stage",
            f"{found.stage} since {_time(found.spans[-1].entered_at_s)}" if found.spans else found.stage,
        ),
        ("Doing", found.doing),
        ("Repository", f"{found.sla.ml_repo_url} {found.repository.commit[:12] if found.repository else ''}"),
        ("Round", _rounds(found)),
        ("Best accuracy", _metric(_best(found, "accuracy"))),
        ("Tracking", found.tracking_url),
        ("Inference", found.inference_url),
    ]
    if found.failure is not None:
        facts += [
            ("Failure", f"{found.failure.message} [{found.failure.code}]"),
            ("Hint", found.failure.hint),
        ]
    print_facts(facts)
    if found.failure is not None and found.failure.details.get("traceback"):
        print_line(f"\n{found.failure.details['traceback']}")


def _rounds(found: Project) -> str:
    return f"{found.training.round_now} of {found.training.rounds_total}" if found.training else ""


def _best(found: Project, name: str) -> float | None:
    if found.training is None:
        return None
    values = [getattr(r, name) for r in found.training.history if r.number == found.training.best_round]
    return values[0] if values else None


def _metric(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC).astimezone():%Y-%m-%d %H:%M:%S}"
