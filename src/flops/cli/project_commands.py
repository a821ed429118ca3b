"""``flops project``: submit, watch, show, stop and delete projects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flops.cli.connection import connected, read_sla
from flops.cli.output import FormatOption, OutputFormat, print_data, print_line, print_table, say, timestamp
from flops.errors import ErrorCode, FlopsError

project = typer.Typer(help="Submit, watch and control projects.", no_args_is_help=True)

ProjectIdArgument = Annotated[str, typer.Argument(help="Id of the project.")]


@project.command()
def create(
    sla: Annotated[Path, typer.Argument(help="JSON file with the project's SLA.")],
    watch_it: Annotated[bool, typer.Option("--watch", help="Follow it until it has ended.")] = False,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Submit a project; prints its id."""
    from flops.cli.project_view import tell_result
    from flops.cli.project_watch import watch_project
    from flops.core.sla import parse_project_sla
    from flops.wire.rest import ProjectCreated

    content = read_sla(sla)
    parse_project_sla(content)
    content["ml_repo_url"] = resolve_repository(content["ml_repo_url"], sla.parent)
    with connected() as api:
        created = api.post("/projects", ProjectCreated, content)
        project_id = created.project_id
        if output_format is OutputFormat.TABLE:
            print_line(project_id)
        if not watch_it:
            if output_format is OutputFormat.JSON:
                print_data({"project_id": project_id}, output_format, print_line)
            say(f"{created.message}.")
            say(f"Watch it: flops project watch {project_id}")
            say(f"State:    flops project show {project_id}")
            return
        ended = watch_project(api, project_id)
    tell_result(ended)
    print_data({"project_id": project_id, "project": ended}, output_format, lambda: None)


@project.command()
def plan(
    sla: Annotated[Path, typer.Argument(help="JSON file with the project's SLA.")],
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Show where a project would run, and why, without starting anything; the repository is not looked at."""
    from flops.cli.plan_view import show_plan
    from flops.core.plan import ProjectPlan
    from flops.core.sla import parse_project_sla

    content = read_sla(sla)
    parse_project_sla(content)
    with connected() as api:
        found = api.post("/projects/plan", ProjectPlan, content)
    if output_format is OutputFormat.TABLE:
        show_plan(found)
    found.check()
    print_data(found, output_format, lambda: None)


@project.command("list")
def list_projects(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """List all projects, newest first."""
    from flops.cli.project_view import best_accuracy, metric, progress
    from flops.wire.rest import ProjectList

    with connected() as api:
        projects = api.get("/projects", ProjectList).projects

    def show() -> None:
        rows = [
            (p.id, p.stage, progress(p), metric(best_accuracy(p)), timestamp(p.created_at_s), p.doing)
            for p in projects
        ]
        columns = ["project", "stage", "round", "accuracy", "created", "doing"]
        print_table(columns, rows, empty="There are no projects yet. Submit one: flops project create SLA")

    print_data(projects, output_format, show)


@project.command("show")
def show(project_id: ProjectIdArgument, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Show what a project is doing, its rounds, learners, services, history and failure."""
    from flops.cli.project_view import show_project
    from flops.core.learner_states import learner_standings
    from flops.wire.rest import NodeList, ServiceList

    with connected() as api:
        found = api.project(project_id)
        history = api.history(project_id)
        services = [s for s in api.get("/services", ServiceList).services if s.spec.project_id == project_id]
        nodes = {node.id: node.name for node in api.get("/nodes", NodeList).nodes}
    learners = learner_standings(found, services, history, nodes)
    print_data(
        {"project": found, "learners": learners, "services": services, "history": history},
        output_format,
        lambda: show_project(found, learners, services, history, nodes),
    )


@project.command()
def watch(project_id: ProjectIdArgument, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Follow a project until it has ended; the exit code is 0, or that of its failure."""
    from flops.cli.project_view import tell_result
    from flops.cli.project_watch import watch_project

    with connected() as api:
        ended = watch_project(api, project_id)
    tell_result(ended)
    print_data({"project_id": project_id, "project": ended}, output_format, lambda: None)


@project.command()
def logs(
    project_id: ProjectIdArgument,
    service: Annotated[
        str | None,
        typer.Option("--service", help="Only this service, or only services of this kind (learner, …)."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new output until the project has ended.")
    ] = False,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Print the end of the output of a project's services."""
    from flops.cli.project_logs import fetch_logs, follow_logs, show_logs

    if follow and output_format is OutputFormat.JSON:
        raise FlopsError(ErrorCode.USAGE, "--follow prints lines as they come; it has no JSON format.")
    with connected() as api:
        if follow:
            follow_logs(api, project_id, service)
            return
        found = fetch_logs(api, project_id, service)
    if not found:
        say(f"Project {project_id} has no {service or 'service'} yet.")
    print_data(found, output_format, lambda: show_logs(found))


@project.command()
def stop(project_id: ProjectIdArgument, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Stop a project at any stage; its record and its tracked rounds stay."""
    from flops.cli.api_client import project_path
    from flops.wire.rest import Message

    with connected() as api:
        answer = api.post(f"{project_path(project_id)}/stop", Message)
    print_data(answer, output_format, lambda: say(answer.message))


@project.command()
def delete(project_id: ProjectIdArgument, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Stop a project at any stage and remove everything it left."""
    from flops.cli.api_client import project_path
    from flops.wire.rest import Message

    with connected() as api:
        answer = api.delete(project_path(project_id), Message)
    print_data(answer, output_format, lambda: say(answer.message))


def resolve_repository(url: Any, folder: Path) -> str:
    """Turn a path into an absolute file URL; what is no path is returned as it is.

    Args:
        url: ``ml_repo_url`` of an SLA.
        folder: where the SLA's file is; relative paths start there.

    Raises:
        FlopsError: ``repo_unreachable`` when it looks like a path and no such folder exists.
    """
    text = str(url)
    is_address = "://" in text or ":" in text.split("/", 1)[0]  # https://host/x, git@host:x
    if is_address:
        return text
    repository = (folder / Path(text).expanduser()).resolve()
    if not repository.is_dir():
        raise FlopsError(
            ErrorCode.REPO_UNREACHABLE,
            f"ml_repo_url is {text!r}, and there is no folder {repository}.",
            hint="Give a Git URL (https, ssh, file), or the path of a repository, from the SLA's folder on.",
        )
    return repository.as_uri()
